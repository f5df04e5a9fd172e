"""The Python worker on queues with limits: they hold, and nobody waits longer than they ask for."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from jobqueue import App, Job
from tests.worker.test_worker import eventually, running


async def test_a_worker_runs_no_more_at_a_time_than_the_queue_allows(dsn: str) -> None:
    async with App(dsn) as app:
        running = most = 0

        @app.job("limited", queue="few")
        async def limited(job: Job) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1

        await app.create_queue("few", concurrency=3, group_concurrency={"default": 2})
        for n in range(40):
            await app.send("limited", group=f"g{n % 2}")
        await app.run_worker(concurrency=20, until_idle=True)
        assert most == 3
        states = [(await app.get(job.id)).status for job in [await app.send("limited")]]
        assert states == ["pending"]


async def test_an_idle_worker_is_woken_when_a_token_comes_back_or_another_ends(dsn: str) -> None:
    async with App(dsn) as app:
        done: list[int] = []

        @app.job("paced", queue="paced")
        async def paced(job: Job, payload: dict[str, int]) -> None:
            done.append(payload["n"])

        await app.create_queue("paced", rate_limit={"limit": 2, "period": timedelta(milliseconds=200)})
        for n in range(8):
            await app.send("paced", {"n": n})
        async with running(app, concurrency=4, poll=600):
            # with polls instead of wake-ups it would be half an hour
            await eventually(lambda: len(done) == 8)
        assert done == sorted(done)


async def test_the_keys_that_stand_still_are_listed(dsn: str) -> None:
    async with App(dsn) as app:

        @app.job("ordered", queue="ordered", max_retries=0)
        async def ordered(job: Job) -> None:
            raise ValueError("broken")

        await app.create_queue("ordered", policy="key_strict_fifo", max_retries=0)
        head = await app.send("ordered", singleton_key="a")
        await app.send("ordered", singleton_key="a")
        await app.run_worker(until_idle=True)
        (blocked,) = await app.blocked_keys("ordered")
        assert (blocked.singleton_key, blocked.job_id, blocked.status, blocked.waiting) == ("a", head.id, "failed", 1)
