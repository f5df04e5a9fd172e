"""What pg-boss's own tests assert of workers and no other file shows."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import psycopg
import pytest

from jobqueue import App, Job, PermanentError
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def app(dsn: str) -> App:
    return App(dsn)


async def run(app: App, **options: Any) -> None:
    """Run a worker until nothing is left to do."""
    async with asyncio.timeout(60):
        await app.run_worker(until_idle=True, **options)
    await app.close()


async def test_a_batch_handler_that_does_not_answer_for_each_job_fails_them_all(
    app: App, connection: Connection
) -> None:
    answers: dict[str, Any] = {"too_few": [1], "no_list": {"n": 1}, "nothing": None}

    for name, answer in answers.items():

        async def handle(jobs: list[Job], answer: Any = answer) -> Any:
            return answer

        app.job(name, batch_size=10, max_retries=0)(handle)
        await app.send_many(name, [{"n": n} for n in range(3)])

    @app.job("raises", batch_size=10, max_retries=0)
    async def raises(jobs: list[Job]) -> None:
        raise PermanentError("all of them", code="ALL")

    await app.send_many("raises", [{"n": n} for n in range(3)])
    await run(app)
    found = connection.execute(
        "select job_type, status, count(*) from jobqueue.jobs group by job_type, status order by job_type"
    ).fetchall()
    assert found == [
        ("no_list", "failed", 3),
        ("nothing", "completed", 3),
        ("raises", "failed", 3),
        ("too_few", "failed", 3),
    ]
    said = connection.execute("select distinct error_code from jobqueue.jobs where job_type = 'raises'").fetchall()
    assert said == [("ALL",)]


async def test_the_retry_of_a_handler_that_ignores_its_time_out_waits_for_its_slot(
    app: App, connection: Connection
) -> None:
    release, entered, inside = threading.Event(), [0], [0]

    @app.job("deaf", timeout=1, max_retries=1, retry_delay=0, retry_backoff=False)
    def deaf() -> None:
        entered[0] += 1
        inside[0] += 1
        if entered[0] == 1:
            release.wait(600)
        assert inside[0] == 1, "two of it at once"
        inside[0] -= 1

    def state() -> tuple[Any, ...] | None:
        return connection.execute("select status, retry_count from jobqueue.jobs").fetchone()

    await app.send("deaf")
    worker = asyncio.create_task(run(app, concurrency=1))
    await asyncio.to_thread(wait_until, lambda: state() == ("pending", 1), what="the attempt ends at its time-out")
    assert entered == [1]
    release.set()
    await worker
    assert (entered, state()) == ([2], ("completed", 1))


async def test_an_option_that_is_none_was_not_given_or_means_none(app: App) -> None:
    app.job("plain")(lambda: None)
    sent = await app.send("plain", None, priority=None, singleton_key=None, group=None, run_at=None, timeout=None)
    job = await app.get(sent.id)
    assert (job.priority, job.singleton_key, job.group_key, job.payload) == (0, None, None, {})
    assert await app.create_queue("given", policy=None, concurrency=None, dead_letter=None) is True
    await app.close()


async def test_a_worker_may_serve_a_queue_that_comes_later(app: App, connection: Connection) -> None:
    done = asyncio.Event()

    @app.job("late", queue="later")
    async def late() -> None:
        done.set()

    worker = await app.make_worker(["later"])
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        await app.send("late")
        await done.wait()
        worker.release_now()
        await task
    await app.close()
