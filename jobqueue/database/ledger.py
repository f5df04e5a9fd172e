"""What the database remembers about its schema: `schema_migration` (steps) and `schema_object` (repeatable files)."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg import Connection

from jobqueue.database.schema_files import Migration, Repeatable

# Beside the files: with which step they were last applied, since new tables need the grants of roles.sql too.
VERSION_ROW = "migrations"

CREATE_LEDGER = """\
create table jobqueue.schema_migration (
    version int primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default clock_timestamp(),
    applied_by text not null default session_user,
    duration interval,
    down_sql text
);
comment on table jobqueue.schema_migration is 'Steps of the schema that were applied; the highest is its version.';
comment on column jobqueue.schema_migration.checksum is 'SHA-256 of the step: an edited one is refused.';
comment on column jobqueue.schema_migration.duration is 'How long it took; null if another tool applied it.';
comment on column jobqueue.schema_migration.down_sql is 'How to undo it, for a program that does not know the step.';
create table jobqueue.schema_object (
    name text primary key,
    checksum text not null,
    routines text[] not null default '{}',
    applied_at timestamptz not null default clock_timestamp()
);
comment on table jobqueue.schema_object is 'Files of functions, views, roles and comments as they were last applied.';
comment on column jobqueue.schema_object.routines is 'Names of the functions that the file creates.';
"""

CREATE_SCHEMA = "create schema if not exists jobqueue;\n"

# Restrict, not cascade: what somebody else put into the schema is not ours to delete.
DROP_LEDGER = """\
drop table jobqueue.schema_object, jobqueue.schema_migration;
do $jobqueue$
begin
    drop schema jobqueue;
exception when dependent_objects_still_exist then
    raise notice 'schema jobqueue holds objects that jobqueue did not make: it stays';
end
$jobqueue$;
"""


@dataclass(frozen=True, slots=True)
class Applied:
    """One row of `schema_migration`."""

    version: int
    name: str
    checksum: str
    applied_at: datetime
    applied_by: str
    duration: timedelta | None
    down_sql: str | None

    @property
    def title(self) -> str:
        """Its name with the number, as the files are called."""
        return f"{self.version:04d}_{self.name}"


def exists(connection: Connection[Any]) -> bool:
    """Whether the ledger is there."""
    return _value(connection, "select to_regclass('jobqueue.schema_migration') is not null") is True


def create(connection: Connection[Any]) -> None:
    """Create schema and ledger where they are missing."""
    if exists(connection):
        return
    with connection.transaction():
        # `if not exists` alone asks for CREATE on the database even if an administrator made the schema beforehand.
        if _value(connection, "select to_regnamespace('jobqueue') is null"):
            connection.execute(CREATE_SCHEMA.encode())
        connection.execute(CREATE_LEDGER.encode())


def applied_steps(connection: Connection[Any]) -> list[Applied]:
    """The applied steps, oldest first; none if there is no ledger."""
    if not exists(connection):
        return []
    rows = connection.execute(
        "select version, name, checksum, applied_at, applied_by, duration, down_sql"
        " from jobqueue.schema_migration order by version"
    )
    return [Applied(*row) for row in rows]


def record_step(connection: Connection[Any], migration: Migration, duration: timedelta) -> None:
    """Note that a step was applied."""
    connection.execute(
        "insert into jobqueue.schema_migration (version, name, checksum, duration, down_sql)"
        " values (%s, %s, %s, %s, %s)",
        (
            migration.version,
            migration.name,
            migration.checksum,
            duration,
            migration.down.sql if migration.down else None,
        ),
    )


def forget_step(connection: Connection[Any], version: int) -> None:
    """Note that a step was undone."""
    connection.execute("delete from jobqueue.schema_migration where version = %s", (version,))


def applied_files(connection: Connection[Any]) -> dict[str, str]:
    """Name and checksum of the repeatable files as last applied."""
    if not exists(connection):
        return {}
    return dict(connection.execute("select name, checksum from jobqueue.schema_object").fetchall())


def applied_routines(connection: Connection[Any]) -> list[str]:
    """Names of the routines that the repeatable files made."""
    rows = connection.execute("select distinct unnest(routines) from jobqueue.schema_object order by 1")
    return [name for (name,) in rows]


def record_files(connection: Connection[Any], repeatables: Iterable[Repeatable], version: int) -> None:
    """Note that exactly these repeatable files are applied, on top of this version."""
    connection.execute("delete from jobqueue.schema_object")
    rows = [(file.name, file.checksum, list(file.routines)) for file in repeatables]
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into jobqueue.schema_object (name, checksum, routines) values (%s, %s, %s)",
            [*rows, (VERSION_ROW, str(version), [])],
        )


def forget_files(connection: Connection[Any]) -> None:
    """Note that no repeatable file is applied."""
    connection.execute("delete from jobqueue.schema_object")


def expected_files(repeatables: Iterable[Repeatable], version: int) -> dict[str, str]:
    """What `applied_files` returns once these files are applied on top of this version."""
    return {**{file.name: file.checksum for file in repeatables}, VERSION_ROW: str(version)}


def _value(connection: Connection[Any], query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None
