"""One ephemeral server for the test session, a migrated template database, and a copy of it for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from jobqueue.database.embedded import EmbeddedServer
from jobqueue.testing.servers import temporary_server
from tests.support.databases import create_database, drop_database

TEMPLATE = "base"


def chosen_binaries() -> Path | None:
    """The PostgreSQL under test: `JOBQUEUE_TEST_PG_BIN` selects one (15 to 18), else the launcher's own choice."""
    named = os.environ.get("JOBQUEUE_TEST_PG_BIN")
    return Path(named) if named else None


@contextmanager
def session_server() -> Iterator[EmbeddedServer]:
    """An ephemeral server; homes that killed sessions left behind are deleted first.

    `JOBQUEUE_TEST_SERVER`: the home of a running one, for a session that a test starts.
    """
    if home := os.environ.get("JOBQUEUE_TEST_SERVER"):
        yield EmbeddedServer(Path(home))
        return
    with temporary_server(chosen_binaries()) as server:
        yield server


def make_template(server_dsn: str) -> None:
    """Create the template database and migrate it; nobody may connect to it afterwards, or it could not be copied."""
    from jobqueue.database.migrations import migrate_up

    if "JOBQUEUE_TEST_SERVER" in os.environ:
        return
    execute(server_dsn, sql.SQL("create database {} template template0").format(sql.Identifier(TEMPLATE)))
    migrate_up(make_conninfo(server_dsn, dbname=TEMPLATE))
    execute(server_dsn, sql.SQL("alter database {} allow_connections false").format(sql.Identifier(TEMPLATE)))


@contextmanager
def temporary_database(server_dsn: str, template: str) -> Iterator[str]:
    """A database of its own, dropped at the end even if something is still connected to it; yields its conninfo."""
    name = create_database(server_dsn, template)
    try:
        yield make_conninfo(server_dsn, dbname=name)
    finally:
        drop_database(server_dsn, name)


def execute(dsn: str, statement: sql.Composed) -> None:
    """Run one statement on a connection of its own."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


def rows(
    connection: psycopg.Connection[tuple[Any, ...]], query: str, parameters: Sequence[Any] | dict[str, Any] = ()
) -> list[tuple[Any, ...]]:
    """All rows of a query, as tuples."""
    return connection.execute(query.encode(), parameters or None).fetchall()


def value(
    connection: psycopg.Connection[tuple[Any, ...]], query: str, parameters: Sequence[Any] | dict[str, Any] = ()
) -> Any:
    """The only value of a query that returns one row with one column."""
    ((only,),) = rows(connection, query, parameters)
    return only


async def arows(
    connection: psycopg.AsyncConnection[tuple[Any, ...]], query: str, parameters: Sequence[Any] | dict[str, Any] = ()
) -> list[tuple[Any, ...]]:
    """All rows of a query, as tuples."""
    return await (await connection.execute(query.encode(), parameters or None)).fetchall()
