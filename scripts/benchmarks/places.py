"""Where a benchmark runs: a server with default durability, and a fresh database for every measurement."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from jobqueue.database.binaries import find_binaries, server_account
from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.ephemeral import make_ephemeral_home, sweep_ephemeral_homes
from jobqueue.database.migrations import migrate_up

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "max_connections": "200",
}
"""Durability as installed; the rest as in the figures of other queues that these are compared with."""
STATEMENTS = {"shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "top"}
"""Only where statements are counted: it costs a few per cent."""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Place:
    """A server to measure on. `dsn`: its maintenance database; `template`: a database that holds the schema."""

    dsn: str
    template: str

    @contextmanager
    def database(self) -> Iterator[str]:
        """Yield the DSN of a new database with the schema; it is dropped afterwards."""
        name = f"bench_{secrets.token_hex(6)}"
        _execute(self.dsn, _create(name, self.template))
        try:
            yield make_conninfo(self.dsn, dbname=name)
        finally:
            _execute(self.dsn, _drop(name))


@contextmanager
def open_place(dsn: str | None, *, statements: bool = False) -> Iterator[Place]:
    """Yield the server that `dsn` names, or an ephemeral one of our own.

    `statements`: load pg_stat_statements. A server that is named must have it loaded itself, and its role must be
    allowed to create databases.
    """
    if dsn is not None:
        with _template(dsn) as place:
            yield place
        return
    sweep_ephemeral_homes()
    settings = SETTINGS | (STATEMENTS if statements else {})
    server = EmbeddedServer(make_ephemeral_home(), ephemeral=True, settings=settings)
    own = server.start()
    try:
        with _template(own) as place:
            yield place
    finally:
        server.stop()


def connect(dsn: str) -> Connection:
    """Return an autocommit connection whose statements are prepared at their second use."""
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=1, application_name="bench")


def value(connection: Connection, query: str, parameters: tuple[Any, ...] = ()) -> Any:
    """Return the only value of a query."""
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def describe_server(dsn: str) -> dict[str, str]:
    """Return what decides about the figures: version, durability, memory."""
    with connect(dsn) as connection:
        names = ["server_version", *SETTINGS]
        return {name: str(value(connection, "select current_setting(%s)", (name,))) for name in names}


def program(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs, such as pgbench. Raises FileNotFoundError."""
    path = find_binaries(None, server_account(Path("/nonexistent"))).bin_dir / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {path.parent}")
    return path


@contextmanager
def _template(dsn: str) -> Iterator[Place]:
    name = f"bench_template_{secrets.token_hex(6)}"
    _execute(dsn, _create(name, "template0"))
    try:
        migrate_up(make_conninfo(dsn, dbname=name))
        yield Place(dsn, name)
    finally:
        _execute(dsn, _drop(name))


def _create(name: str, template: str) -> sql.Composed:
    return sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))


def _drop(name: str) -> sql.Composed:
    return sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))


def _execute(dsn: str, statement: sql.Composed) -> None:
    with connect(dsn) as connection:
        connection.execute(statement)
