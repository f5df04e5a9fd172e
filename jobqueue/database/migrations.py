"""The schema's migrations: `migrate_up`, `migrate_down`, `status`, `sql_text`, and the check made at start.

```
lock (polled)  ─►  missing steps, a transaction each  ─►  functions, views, roles, comments, if anything changed
```

Safe to kill at any point: a step and its row in the ledger are one transaction, and the next run goes on from there.
Two migrators at a time are safe too: the second waits and then finds nothing to do. A step may only add what running
programs do not mind; what they still use is removed a release later. A change of a function alone needs a step of its
own (an empty one will do) if programs cannot run without it, since they compare nothing but the version.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources.abc import Traversable
from typing import Any, Literal

from psycopg import AsyncConnection, Connection, errors

from jobqueue.database import ledger, repeatables
from jobqueue.database.ledger import Applied
from jobqueue.database.migration_text import sql_text
from jobqueue.database.pool import connect, shares_sessions
from jobqueue.database.schema_files import Migration, SchemaFiles, load_files, program_version, script
from jobqueue.database.steps import in_transaction, run_outside_transaction, run_script, stopwatch
from jobqueue.errors import (
    ConfigurationError,
    InvalidArgument,
    MigrationBusy,
    MigrationEdited,
    MigrationError,
    NotAllowed,
    SchemaOutdated,
    SchemaTooNew,
)

__all__ = ["StepStatus", "check_schema", "check_schema_async", "migrate_down", "migrate_up", "sql_text", "status"]

APPLICATION_NAME = "jobqueue migrate"
LOCK_KEY = int.from_bytes(b"jobqueue")
LOCK_POLL_SECONDS = 0.2
LOCK_WAIT_SECONDS = 600.0

_SESSION = """\
set search_path = jobqueue, pg_temp;
set statement_timeout = 0;
set idle_in_transaction_session_timeout = 0;
"""

_VERSION_QUERY = "select coalesce(max(version), 0) from jobqueue.schema_migration"

State = Literal["applied", "pending", "changed", "edited", "unknown"]


@dataclass(frozen=True, slots=True)
class StepStatus:
    """One step, or one repeatable file that is not up to date.

    `state`: applied; pending (the database lacks it); changed (a repeatable file that the next `up` re-applies); edited
    (the file differs from what was applied: refused); unknown (the database is newer than this program).
    `version` is None for repeatable files; the last three are None unless applied.
    """

    version: int | None
    name: str
    state: State
    applied_at: datetime | None = None
    applied_by: str | None = None
    duration: timedelta | None = None


def migrate_up(
    dsn: str, *, target: int | None = None, source: Traversable | None = None, timeout: float = 0.0
) -> list[str]:
    """Bring the schema to `target` (default: the newest version) and return what was done; [] if nothing was to do.

    Functions, views, roles and comments belong to the newest version: with an older `target` they are left alone.
    `source`: a folder laid out like `sql/` (default: the package's). `timeout`: seconds to wait for the server.
    Raises MigrationError, MigrationEdited, MigrationBusy, SchemaTooNew, InvalidArgument, DatabaseUnavailable, and
    ConfigurationError behind a transaction pooler, which has no session that could hold the lock.
    """
    files = load_files(source)
    goal = _checked_target(files.version if target is None else target, files.version)
    with _migrator(dsn, timeout) as connection:
        in_transaction(connection, "the ledger", lambda: ledger.create(connection))
        applied = ledger.applied_steps(connection)
        _refuse_newer(applied, files)
        _refuse_edited(applied, files)
        done = [_apply(connection, migration) for migration in files.migrations[len(applied) : goal]]
        if goal == files.version:
            done += _apply_repeatables(connection, files)
    return done


def migrate_down(dsn: str, *, target: int, source: Traversable | None = None, timeout: float = 0.0) -> list[str]:
    """Undo the steps above `target`, newest first, and return what was done; 0 removes the schema. Data are lost.

    Functions and views go first, since they belong to the newest version: afterwards run `jobqueue migrate up` of the
    program whose version `target` is. Steps this program does not know are undone by what the ledger keeps of them.
    Raises MigrationError (also if a step cannot be undone: then nothing was changed), and as of `migrate_up`.
    """
    files = load_files(source)
    with _migrator(dsn, timeout) as connection:
        applied = ledger.applied_steps(connection)
        goal = _checked_target(target, len(applied))
        steps = [(step, _way_down(step, files)) for step in reversed(applied[goal:])]
        if steps:
            in_transaction(connection, "functions and views", lambda: repeatables.remove_all(connection))
        done = [_undo(connection, step, down) for step, down in steps]
        if goal == 0 and ledger.exists(connection):
            in_transaction(connection, "the ledger", lambda: run_script(connection, "the ledger", ledger.DROP_LEDGER))
    return done


def status(dsn: str, *, source: Traversable | None = None, timeout: float = 0.0) -> list[StepStatus]:
    """Return every step that the program or the database knows, then the repeatable files that are not up to date."""
    files = load_files(source)
    with connect(dsn, APPLICATION_NAME, pooler=True, timeout=timeout) as connection:
        applied = {step.version: step for step in ledger.applied_steps(connection)}
        changed = repeatables.changed_files(connection, files)
    known = {migration.version: migration for migration in files.migrations}
    steps = [_step_status(known.get(version), applied.get(version)) for version in sorted(known.keys() | applied)]
    return steps + [StepStatus(None, name, "changed") for name in changed if name != ledger.VERSION_ROW]


def check_schema(connection: Connection[Any], *, source: Traversable | None = None) -> None:
    """Make sure that the schema is the one this program was written for, by its version.

    Raises SchemaOutdated (exit code 75) with the command to run, SchemaTooNew (78), NotAllowed.
    """
    with _readable_ledger() as outdated:
        row = connection.execute(_VERSION_QUERY).fetchone()
    _compare(0 if outdated or row is None else int(row[0]), program_version(source))


async def check_schema_async(connection: AsyncConnection[Any], *, source: Traversable | None = None) -> None:
    """The same as `check_schema` on an asyncio connection."""
    row = None
    with _readable_ledger() as outdated:
        row = await (await connection.execute(_VERSION_QUERY)).fetchone()
    _compare(0 if outdated or row is None else int(row[0]), program_version(source))


@contextmanager
def _readable_ledger() -> Iterator[list[Exception]]:
    """Collect the error that means "no schema at all"; explain the one that means "no right to look"."""
    missing: list[Exception] = []
    try:
        yield missing
    except (errors.UndefinedTable, errors.InvalidSchemaName) as error:
        missing.append(error)
    except errors.InsufficientPrivilege as error:
        raise NotAllowed(
            f"the database's schema version cannot be read: {error.diag.message_primary}",
            hint="Grant the role jobqueue_worker, jobqueue_api or jobqueue_producer to the user that connects.",
        ) from error


def _compare(database: int, program: int) -> None:
    if database < program:
        raise SchemaOutdated(
            f"the database's schema has version {database}, this program needs {program}",
            hint="Run: jobqueue migrate up",
            details={"database": database, "program": program},
        )
    if database > program:
        raise _too_new(database, program)


def _too_new(database: int, program: int) -> SchemaTooNew:
    return SchemaTooNew(
        f"the database's schema has version {database}, newer than this program's {program}",
        hint=f"Upgrade jobqueue, or let the newer one run: jobqueue migrate down --target {program}",
        details={"database": database, "program": program},
    )


@contextmanager
def _migrator(dsn: str, timeout: float) -> Iterator[Connection[Any]]:
    """A connection that holds the migration lock; closing it frees the lock."""
    with connect(dsn, APPLICATION_NAME, pooler=True, timeout=timeout) as connection:
        if shares_sessions(dsn, connection):
            raise ConfigurationError(
                "migrations need a session of their own, and a transaction pooler answers here",
                hint="Name a direct connection in JOBQUEUE_LISTEN_DSN, or with --dsn.",
            )
        connection.execute(_SESSION.encode())
        # A killed migrator's locks are freed within a second, even in the middle of a step; not on every platform.
        with suppress(errors.InvalidParameterValue):
            connection.execute("set client_connection_check_interval = '1s'")
        _lock(connection)
        yield connection


def _lock(connection: Connection[Any]) -> None:
    """Take the lock by polling: a migrator that *waits* for it holds a snapshot, which deadlocks a concurrent index."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        row = connection.execute("select pg_try_advisory_lock(%s)", (LOCK_KEY,)).fetchone()
        if row and row[0]:
            return
        if time.monotonic() > deadline:
            raise MigrationBusy(
                f"another migration has been running for {LOCK_WAIT_SECONDS:g} s",
                hint="Find it in pg_stat_activity (application_name 'jobqueue migrate'), then run the command again.",
            )
        time.sleep(LOCK_POLL_SECONDS)


def _checked_target(target: int, highest: int) -> int:
    if not 0 <= target <= highest:
        raise InvalidArgument(f"there is no schema version {target} to go to: the target is between 0 and {highest}")
    return target


def _refuse_newer(applied: list[Applied], files: SchemaFiles) -> None:
    if applied and applied[-1].version > files.version:
        raise _too_new(applied[-1].version, files.version)


def _refuse_edited(applied: list[Applied], files: SchemaFiles) -> None:
    for step, migration in zip(applied, files.migrations, strict=False):
        if (step.version, step.checksum) != (migration.version, migration.checksum):
            raise MigrationEdited(
                f"migration {migration.title} is not the one that was applied on {step.applied_at:%Y-%m-%d %H:%M} UTC"
                f" as {step.title}",
                hint="An applied migration is never edited: restore its file and add a new one.",
                details={"version": step.version, "applied": step.checksum, "file": migration.checksum},
            )


def _apply(connection: Connection[Any], migration: Migration) -> str:
    elapsed = stopwatch()

    def apply_and_record() -> None:
        run_script(connection, migration.title, migration.up.sql)
        ledger.record_step(connection, migration, elapsed())

    if migration.up.transactional:
        in_transaction(connection, migration.title, apply_and_record)
    else:
        run_outside_transaction(connection, migration.title, migration.up)
        ledger.record_step(connection, migration, elapsed())
    return f"applied {migration.title}"


def _apply_repeatables(connection: Connection[Any], files: SchemaFiles) -> list[str]:
    changed = repeatables.changed_files(connection, files)
    if not changed:
        return []
    title = "functions, views, roles and comments"
    kept = in_transaction(connection, title, lambda: repeatables.apply_all(connection, files))
    return [
        f"applied {title} ({sum(not file.name.startswith('triggers/') for file in files.repeatables)} files)",
        *(f"kept obsolete {signature}: something still uses it" for signature in kept),
    ]


def _way_down(step: Applied, files: SchemaFiles) -> str:
    own = files.migrations[step.version - 1] if step.version <= files.version else None
    down = own.down.sql if own and own.down else step.down_sql
    if down is None:
        raise MigrationError(
            f"migration {step.title} cannot be undone: it has no way down", hint="Restore a backup instead."
        )
    return down


def _undo(connection: Connection[Any], step: Applied, down: str) -> str:
    title = f"{step.title} (down)"
    way = script(down)

    def undo_and_forget() -> None:
        run_script(connection, title, way.sql)
        ledger.forget_step(connection, step.version)

    if way.transactional:
        in_transaction(connection, title, undo_and_forget)
    else:
        run_outside_transaction(connection, title, way)
        ledger.forget_step(connection, step.version)
    return f"undid {step.title}"


def _step_status(migration: Migration | None, step: Applied | None) -> StepStatus:
    if step is None:
        assert migration is not None
        return StepStatus(migration.version, migration.title, "pending")
    state: State = "applied"
    if migration is None:
        state = "unknown"
    elif migration.checksum != step.checksum:
        state = "edited"
    return StepStatus(step.version, step.title, state, step.applied_at, step.applied_by, step.duration)
