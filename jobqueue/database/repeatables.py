"""Functions, views, roles and comments: re-applied all together, in one transaction, whenever one of them changed.

Programs go on working meanwhile, and what is locked stays locked until the end. So what nobody waits for goes first, and
what takes long (the functions, their grants); then comes what differs among the views and triggers that there are, which
takes a lock that readers or writers wait for, and at the end the comments. Functions and views are replaced in place;
views are dropped before only if Postgres demands it. What the files do not create any more goes as well.
"""

import re
from collections.abc import Iterable
from typing import Any

from psycopg import Connection, errors

from jobqueue.database import ledger
from jobqueue.database.schema_files import Repeatable, SchemaFiles
from jobqueue.database.steps import run_script
from jobqueue.errors import MigrationError

_VIEW = re.compile(r"\bcreate\s+or\s+replace\s+view\s+jobqueue\.(\w+)", re.IGNORECASE)

# Somebody's own views may stand on ours: then ours are replaced in place, which allows more columns at the end only.
DROP_VIEWS = """\
do $jobqueue$
declare
    _views text;
begin
    select string_agg(format('%I.%I', n.nspname, c.relname), ', ' order by c.relname)
    into _views
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'jobqueue' and c.relkind = 'v';
    if _views is not null then
        execute 'drop view ' || _views;
    end if;
exception when dependent_objects_still_exist then
    raise notice 'other views stand on those of jobqueue, which are replaced in place';
end
$jobqueue$;
"""

# Never cascade: a policy or a default that uses a function must not vanish with it. Such a function stays.
_DROP_ROUTINES = """\
do $jobqueue$
declare
    _routine text;
    _dropped bool;
begin
    loop
        _dropped := false;
        for _routine in
            select format('%I.%I(%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid))
            from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
            where n.nspname = 'jobqueue' and {which}
            order by 1
        loop
            begin
                execute 'drop routine ' || _routine;
                _dropped := true;
            exception when dependent_objects_still_exist then
                null;
            end;
        end loop;
        exit when not _dropped;
    end loop;
end
$jobqueue$;
"""

_DROP_TRIGGERS = """\
do $jobqueue$
declare
    _trigger text;
begin
    for _trigger in
        select format('drop trigger %I on %s', t.tgname, t.tgrelid::regclass)
        from pg_catalog.pg_trigger t
        join pg_catalog.pg_proc p on p.oid = t.tgfoid
        join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'jobqueue' and not t.tgisinternal and p.proname = any ({names})
        order by 1
    loop
        execute _trigger;
    end loop;
end
$jobqueue$;
"""


def changed_files(connection: Connection[Any], files: SchemaFiles) -> list[str]:
    """Names of the files that are new, changed or gone since they were last applied; empty: nothing to do."""
    now, then = ledger.expected_files(files.repeatables, files.version), ledger.applied_files(connection)
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def apply_all(connection: Connection[Any], files: SchemaFiles) -> list[str]:
    """Apply every repeatable file; the caller has opened the transaction.

    Returns the signatures of obsolete routines that had to stay because something uses them.
    """
    connection.execute("set local check_function_bodies = off")
    managed = {*ledger.applied_routines(connection), *(name for file in files.repeatables for name in file.routines)}
    before, applied = _routine_rows(connection), ledger.applied_files(connection)
    views = Views(connection, files.repeatables)
    for file in _of(files, "functions/"):
        _apply(connection, file, views)
    views.apply(views.with_missing())
    # Before roles.sql: what it grants on all functions touches the obsolete ones too.
    stale = _untouched(connection, before, managed)
    for file in _of(files, "roles.sql"):
        _apply(connection, file, views)
    views.apply([file for file in _of(files, "views/") if applied.get(file.name) != file.checksum])
    for file in _of(files, "triggers/"):
        if applied.get(file.name) != file.checksum or not _has_trigger(connection, file):
            _apply(connection, file, views)
    connection.execute(drop_routines_by_oid(stale).encode())
    if views.dropped:
        # Their grants went with them.
        for file in _of(files, "roles.sql"):
            _apply(connection, file, views)
    for file in _of(files, "comments"):
        _apply(connection, file, views)
    ledger.record_files(connection, files.repeatables, files.version)
    rows = connection.execute("select oid::regprocedure::text from pg_catalog.pg_proc where oid = any (%s)", (stale,))
    return sorted(signature for (signature,) in rows)


class Views:
    """The views of the files, and those of the database."""

    def __init__(self, connection: Connection[Any], repeatables: Iterable[Repeatable]) -> None:
        self._connection = connection
        self._files = [file for file in repeatables if file.name.startswith("views/")]
        self._done: set[str] = set()
        self.dropped = False
        """Whether they had to be dropped, because Postgres could not replace one in place."""
        if self._present() - {name for file in self._files for name in _view_names(file)}:
            self.drop()

    def with_missing(self) -> list[Repeatable]:
        """The files with a view that the database lacks."""
        present = self._present()
        return [file for file in self._files if not present.issuperset(_view_names(file))]

    def apply(self, files: Iterable[Repeatable]) -> None:
        """Create or replace the views of these files, unless that is done already."""
        for file in files:
            if file.name in self._done:
                continue
            try:
                with self._connection.transaction():
                    run_script(self._connection, file.name, file.sql)
            except errors.InvalidTableDefinition as error:
                # Other columns cannot replace the old ones in place.
                if self.dropped:
                    raise MigrationError(
                        f"{file.name}: {error.diag.message_primary}, and something still uses the old view",
                        hint="Drop what uses the view, and create it again afterwards.",
                    ) from error
                self.drop()
                self.apply(self._files)
                return
            self._done.add(file.name)

    def drop(self) -> None:
        """Drop all views on which nothing of others stands."""
        self.dropped = True
        self._done.clear()
        self._connection.execute(DROP_VIEWS.encode())

    def _present(self) -> set[str]:
        rows = self._connection.execute(
            "select relname from pg_catalog.pg_class where relkind = 'v' and relnamespace = 'jobqueue'::regnamespace"
        )
        return {name for (name,) in rows}


def _of(files: SchemaFiles, kind: str) -> list[Repeatable]:
    return [file for file in files.repeatables if file.name.startswith(kind)]


def _view_names(file: Repeatable) -> list[str]:
    return _VIEW.findall(file.sql)


def _has_trigger(connection: Connection[Any], file: Repeatable) -> bool:
    name = file.name.removeprefix("triggers/")
    return connection.execute("select from pg_catalog.pg_trigger where tgname = %s", (name,)).fetchone() is not None


def remove_all(connection: Connection[Any]) -> None:
    """Drop views, triggers and functions that the files made; the caller has opened the transaction."""
    connection.execute(removal_sql(ledger.applied_routines(connection)).encode())
    ledger.forget_files(connection)


def removal_sql(routines: Iterable[str]) -> str:
    """The statements that drop all views, and these routines with their triggers."""
    names = _literals(routines, "text")
    return (
        DROP_VIEWS
        + _DROP_TRIGGERS.replace("{names}", names)
        + _DROP_ROUTINES.replace("{which}", f"p.proname = any ({names})")
    )


def drop_routines_by_oid(oids: Iterable[int]) -> str:
    """The statement that drops these routines, as far as nothing uses them."""
    return _DROP_ROUTINES.replace("{which}", f"p.oid = any ({_literals(map(str, oids), 'oid')})")


def _apply(connection: Connection[Any], file: Repeatable, views: Views) -> None:
    try:
        with connection.transaction():
            run_script(connection, file.name, file.sql)
    except errors.InvalidFunctionDefinition:
        # Another return type or parameter name cannot replace the old one in place.
        _drop_routines_of(connection, file)
        _apply_again(connection, file, views)


def _apply_again(connection: Connection[Any], file: Repeatable, views: Views) -> None:
    try:
        with connection.transaction():
            run_script(connection, file.name, file.sql)
    except errors.InvalidFunctionDefinition as error:
        if not views.dropped:
            # It may be one of our own views that uses it.
            views.drop()
            _drop_routines_of(connection, file)
            _apply_again(connection, file, views)
            return
        raise MigrationError(
            f"{file.name}: {error.diag.message_primary}, and something still uses the old function",
            hint="Give the new function another name, or drop what uses the old one in a migration.",
        ) from error


def _drop_routines_of(connection: Connection[Any], file: Repeatable) -> None:
    names = _literals(file.routines, "text")
    connection.execute(_DROP_ROUTINES.replace("{which}", f"p.proname = any ({names})").encode())


def _routine_rows(connection: Connection[Any]) -> dict[int, tuple[str, str]]:
    rows = connection.execute(
        "select oid, proname, xmin::text from pg_catalog.pg_proc where pronamespace = 'jobqueue'::regnamespace"
    )
    return {oid: (name, xmin) for oid, name, xmin in rows}


def _untouched(connection: Connection[Any], before: dict[int, tuple[str, str]], managed: set[str]) -> list[int]:
    """Routines of ours that no file has created again: their catalogue rows still have the old xmin.

    Comparing names would miss the old overload of a function whose parameters have changed.
    """
    after = _routine_rows(connection)
    return sorted(oid for oid, row in before.items() if after.get(oid) == row and row[0] in managed)


def _literals(values: Iterable[str], element: str) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"array[{quoted}]::{element}[]"
