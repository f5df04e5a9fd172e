"""The database as one command uses it: a connection whose schema was checked, and the name of who acts."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, LiteralString

from jobqueue.cli.options import database_dsn

if TYPE_CHECKING:
    from psycopg import Connection

    from jobqueue.settings import Settings

APPLICATION_NAME = "jobqueue cli"


@contextmanager
def session(dsn: str | None) -> Iterator[Connection[Any]]:
    """Lend a connection in autocommit mode to the database of a command.

    `dsn`: the command's flag; None: the settings', else the embedded server, which is started.
    Raises DatabaseUnavailable after `JOBQUEUE_START_TIMEOUT`, SchemaOutdated, SchemaTooNew.
    """
    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn)
    with open_connection(settings, database_dsn(settings), pooler=settings.pooler) as connection:
        yield connection


def open_connection(settings: Settings, dsn: str, *, pooler: bool) -> Connection[Any]:
    """Connect and compare the schema's version with the program's. Errors as of `session`."""
    from jobqueue.database.migrations import check_schema
    from jobqueue.database.pool import connect

    connection = connect(dsn, APPLICATION_NAME, pooler=pooler, timeout=settings.start_timeout)
    try:
        check_schema(connection)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def as_actor(connection: Connection[Any]) -> Iterator[None]:
    """One transaction whose audit names the person at the keyboard, beside the database's own user."""
    # For the transaction only: behind a pooler a session's setting would stick to somebody else's work.
    with connection.transaction():
        connection.execute("select set_config('jobqueue.actor', %s, true)", (_user(),))
        yield


def rows_of(connection: Connection[Any], query: LiteralString, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """All rows of a query, a dict each; jobqueue's errors are translated."""
    from psycopg.rows import dict_row

    from jobqueue.errors import translate

    with translate(), connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
