"""Every connection that an application may have, with what it takes to begin, commit and roll back on it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from tests.integrations.django_project import database, set_up

Insert = "insert into public.note values ('written by the application')"


def url_of(dsn: str, driver: str) -> str:
    """SQLAlchemy's URL of a server that listens on a socket."""
    given = conninfo_to_dict(dsn)
    return f"postgresql+{driver}://{given.get('user', '')}@/{given['dbname']}?host={given['host']}&port={given['port']}"


@contextlib.asynccontextmanager
async def psycopg_async(dsn: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection


@contextlib.asynccontextmanager
async def asyncpg_connection(dsn: str) -> AsyncIterator[Any]:
    given = conninfo_to_dict(dsn)
    async with asyncpg.create_pool(
        host=given["host"],
        port=int(str(given["port"])),
        user=given["user"],
        database=given["dbname"],
        min_size=1,
        max_size=1,
    ) as pool:
        async with pool.acquire() as connection:
            yield connection


def sqlalchemy_async(driver: str, kind: str) -> Any:
    @contextlib.asynccontextmanager
    async def open_it(dsn: str) -> AsyncIterator[Any]:
        engine = create_async_engine(url_of(dsn, driver))
        try:
            async with AsyncSession(engine) if kind == "session" else engine.connect() as given:
                yield given
        finally:
            await engine.dispose()

    return open_it


@contextlib.contextmanager
def psycopg_blocking(dsn: str) -> Iterator[Any]:
    with psycopg.connect(dsn) as connection:
        yield connection


def sqlalchemy_blocking(kind: str) -> Any:
    @contextlib.contextmanager
    def open_it(dsn: str) -> Iterator[Any]:
        engine = create_engine(url_of(dsn, "psycopg"))
        try:
            with Session(engine) if kind == "session" else engine.connect() as given:
                yield given
        finally:
            engine.dispose()

    return open_it


@contextlib.contextmanager
def django_connection(dsn: str) -> Iterator[Any]:
    set_up()
    from django.db import connection

    with database(dsn):
        yield connection


ASYNC = {
    "psycopg": psycopg_async,
    "asyncpg": asyncpg_connection,
    "SQLAlchemy AsyncSession, psycopg": sqlalchemy_async("psycopg", "session"),
    "SQLAlchemy AsyncSession, asyncpg": sqlalchemy_async("asyncpg", "session"),
    "SQLAlchemy AsyncConnection, psycopg": sqlalchemy_async("psycopg", "connection"),
    "SQLAlchemy AsyncConnection, asyncpg": sqlalchemy_async("asyncpg", "connection"),
}
BLOCKING = {
    "psycopg": psycopg_blocking,
    "SQLAlchemy Session": sqlalchemy_blocking("session"),
    "SQLAlchemy Connection": sqlalchemy_blocking("connection"),
    "Django": django_connection,
}


@contextlib.asynccontextmanager
async def transaction(connection: Any) -> AsyncIterator[None]:
    """The application's own transaction, as it would write it."""
    async with connection.begin() if hasattr(connection, "begin") else connection.transaction():
        yield


@contextlib.contextmanager
def transaction_blocking(connection: Any) -> Iterator[None]:
    """The same, blocking."""
    if hasattr(connection, "in_atomic_block"):
        from django.db import transaction as of_django

        with of_django.atomic():
            yield
    else:
        with connection.begin() if hasattr(connection, "begin") else connection.transaction():
            yield


async def execute(connection: Any, statement: str) -> None:
    """What the application itself writes."""
    if hasattr(connection, "run_sync"):
        from sqlalchemy import text

        await connection.execute(text(statement))
    else:
        await connection.execute(statement)


def execute_blocking(connection: Any, statement: str) -> None:
    """The same, blocking."""
    if hasattr(connection, "in_atomic_block"):
        with connection.cursor() as cursor:
            cursor.execute(statement)
    elif hasattr(connection, "begin"):
        from sqlalchemy import text

        connection.execute(text(statement))
    else:
        connection.execute(statement)
