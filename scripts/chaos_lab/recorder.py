"""What handlers say of themselves, written outside of their jobs' transactions: one flush at a time, repeated until it is
stored, so that a fault changes what the queue does and not what is known of it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import psycopg

WRITE = "insert into chaos.run (job_id, token, what) select * from unnest(%s::uuid[], %s::uuid[], %s::text[])"
FLUSH_SECONDS = 3.0
"""A flush that takes longer is given up with its connection; that a row may then be there twice does not matter."""

GATHER_SECONDS = 0.04
"""A flush takes what comes in this time: the records must not cost more than what they record."""


class Recorder:
    """`await note(job, token, what)` returns once the row is committed."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] = []
        self._stored = asyncio.Event()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def note(self, job: str, token: str, what: str) -> None:
        """Store a row. Waits for as long as that takes."""
        self._rows.append((job, token, what))
        self._work.set()
        if self._task is None:
            self._task = asyncio.create_task(self._loop())
        await self._stored.wait()

    async def _loop(self) -> None:
        connection: psycopg.AsyncConnection[Any] | None = None
        while True:
            await self._work.wait()
            self._work.clear()
            await asyncio.sleep(GATHER_SECONDS)
            if not self._rows:
                continue
            rows, self._rows = self._rows, []
            stored, self._stored = self._stored, asyncio.Event()
            while True:
                try:
                    async with asyncio.timeout(FLUSH_SECONDS):
                        if connection is None:
                            connection = await self._connect()
                        await connection.execute(WRITE, tuple(map(list, zip(*rows, strict=True))))
                    break
                except (psycopg.Error, OSError, TimeoutError):
                    if connection is not None:
                        connection.pgconn.finish()
                        connection = None
                    await asyncio.sleep(0.2)
            stored.set()

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(
            os.environ["JOBQUEUE_DSN"], autocommit=True, application_name="chaos recorder"
        )
