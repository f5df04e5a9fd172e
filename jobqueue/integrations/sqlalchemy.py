"""SQLAlchemy 2: `app.send_sync("index", payload, connection=session)`, `await app.send(…, connection=async_session)`.

Statements go through SQLAlchemy, not around it: so its transaction begins as with any other statement, its commit
commits the job too, and its log shows them. Drivers: psycopg, asyncpg, psycopg2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from jobqueue.errors import InvalidArgument, JobqueueError, from_postgres
from jobqueue.integrations.adapters import in_transaction_already, numbered, translated


def adapter_of(connection: Any) -> SqlalchemyAdapter | AsyncSqlalchemyAdapter | None:
    """Return the adapter of a session or connection, also a scoped session; None for anything else."""
    if isinstance(connection, Session | scoped_session | Connection):
        return SqlalchemyAdapter(connection)
    if isinstance(connection, AsyncSession | async_scoped_session | AsyncConnection):
        return AsyncSqlalchemyAdapter(connection)
    if isinstance(connection, Engine):
        raise InvalidArgument(
            "an Engine has no transaction that a job could join",
            hint="Pass the connection or session: with engine.begin() as connection: app.send_sync(…, connection=connection).",
        )
    return None


class SqlalchemyAdapter:
    """A Session or Connection; see `jobqueue.integrations.adapters.Adapter`."""

    is_async = False

    def __init__(self, given: Any) -> None:
        self._given = given

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        connection = _connection_of(self._given)
        try:
            result = connection.exec_driver_sql(_text(query, connection), tuple(parameters))
            return [tuple(row) for row in result]
        except DBAPIError as error:
            raise _translate(error) or error from error.orig

    def transaction(self) -> Any:
        return self._given.begin_nested()

    def whole(self) -> Any:
        if self._given.in_transaction():
            raise in_transaction_already()
        return self._given.begin()


class AsyncSqlalchemyAdapter:
    """An AsyncSession or AsyncConnection; see `jobqueue.integrations.adapters.Adapter`."""

    is_async = True

    def __init__(self, given: Any) -> None:
        self._given = given

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        given = self._given
        connection = given if isinstance(given, AsyncConnection) else await given.connection()
        try:
            result = await connection.exec_driver_sql(_text(query, connection), tuple(parameters))
            return [tuple(row) for row in result]
        except DBAPIError as error:
            raise _translate(error) or error from error.orig

    def transaction(self) -> Any:
        return self._given.begin_nested()

    def whole(self) -> Any:
        if self._given.in_transaction():
            raise in_transaction_already()
        return self._given.begin()


def _connection_of(given: Any) -> Connection:
    found: Connection = given if isinstance(given, Connection) else given.connection()
    return found


def _text(query: str, connection: Connection | AsyncConnection) -> str:
    dialect = connection.dialect
    if dialect.name != "postgresql":
        raise InvalidArgument(
            f"this SQLAlchemy connection leads to {dialect.name}, not to PostgreSQL",
            hint="The job joins the transaction of the connection, so both must be in the same database.",
        )
    return numbered(query) if dialect.driver == "asyncpg" else query


def _translate(error: DBAPIError) -> JobqueueError | None:
    """Return what the driver's error means, or None when it is not one of jobqueue's."""
    cause: Any = error.orig
    if isinstance(cause, psycopg.Error):
        return from_postgres(cause)
    # asyncpg's own error is the cause of the one that SQLAlchemy makes of it
    inner: Any = getattr(cause, "__cause__", None)
    if hasattr(inner, "as_dict"):
        fields = inner.as_dict()
        return translated(fields.get("sqlstate"), fields.get("message"), fields.get("hint"), fields.get("detail"))
    diagnosis = getattr(cause, "diag", None)
    if diagnosis is None:
        return None
    return translated(cause.pgcode, diagnosis.message_primary, diagnosis.message_hint, diagnosis.message_detail)
