"""Databases for tests: a copy of the migrated template, emptied and used again as long as nobody has changed its schema.

A copy costs 150 to 500 ms and dropping it 120 ms more, which is most of what a test of the engine would take; emptying the
tables that were written costs a tenth of that. What cannot be undone by emptying tables is noticed and ends the
database's use: any change of a catalog (tables, functions, triggers, comments, settings, …) and statistics of the planner.

The session that empties a database can be lent with it and is used again, too. What it has cached of catalogs and
functions halves what a short test costs the server: 13 ms instead of 21 to empty, and 8 ms less for the first send.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

Connection = psycopg.Connection[tuple[Any, ...]]

# Without a time to wait: the server would look again only after 100 ms, which is four times what all the rest takes.
END_OTHERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
"""
CATALOGS = (
    *("pg_class", "pg_attribute", "pg_attrdef", "pg_proc", "pg_trigger", "pg_constraint", "pg_index", "pg_policy"),
    *(
        "pg_rewrite",
        "pg_type",
        "pg_namespace",
        "pg_extension",
        "pg_description",
        "pg_default_acl",
        "pg_db_role_setting",
    ),
    *("pg_depend", "pg_event_trigger", "pg_statistic_ext", "pg_publication", "pg_largeobject_metadata"),
)
# A new version of a row has a new xmin, and a row that is gone is missing from the count. Ages are compared, as ids of
# transactions have no order: to turn each into a number took 9 ms for all catalogs, this takes 3.
CATALOG_STATE = " union all ".join(
    f"select '{name}', count(*), count(*) filter (where age(xmin) <= age(%(since)s::xid)) from pg_catalog.{name}"  # noqa: S608
    + (" where setdatabase in (0, (select oid from pg_database where datname = current_database()))"
       if name == "pg_db_role_setting" else "")
    for name in CATALOGS
)  # fmt: skip
# Of `discard all` all but `discard plans`: what a plan depends on invalidates it.
RESET_SESSION = """
    close all;
    set session authorization default;
    reset all;
    deallocate all;
    unlisten *;
    select pg_advisory_unlock_all();
    discard sequences;
    discard temp
"""
# A setting of this kind has no value in a new session, and cannot get back there.
SETTINGS_UNTOUCHED = """
    select current_setting('jobqueue.tenants', true) is null and current_setting('jobqueue.actor', true) is null
"""
NEXT_TRANSACTION = "select pg_snapshot_xmax(pg_current_snapshot())::text"
STATISTICS = """
    select count(*) from pg_statistic s join pg_class c on c.oid = s.starelid
    where c.relnamespace = 'jobqueue'::regnamespace
"""
TABLES = """
    select c.relname, c.oid, pg_relation_size(c.oid) > 0
    from pg_class c where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'r' order by c.relname
"""
SEQUENCES = """
    select c.relname from pg_class c where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'S' order by c.relname
"""
SET_SEQUENCES = """
    select setval(format('jobqueue.%%I', name)::regclass, last, called)
    from unnest(%s::text[], %s::bigint[], %s::boolean[]) as state (name, last, called)
"""
COLUMNS = (
    "select attname from pg_attribute where attrelid = %s and attnum > 0 and not attisdropped and attgenerated = ''"
)


@dataclass(slots=True)
class Database:
    """One database and what it was like when it was new."""

    name: str
    conninfo: str
    since: str
    """The transaction from which on nobody but a test can have changed a catalog."""
    catalogs: list[tuple[Any, ...]]
    """Rows of each catalog, and those written since then: none."""
    content: dict[str, str]
    """Rows of the tables that are not empty when new, as a JSON array."""
    sequences: dict[str, tuple[int, bool]]
    session: Connection | None = None
    """What empties it, if that is open."""

    def open_session(self) -> Connection:
        """The open session, as if it were new; another one if that cannot be."""
        if self.session is not None and not _reset(self.session):
            self.close_session()
        if self.session is None:
            self.session = _open(self.conninfo)
        return self.session

    def close_session(self) -> None:
        """Close the session, so that nobody but the test is connected."""
        if self.session is not None:
            self.session.close()
            self.session = None


@dataclass(slots=True)
class Databases:
    """The databases of one server.

    Args:
        server_dsn: a superuser's conninfo.
        template: the database to copy.
        reuse: False makes a copy for every test: for templates with tables outside of the schema jobqueue, which
            nobody would empty.
    """

    server_dsn: str
    template: str
    reuse: bool = True
    _used: list[Database] = field(default_factory=list)
    _lent: dict[str, Database] = field(default_factory=dict)

    @contextmanager
    def lend(self, *, with_session: bool = False) -> Iterator[str]:
        """A database as new; yields its conninfo.

        `with_session`: stay connected to it, for `session`; by default nobody is.
        """
        database = self._emptied() or self._new()
        if with_session:
            database.open_session()
        else:
            database.close_session()
        self._lent[database.conninfo] = database
        try:
            yield database.conninfo
        finally:
            del self._lent[database.conninfo]
            if self.reuse:
                self._used.append(database)
            else:
                self._drop(database)

    @contextmanager
    def session(self, conninfo: str) -> Iterator[Connection]:
        """An autocommit connection to a database: the open session of one that was lent with it, which may be closed and
        broken like any other; else a new one."""
        lent = self._lent.get(conninfo)
        if lent is None or lent.session is None:
            with _open(conninfo) as connection:
                yield connection
        else:
            yield lent.session

    def drop_all(self) -> None:
        """Drop the databases that nobody uses: at the end of a session on a server that stays."""
        while self._used:
            self._drop(self._used.pop())

    def close_sessions(self) -> None:
        """Close what is open to the databases that nobody uses: at the end of a session on a server that ends."""
        for database in self._used:
            database.close_session()

    def _emptied(self) -> Database | None:
        while self._used:
            database = self._used.pop(0)
            with suppress(psycopg.OperationalError):
                connection = database.open_session()
                _end_others(connection)
                if _schema_untouched(connection, database):
                    _empty(connection, database)
                    return database
            self._drop(database)
        return None

    def _drop(self, database: Database) -> None:
        database.close_session()
        drop_database(self.server_dsn, database.name)

    def _new(self) -> Database:
        name = create_database(self.server_dsn, self.template)
        conninfo = make_conninfo(self.server_dsn, dbname=name)
        with _open(conninfo) as connection:
            content = {table: _content(connection, table) for table, _, written in _rows(connection, TABLES) if written}
            sequences = {only: _sequence(connection, only) for (only,) in _rows(connection, SEQUENCES)}
            since = _next_transaction(connection)
            return Database(name, conninfo, since, _catalogs(connection, since), content, sequences)


def create_database(server_dsn: str, template: str) -> str:
    """Copy a database nobody is connected to; returns the name of the copy."""
    name = f"t_{secrets.token_hex(6)}"
    with _open(server_dsn) as connection:
        connection.execute(
            sql.SQL("create database {} template {} strategy file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    return name


def drop_database(server_dsn: str, name: str) -> None:
    """Drop a database even if something is still connected to it."""
    with _open(server_dsn) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def _open(conninfo: str) -> Connection:
    return psycopg.connect(conninfo, autocommit=True)


def _reset(session: Connection) -> bool:
    """Make a session as new on both sides; false if it cannot be."""
    if session.closed or session.pgconn.transaction_status != TransactionStatus.IDLE:
        return False
    # On our side: what was set and registered, statements that were prepared, notifications that nobody took.
    psycopg.Connection.__init__(session, session.pgconn)
    try:
        session.autocommit = True
        session.execute(RESET_SESSION.encode())
        while session.pgconn.notifies() is not None:
            pass
        return _rows(session, SETTINGS_UNTOUCHED) == [(True,)]
    except psycopg.OperationalError:
        return False


def _rows(connection: Connection, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    return connection.execute(query.encode(), parameters or None).fetchall()


def _end_others(connection: Connection) -> None:
    deadline = time.monotonic() + 5
    while _rows(connection, END_OTHERS) and time.monotonic() < deadline:
        time.sleep(0.001)


def _next_transaction(connection: Connection) -> str:
    ((xid,),) = _rows(connection, NEXT_TRANSACTION)
    # An id as catalogs have it: 32 bits of the 64.
    return str(int(xid) % 2**32)


def _catalogs(connection: Connection, since: str) -> list[tuple[Any, ...]]:
    return connection.execute(CATALOG_STATE.encode(), {"since": since}).fetchall()


def _schema_untouched(connection: Connection, database: Database) -> bool:
    return _rows(connection, STATISTICS) == [(0,)] and _catalogs(connection, database.since) == database.catalogs


def _empty(connection: Connection, database: Database) -> None:
    """Make the content what it was; the new files of truncated tables are the new state of the catalogs."""
    written = [
        (table, oid)
        for table, oid, has_pages in _rows(connection, TABLES)
        if (_content(connection, table) != database.content[table] if table in database.content else has_pages)
    ]
    with connection.transaction():
        if written:
            names = sql.SQL(", ").join(sql.Identifier("jobqueue", table) for table, _ in written)
            connection.execute(sql.SQL("truncate {}").format(names))
        for table, oid in written:
            if table in database.content:
                _refill(connection, table, oid, database.content[table])
        states = [(name, last, called) for name, (last, called) in database.sequences.items()]
        connection.execute(SET_SEQUENCES.encode(), [list(column) for column in zip(*states, strict=True)])
    connection.execute("select pg_stat_reset()")
    database.since = _next_transaction(connection)


def _refill(connection: Connection, table: str, oid: int, content: str) -> None:
    columns = sql.SQL(", ").join(sql.Identifier(name) for (name,) in _rows(connection, COLUMNS, oid))
    statement = sql.SQL(
        "insert into {table} ({columns}) overriding system value"
        " select {columns} from jsonb_populate_recordset(null::{table}, %s::jsonb)"
    ).format(table=sql.Identifier("jobqueue", table), columns=columns)
    connection.execute(statement, [content])


def _content(connection: Connection, table: str) -> str:
    query = sql.SQL("select coalesce(jsonb_agg(to_jsonb(t) order by to_jsonb(t)), '[]')::text from {} t")
    row = connection.execute(query.format(sql.Identifier("jobqueue", table))).fetchone()
    assert row is not None
    return str(row[0])


def _sequence(connection: Connection, name: str) -> tuple[int, bool]:
    query = sql.SQL("select last_value, is_called from {}").format(sql.Identifier("jobqueue", name))
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0], row[1]
