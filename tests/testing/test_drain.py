"""`drain` does what workers would do until nothing is ready; `travel` lets time pass without waiting."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from jobqueue import App, Job, Retry, Snooze, TimedOut
from jobqueue.testing import drain, drain_sync, travel
from tests.support.application import Connection, rows


def make_app(dsn: str, ran: list[Any]) -> App:
    app = App(dsn)

    @app.job(max_retries=2, retry_delay=3600)
    async def flaky(job: Job, payload: dict[str, Any]) -> str:
        ran.append(job.retry_count)
        if job.retry_count < payload["failures"]:
            raise ConnectionError("not yet")
        return "done"

    @app.job
    async def parent() -> None:
        await app.send_many("child", [{"n": n} for n in range(3)])

    @app.job
    def child(payload: dict[str, Any]) -> None:
        ran.append(payload["n"])

    @app.job
    async def patient(job: Job) -> None:
        ran.append(job.attempt)
        if job.attempt == 1:
            raise Snooze("2 days")
        if job.attempt == 2:
            raise Retry("once more", after="1 day")

    @app.job
    async def endless() -> None:
        await asyncio.sleep(600)

    return app


async def test_drain_runs_what_is_ready_and_what_that_sends(dsn: str) -> None:
    ran: list[Any] = []
    async with make_app(dsn, ran) as app:
        await app.send("parent")
        await app.send("child", {"n": 9}, delay="1 h")
        drained = await drain(app, concurrency=1)
        assert (drained.completed, drained.failures, ran) == (4, (), [0, 1, 2])
        drained.raise_first()
        assert (await drain(app)).completed == 0
        travel(app, timedelta(minutes=59))
        assert (await drain(app)).completed == 0
        travel(app, "1 min 1 s")
        assert (await drain(app)).completed == 1
        assert ran[-1] == 9


async def test_a_failed_handler_is_reported_and_can_be_raised(dsn: str) -> None:
    ran: list[Any] = []
    async with make_app(dsn, ran) as app:
        sent = await app.send("flaky", {"failures": 1})
        drained = await drain(app)
        ((job, failure),) = drained.failures
        assert (job.id, failure.code, failure.will_retry) == (sent.id, "ConnectionError", True)
        with pytest.raises(ConnectionError, match="not yet"):
            drained.raise_first()
        assert app.hooks.on_failure == []
        assert (await drain(app)).completed == 0
        drained = await drain(app, delayed=True)
        assert (drained.completed, ran) == (1, [0, 1])


async def test_delayed_jobs_retries_and_snoozes_are_run_through_time(dsn: str) -> None:
    ran: list[Any] = []
    async with make_app(dsn, ran) as app:
        lost, late = await app.send("flaky", {"failures": 9}), await app.send("patient", delay="9 days")
        drained = await drain(app, delayed=True)
        assert [failure.status for _, failure in drained.failures] == ["pending", "pending", "failed", "pending"]
        assert (await app.get(lost.id)).status == "failed"
        assert ((await app.get(late.id)).status, ran) == ("completed", [0, 1, 2, 1, 2, 3])


async def test_travel_moves_leases_expiry_retention_and_schedules(dsn: str, connection: Connection) -> None:
    app = App(dsn)

    @app.job
    async def work() -> None:
        return None

    async with app:
        crashed = await app.send("work")
        connection.execute("select jobqueue.claim('{work}', gen_random_uuid(), 1)")
        old = await app.send("other", queue="other", expires_in="1 day")
        connection.execute(
            "select jobqueue.schedule('nightly', 'work', '0 3 * * *', options => '{\"missed\": \"once\"}')"
        )
        before = rows(connection, "select now()")[0][0]
        assert (await drain(app)).completed == 0
        travel(connection, "25 h")
        assert rows(connection, "select now() - %s < interval '1 min'", before) == [(True,)]
        # the rescued job and that of the schedule
        assert (await drain(app)).completed == 2
        assert (await app.get(crashed.id)).attempt == 2
        assert (await app.get(old.id)).error_code == "EXPIRED"
        travel(app, "31 days")
        connection.execute("select jobqueue.maintain(null, '{retention}')")
        assert rows(connection, "select count(*) from jobqueue.job where id = any(%s)", [crashed.id, old.id]) == [(0,)]
    with pytest.raises(ValueError, match="not a duration"):
        travel(connection, -1)


async def test_a_drain_that_takes_too_long_says_what_runs(dsn: str) -> None:
    async with make_app(dsn, []) as app:
        await app.send("endless")
        for seconds in (0.5, 4, 60):
            with pytest.raises(TimedOut, match=f"not empty after {seconds:g} s; running: ") as told:
                await drain(app, timeout=seconds)
            if "nothing" not in str(told.value):  # on a busy machine the time may be over before a handler has begun
                break
        assert "running: endless" in str(told.value)


def test_tests_without_an_event_loop_drain_too(dsn: str) -> None:
    ran: list[Any] = []
    app = make_app(dsn, ran)
    app.send_sync("child", {"n": 5})
    assert (drain_sync(app, queues=["elsewhere"]).completed, ran) == (0, [])
    assert (drain_sync(app).completed, ran) == (1, [5])
    app.close_sync()
