"""Fixtures of every test that needs PostgreSQL: a real server per session, one database for one test at a time."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.parentage import die_with_parent
from tests.support.databases import Databases
from tests.support.server import TEMPLATE, make_template, session_server, temporary_database


def pytest_configure() -> None:
    """A worker of pytest-xdist dies with a killed pytest, and its server with it; else both would finish the test."""
    if "PYTEST_XDIST_WORKER" in os.environ and (
        arm := die_with_parent(parent=os.getppid(), with_signal=signal.SIGKILL)
    ):
        arm()


def pytest_collection_finish() -> None:
    """What has been imported and collected stays to the end: no collection of garbage needs to look at it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The session's ephemeral server (with pytest-xdist: each worker's). `JOBQUEUE_TEST_PG_BIN` selects its version."""
    with session_server() as running:
        yield running


@pytest.fixture(scope="session")
def template(server: EmbeddedServer) -> str:
    """The name of a database that has been migrated once."""
    make_template(server.dsn)
    return TEMPLATE


@pytest.fixture(scope="session")
def databases(server: EmbeddedServer, template: str) -> Iterator[Databases]:
    """The copies of the template that no test uses at the moment."""
    copies = Databases(server.dsn, template)
    yield copies
    copies.close_sessions()


@pytest.fixture
def dsn(databases: Databases, request: pytest.FixtureRequest) -> Iterator[str]:
    """The conninfo of a database with the schema that is as if it were new. Nobody is connected to it but `connection`."""
    with databases.lend(with_session="connection" in request.fixturenames) as conninfo:
        yield conninfo


@pytest.fixture
def empty_dsn(server: EmbeddedServer) -> Iterator[str]:
    """The conninfo of a new database without the schema."""
    with temporary_database(server.dsn, "template0") as conninfo:
        yield conninfo


@pytest.fixture
def connection(dsn: str, databases: Databases) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """An autocommit connection to the test's database, as if it were new; rows are tuples."""
    with databases.session(dsn) as opened:
        yield opened


@pytest.fixture
async def aconnection(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
    """The same, asynchronous."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as opened:
        yield opened
