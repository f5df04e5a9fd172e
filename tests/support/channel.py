"""A job's way to the database without a worker: every call is one statement, on one connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from jobqueue.client import fetch
from jobqueue.connections import Connections
from jobqueue.job import Claim, Job

T = TypeVar("T")
WORKER = "00000000-0000-0000-0000-00000000000a"
# As workers read a claim: uuids as text.
CLAIM = sql.SQL(
    "select {} from jobqueue.claim_queue(%s, %s, array[-2147483648], array[0::bigint], array[2147483647], null,"
    " 1, 1, null, null)"
).format(
    sql.SQL(", ").join(
        {
            "id": sql.SQL("id::text"),
            "claim_token": sql.SQL("claim_token::text"),
        }.get(name, sql.Identifier(name))
        for name in Claim._fields
    )
)


class DirectChannel:
    """A `jobqueue.job.Channel`; progress is sent by `flush`, in the order of the reports."""

    def __init__(self, dsn: str, connection: psycopg.AsyncConnection[Any]) -> None:
        self.connections = Connections(dsn, max_size=2)
        self.calls: list[str] = []
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._reports: list[tuple[Job, int | None, str | None, dict[str, Any] | None]] = []
        self.messages: list[str | None] = []
        """Of all reports so far."""

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        self.messages.append(message)
        self._reports.append((job, pct, message, data))

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        self.calls.append(function)
        await self.flush()
        names = [sql.SQL("{} => %s").format(sql.Identifier(name)) for name in arguments]
        query = sql.SQL("select jobqueue.{}({})").format(
            sql.Identifier(function), sql.SQL(", ").join([sql.SQL("%s::uuid"), sql.SQL("%s::uuid"), *names])
        )
        text = query.as_string(self._connection)
        rows = await fetch(self._connection, text, (job.claim.id, job.claim.claim_token, *arguments.values()))
        return rows[0][0]

    async def keys(self, job: Job) -> set[str]:
        return {key for (key,) in await self.rows(job, "select jobqueue.done_keys(%s)", job.claim.id)}

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return await fetch(self._connection, query, parameters)

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(timeout=60)

    async def flush(self) -> None:
        """Send what was reported."""
        reports, self._reports = self._reports, []
        for job, pct, message, data in reports:
            text = None if data is None else json.dumps(data)
            query = "select jobqueue.progress(%s, %s, %s::int, %s, %s::jsonb)"
            await fetch(self._connection, query, (job.claim.id, job.claim.claim_token, pct, message, text))

    async def claim(self, queue: str) -> Job:
        """Claim the next job of a queue."""
        cursor = await self._connection.execute(CLAIM, (queue, WORKER))
        row = await cursor.fetchone()
        assert row is not None, f"nothing to claim in {queue}"
        return Job(Claim(*row), self)


@asynccontextmanager
async def direct_channel(dsn: str) -> AsyncIterator[DirectChannel]:
    """A channel with a connection of its own."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        channel = DirectChannel(dsn, connection)
        try:
            yield channel
        finally:
            await channel.connections.close()
