"""`django.db.connection` and `connections["alias"]` as the place of a job: it joins `transaction.atomic()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import Error
from django.utils.connection import ConnectionProxy
from psycopg.conninfo import make_conninfo

from jobqueue.errors import ConfigurationError, InvalidArgument, from_postgres

# What Django adds to libpq's own parameters.
_NOT_LIBPQ = ("context", "cursor_factory", "prepare_threshold", "server_side_binding", "autocommit", "pool")


def adapter_of(connection: Any) -> DjangoAdapter | None:
    """Return the adapter of a connection of Django's; None for anything else."""
    if isinstance(connection, BaseDatabaseWrapper | ConnectionProxy):
        return DjangoAdapter(connection)
    return None


def conninfo_of(alias: str = DEFAULT_DB_ALIAS) -> str:
    """Return the connection string of a database of the settings. Raises ConfigurationError if it is no PostgreSQL."""
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f'the database "{alias}" of Django\'s settings is {connection.vendor}; jobs live in PostgreSQL',
            hint='Name another one in OPTIONS: {"database": …}, or give a "dsn".',
        )
    given = connection.get_connection_params()
    return make_conninfo(**{name: value for name, value in given.items() if name not in _NOT_LIBPQ})


class DjangoAdapter:
    """One database connection of Django's, in the thread that it belongs to."""

    is_async = False

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self._connection.vendor != "postgresql":
            raise InvalidArgument(
                f"this connection of Django leads to {self._connection.vendor}, not to PostgreSQL",
                hint='Pass the one where the jobs live: django.db.connections["alias"].',
            )
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(query, tuple(parameters))
                return [tuple(row) for row in cursor.fetchall()]
        except Error as error:
            cause = error.__cause__
            known = from_postgres(cause) if isinstance(cause, psycopg.Error) else None
            if known is None:
                raise
            raise known from cause

    def transaction(self) -> Any:
        return transaction.atomic(using=self._connection.alias)

    def whole(self) -> Any:
        # Django itself refuses a durable block inside of another one (but for the one around a TestCase).
        return transaction.atomic(using=self._connection.alias, durable=True)
