"""asyncpg: `await app.send("index", payload, connection=connection)` inside `async with connection.transaction():`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from jobqueue.integrations.adapters import in_transaction_already, numbered, translated


def adapter_of(connection: Any) -> AsyncpgAdapter | None:
    """Return the adapter of an asyncpg connection, also one lent by a pool; None for anything else."""
    if isinstance(connection, asyncpg.Connection | PoolConnectionProxy):
        return AsyncpgAdapter(connection)
    return None


class AsyncpgAdapter:
    """One asyncpg connection; see `jobqueue.integrations.adapters.Adapter`."""

    is_async = True

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            found = await self._connection.fetch(numbered(query), *parameters)
        except asyncpg.PostgresError as error:
            known = translate(error)
            if known is None:
                raise
            raise known from error
        return [tuple(row) for row in found]

    def transaction(self) -> Any:
        return self._connection.transaction()

    def whole(self) -> Any:
        if self._connection.is_in_transaction():
            raise in_transaction_already()
        return self._connection.transaction()


def translate(error: asyncpg.PostgresError) -> Exception | None:
    """Return what an error of asyncpg means, or None when it is not one of jobqueue's."""
    fields = error.as_dict()
    return translated(fields.get("sqlstate"), fields.get("message"), fields.get("hint"), fields.get("detail"))
