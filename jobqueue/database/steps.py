"""Running the schema's scripts: short lock waits with retries, statements outside a transaction, clear failures."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from psycopg import Connection, errors, sql

from jobqueue.database.schema_files import Script, split_statements
from jobqueue.errors import DatabaseUnavailable, MigrationBusy, MigrationError

T = TypeVar("T")

# An `alter table` that waits for a lock makes every later query on the table wait behind it: give up early, try again.
# Earlier than deadlock_timeout (1 s), so that of a migration and a client that wait for each other the client goes on.
LOCK_TIMEOUT = "300ms"
LOCK_TRIES = 20
LOCK_PAUSE = 1.0

_CONCURRENT_INDEX = re.compile(
    r"\bcreate\s+(?:unique\s+)?index\s+concurrently\s+(?:if\s+not\s+exists\s+)?\"?(?P<index>\w+)\"?"
    r"\s+on\s+(?:only\s+)?(?:\"?(?P<schema>\w+)\"?\.)?\"?\w+",
    re.IGNORECASE,
)

logger = logging.getLogger(__name__)


def in_transaction(connection: Connection[Any], title: str, action: Callable[[], T]) -> T:
    """Run an action in a transaction of its own, again if it does not get its locks; return what it returns.

    Raises MigrationBusy after the last try, MigrationError for any other failure of a statement.
    """
    for attempt in range(1, LOCK_TRIES + 1):
        try:
            with connection.transaction():
                connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'".encode())
                return action()
        except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
            if attempt == LOCK_TRIES:
                raise MigrationBusy(
                    f"{title} did not get its locks in {LOCK_TRIES} tries: {error.diag.message_primary}",
                    hint="A long transaction holds them (see pg_stat_activity). Nothing of this step was applied; "
                    "run the command again.",
                ) from error
            logger.info("%s waits for a lock (try %d of %d)", title, attempt, LOCK_TRIES)
            time.sleep(LOCK_PAUSE * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def run_script(connection: Connection[Any], title: str, text: str) -> None:
    """Run a whole script; a failure names script and line. Lock failures pass unchanged, for `in_transaction`."""
    with _failures(connection, title, text):
        connection.execute(text.encode())


def run_outside_transaction(connection: Connection[Any], title: str, script: Script) -> None:
    """Run a script statement by statement, each committed by itself, so that a killed one can be run again.

    Without a lock time-out: what `create index concurrently` waits for blocks neither readers nor writers, and giving
    up would leave an invalid index behind.
    """
    connection.execute("set lock_timeout = 0")
    for statement in split_statements(script.sql):
        with _failures(connection, title, statement):
            if _index_is_ready(connection, statement):
                continue
            connection.execute(statement.encode())


def stopwatch() -> Callable[[], timedelta]:
    """Return a function that says how much time has passed since now."""
    start = time.monotonic()
    return lambda: timedelta(seconds=time.monotonic() - start)


def _index_is_ready(connection: Connection[Any], statement: str) -> bool:
    """For a concurrent index: whether a valid one is there already; what a killed build left behind is dropped."""
    match = _CONCURRENT_INDEX.search(statement)
    if match is None:
        return False
    schema, index = match["schema"] or "jobqueue", match["index"]
    row = connection.execute(
        "select i.indisvalid from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid"
        " join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = %s and c.relname = %s",
        (schema, index),
    ).fetchone()
    if row is None or row[0]:
        return row is not None
    connection.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(schema, index)))
    return False


@contextmanager
def _failures(connection: Connection[Any], title: str, text: str) -> Iterator[None]:
    try:
        yield
    except (errors.LockNotAvailable, errors.DeadlockDetected):
        raise
    except (errors.InvalidFunctionDefinition, errors.InvalidTableDefinition):
        raise
    except psycopg.Error as error:
        if connection.broken:
            raise DatabaseUnavailable(
                f"the connection was lost during {title}: {error}",
                hint="Run the command again: finished steps are kept, an unfinished one begins anew.",
            ) from error
        raise MigrationError(
            f"{title}{_line(error, text)}: {error.diag.message_primary or error}",
            hint=error.diag.message_hint,
            details={"sqlstate": error.sqlstate, "detail": error.diag.message_detail},
        ) from error


def _line(error: psycopg.Error, text: str) -> str:
    position = error.diag.statement_position
    return f", line {text.count(chr(10), 0, int(position) - 1) + 1}" if position else ""
