"""The engines that a procrastinate application runs on: its own, the connector, and our worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from procrastinate.schema import SchemaManager
from psycopg import sql
from psycopg.conninfo import make_conninfo

from jobqueue.database.embedded import EmbeddedServer
from tests.procrastinate.engines import ConnectorEngine, Engine, NativeEngine, StockEngine
from tests.support.databases import drop_database

STOCK_DATABASE = "procrastinate_stock"
STOCK_TABLES = "procrastinate_events, procrastinate_periodic_defers, procrastinate_jobs, procrastinate_workers"


@pytest.fixture(scope="session")
def stock_database(server: EmbeddedServer) -> Iterator[str]:
    """A database with procrastinate's own schema, as the installed package has it."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(STOCK_DATABASE)))
    conninfo = make_conninfo(server.dsn, dbname=STOCK_DATABASE)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(SchemaManager.get_schema())
    yield conninfo
    drop_database(server.dsn, STOCK_DATABASE)


@pytest.fixture
def stock_dsn(stock_database: str) -> str:
    """The same, emptied."""
    with psycopg.connect(stock_database, autocommit=True) as connection:
        connection.execute(f"truncate {STOCK_TABLES} restart identity cascade".encode())
    return stock_database


@pytest.fixture
def engine_named(stock_database: str, request: pytest.FixtureRequest) -> Callable[[str], Engine]:
    """Make the engine `stock`, `connector` or `native` on an empty database."""

    def make(name: str) -> Engine:
        if name == "stock":
            return StockEngine(request.getfixturevalue("stock_dsn"))
        kind = ConnectorEngine if name == "connector" else NativeEngine
        return kind(request.getfixturevalue("dsn"))

    return make
