"""What tests do with an application: let it work, poll a job, look into the database."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import psycopg

from jobqueue import App, JobRecord

Connection = psycopg.Connection[tuple[Any, ...]]


@contextlib.asynccontextmanager
async def working(app: App) -> AsyncIterator[None]:
    """A worker in the background."""
    worker = await app.make_worker(concurrency=10)
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.release_now()
        async with asyncio.timeout(60):
            await task


async def work(app: App) -> None:
    """A worker that stops when nothing is left to do."""
    async with asyncio.timeout(60):
        await app.run_worker(until_idle=True, concurrency=1)


async def seen(app: App, job: UUID | None, wanted: Callable[[JobRecord], bool], seconds: float = 60.0) -> JobRecord:
    """Poll a job until it is as wanted."""
    assert job is not None
    deadline = time.monotonic() + seconds
    while not wanted(record := await app.get(job)):
        assert time.monotonic() < deadline, f"never as wanted: {record}"
        await asyncio.sleep(0.02)
    return record


def has(status: str) -> Callable[[JobRecord], bool]:
    """Whether a job has this status."""
    return lambda record: record.status == status


def rows(connection: Connection, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """What psql would show."""
    return connection.execute(query.encode(), parameters).fetchall()
