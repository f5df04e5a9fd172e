"""The migrations as one text, for `jobqueue migrate sql` and for the host application's own migration tool."""

# The text is made of the package's own files, quoted; nothing of it comes from outside.
# ruff: noqa: S608

from collections.abc import Iterator
from importlib.resources.abc import Traversable

from jobqueue.database import ledger, repeatables
from jobqueue.database.schema_files import Migration, SchemaFiles, Script, load_files
from jobqueue.database.steps import LOCK_TIMEOUT
from jobqueue.errors import InvalidArgument, MigrationError

_SETTINGS = f"set local search_path = jobqueue, pg_temp;\nset local lock_timeout = '{LOCK_TIMEOUT}';\n"


def sql_text(
    from_version: int = 0,
    to_version: int | None = None,
    down: bool = False,
    *,
    transactions: bool = True,
    source: Traversable | None = None,
) -> str:
    """Return the SQL between two versions, ledger rows included; the same input gives the same text.

    `to_version` defaults to the newest, or to 0 with `down`. `transactions`: with `begin` and `commit` (default), as
    psql needs it; without, for a tool that opens its own transaction (Alembic's `op.execute`, Django's `RunSQL`).
    Steps marked `tx=no` must run outside a transaction in any case.
    Raises InvalidArgument for versions that do not exist or are in the wrong order, MigrationError if a step has no way
    down.
    """
    files = load_files(source)
    goal = (0 if down else files.version) if to_version is None else to_version
    _check_range(from_version, goal, files.version, down)
    parts = _down_parts(files, from_version, goal) if down else _up_parts(files, from_version, goal)
    header = f"-- jobqueue: schema version {from_version} to {goal}\n"
    return "\n".join([header, *(_wrapped(title, script, transactions) for title, script in parts)])


def _check_range(start: int, goal: int, newest: int, down: bool) -> None:
    low, high = (goal, start) if down else (start, goal)
    if not 0 <= low <= high <= newest:
        way = "down" if down else "up"
        raise InvalidArgument(f"there is no way {way} from version {start} to {goal}: versions go from 0 to {newest}")


def _up_parts(files: SchemaFiles, start: int, goal: int) -> Iterator[tuple[str, Script]]:
    if start == 0 and goal > 0:
        yield "ledger", Script(ledger.CREATE_SCHEMA + ledger.CREATE_LEDGER, transactional=True)
    for migration in files.migrations[start:goal]:
        yield migration.title, Script(_ended(migration.up.sql) + _record(migration), migration.up.transactional)
    if goal == files.version and goal > 0:
        yield "functions, views, roles and comments", Script(_repeatables(files), transactional=True)


def _down_parts(files: SchemaFiles, start: int, goal: int) -> Iterator[tuple[str, Script]]:
    routines = sorted({name for file in files.repeatables for name in file.routines})
    if start > goal:
        removal = repeatables.removal_sql(routines) + "delete from jobqueue.schema_object;\n"
        yield "functions and views", Script(removal, transactional=True)
    for migration in reversed(files.migrations[goal:start]):
        if migration.down is None:
            raise MigrationError(f"migration {migration.title} cannot be undone: it has no way down")
        forget = f"delete from jobqueue.schema_migration where version = {migration.version};\n"
        yield f"{migration.title} (down)", Script(_ended(migration.down.sql) + forget, migration.down.transactional)
    if goal == 0 and start > 0:
        yield "ledger", Script(ledger.DROP_LEDGER, transactional=True)


def _repeatables(files: SchemaFiles) -> str:
    rows = [(file.name, file.checksum, "{" + ",".join(file.routines) + "}") for file in files.repeatables]
    rows.append((ledger.VERSION_ROW, str(files.version), "{}"))
    insert = "insert into jobqueue.schema_object (name, checksum, routines) values\n"
    values = ",\n".join(f"    ({', '.join(map(_quote, row))})" for row in rows)
    return (
        "set local check_function_bodies = off;\n"
        + repeatables.DROP_VIEWS
        + "".join(f"-- {file.name}\n{_ended(file.sql)}" for file in files.repeatables)
        + "delete from jobqueue.schema_object;\n"
        + insert
        + values
        + ";\n"
    )


def _record(migration: Migration) -> str:
    down = _quote(migration.down.sql) if migration.down else "null"
    values = ", ".join((str(migration.version), _quote(migration.name), _quote(migration.checksum), down))
    return "insert into jobqueue.schema_migration (version, name, checksum, down_sql) values\n    (" + values + ");\n"


def _wrapped(title: str, script: Script, transactions: bool) -> str:
    if not script.transactional:
        return f"-- {title}: outside a transaction\n{script.sql}"
    body = _SETTINGS + script.sql
    return f"-- {title}\n" + (f"begin;\n{body}commit;\n" if transactions else body)


def _ended(sql: str) -> str:
    """A script that another may follow: closed by a semicolon, unless a comment or one ends it already."""
    text = sql.rstrip()
    last_line = text.rpartition("\n")[2]
    return text + "\n" if text.endswith(";") and "--" not in last_line else text + "\n;\n"


def _quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
