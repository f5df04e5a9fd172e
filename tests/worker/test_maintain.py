"""The maintainer: promotes on time, maintains, survives its connection, and costs an idle worker next to nothing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from jobqueue.worker import maintain as module
from jobqueue.worker.maintain import Maintainer
from tests.support.server import arows

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
BOUND = 60.0
NEVER = 600.0
"""A longest sleep that no test waits for: what is done was slept for exactly."""


class Counting(psycopg.AsyncConnection[Any]):
    """A connection that notes its statements."""

    statements: list[str] = []

    async def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
        self.statements.append(query.decode())
        return await super().execute(query, *arguments, **options)


@asynccontextmanager
async def maintaining(dsn: str, promoted: Callable[[], None], **options: Any) -> AsyncIterator[Maintainer]:
    async def connect() -> psycopg.AsyncConnection[Any]:
        return await Counting.connect(dsn, autocommit=True, application_name="jobqueue maintain")

    maintainer = Maintainer(connect, uuid4(), None, promoted, **options)
    maintainer.start()
    try:
        yield maintainer
    finally:
        await maintainer.stop()


async def ready(connection: Connection) -> int:
    ((number,),) = await arows(connection, "select count(*) from jobqueue.job where ready_seq is not null")
    assert isinstance(number, int)
    return number


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(BOUND):
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            await asyncio.sleep(0.01)


async def test_a_waiting_job_is_promoted_when_it_is_due(dsn: str, aconnection: Connection) -> None:
    await aconnection.execute("select from jobqueue.send('letters', options => '{\"delay\": 0.6}')")
    promoted: list[int] = []
    async with maintaining(dsn, lambda: promoted.append(1), poll=NEVER):
        await until(lambda: promoted)
        assert await arows(aconnection, "select clock_timestamp() >= run_at from jobqueue.jobs") == [(True,)]
    assert await ready(aconnection) == 1


async def test_a_bell_makes_it_look_for_an_earlier_job(dsn: str, aconnection: Connection) -> None:
    promoted: list[int] = []
    Counting.statements.clear()
    async with maintaining(dsn, lambda: promoted.append(1), poll=NEVER) as maintainer:
        await until(lambda: len(Counting.statements) >= 2)
        await aconnection.execute("select from jobqueue.send('letters', options => '{\"delay\": 0.2}')")
        maintainer.ring()
        await until(lambda: promoted)


async def test_more_than_a_portion_is_promoted_without_a_pause(dsn: str, aconnection: Connection) -> None:
    await aconnection.execute(
        "select jobqueue.send('letters', options => '{\"delay\": 1}') from generate_series(1, 1500)"
    )
    async with maintaining(dsn, lambda: None, poll=NEVER):

        async def all_ready() -> bool:
            return await ready(aconnection) == 1500

        await until(all_ready)


async def test_a_job_of_a_dead_worker_is_rescued(dsn: str, aconnection: Connection) -> None:
    await aconnection.execute("select from jobqueue.send('letters')")
    await aconnection.execute("select from jobqueue.claim('{letters}', gen_random_uuid(), 1)")
    await aconnection.execute("update jobqueue.job set lease_until = now() - interval '1 s'")
    await aconnection.execute("update jobqueue.claim_batch set check_at = now()")
    await aconnection.execute("update jobqueue.maintenance set next_at = now()")

    async def rescued() -> bool:
        return (await arows(aconnection, "select status from jobqueue.jobs")) == [("pending",)]

    async with maintaining(dsn, lambda: None):
        await until(rescued)


async def test_it_goes_on_after_its_backend_was_killed(dsn: str, aconnection: Connection) -> None:
    promoted: list[int] = []
    Counting.statements.clear()
    async with maintaining(dsn, lambda: promoted.append(1)) as maintainer:
        await until(lambda: len(Counting.statements) >= 2)
        await aconnection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'jobqueue maintain'"
        )
        await aconnection.execute("select from jobqueue.send('letters', options => '{\"delay\": 0.1}')")
        maintainer.ring()
        await until(lambda: promoted)


async def test_an_idle_worker_spends_little_here(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.2 heartbeats and 0.2 polls a second, an idle worker stays under one statement a second."""
    # What a call of a slow server leaves to another one is done at once, and not what is counted here.
    monkeypatch.setattr(module, "LONG_CALL", math.inf)
    Counting.statements.clear()
    began = time.monotonic()
    async with maintaining(dsn, lambda: None):
        await asyncio.sleep(7.0)  # the measured time itself, not a wait for something
        took = time.monotonic() - began
    # Two of each at the start and during 5 s, one more maintenance at 6 s; 0.6 a second once it runs.
    assert len(Counting.statements) - 2 <= 0.6 * took, Counting.statements
