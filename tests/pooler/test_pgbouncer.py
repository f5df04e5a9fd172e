"""Behind a real PgBouncer in transaction mode everything works, and no session of the server keeps anything of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import psycopg
import pytest

from jobqueue import App, Job
from jobqueue.api import hub as hub_module
from jobqueue.database.migrations import migrate_up
from jobqueue.errors import ConfigurationError, DatabaseUnavailable
from jobqueue.worker import wake as wake_module
from tests.api.conftest import serving
from tests.api.test_streams import streaming
from tests.sql.engine import Engine
from tests.support.application import has, seen, work, working
from tests.support.pgbouncer import PgBouncer
from tests.worker.test_worker import eventually

Connection = psycopg.Connection[tuple[Any, ...]]
MANY = 12
"""Jobs of one kind: more than it takes until psycopg would prepare a statement."""


def handlers(app: App) -> None:
    """Handlers that together use all that a worker does with the database."""

    @app.job("report", stages=["read"])
    async def report(job: Job, payload: dict[str, int]) -> dict[str, int]:
        async with job.stage("read"):
            await job.progress(1, 2, "half")
        await job.checkpoint("read", {"n": payload["n"]})
        return {"n": payload["n"]}

    @app.job("flaky", retry_delay=0)
    async def flaky(job: Job) -> str:
        if job.attempt == 1:
            raise ValueError("not yet")
        return "now"

    @app.job("endless", pausable=True)
    async def endless(job: Job) -> None:
        while True:
            await job.checkpoint("loop", {})
            await asyncio.sleep(0.02)

    @app.job("charge")
    async def charge(job: Job, payload: dict[str, int]) -> None:
        async with job.transaction(result="charged") as connection:
            await connection.execute("insert into public.charge values (%s)", [payload["n"]])


async def test_workers_and_senders_work_and_leave_nothing_behind(
    app: App, connection: Connection, pooler: PgBouncer
) -> None:
    handlers(app)
    connection.execute("create table public.charge (n int)")
    async with working(app):
        many = await app.send_many("report", [{"n": n} for n in range(MANY)])
        charges = [await app.send("charge", {"n": n}) for n in range(MANY)]
        flaky, stopped, paused = await app.send("flaky"), await app.send("endless"), await app.send("endless")
        later = await app.send("report", {"n": 1}, delay=0.2)
        async with await psycopg.AsyncConnection.connect(pooler.dsn, prepare_threshold=None) as mine:
            kept = await app.send("report", {"n": 2}, connection=mine)
        with contextlib.suppress(ZeroDivisionError):
            async with await psycopg.AsyncConnection.connect(pooler.dsn, prepare_threshold=None) as mine:
                dropped = await app.send("report", {"n": 3}, connection=mine)
                raise ZeroDivisionError
        for sent in (*many, *charges, flaky, later, kept):
            await seen(app, sent.id, has("completed"))
        for sent in (stopped, paused):
            await seen(app, sent.id, lambda record: record.checkpoint_at is not None)
        await app.cancel(stopped.id, "not needed")
        await app.pause(paused.id, "for lunch")
        await seen(app, stopped.id, has("cancelled"))
        await seen(app, paused.id, has("paused"))
        await app.resume(paused.id, "after lunch")
        await seen(app, paused.id, has("processing"))
    await app.close()
    engine = Engine(connection, pooler.dsn)
    assert engine.value("select array_agg(n order by n) from public.charge") == list(range(MANY))
    assert engine.value("select count(*) from jobqueue.jobs where id = %s", dropped.id) == 0
    assert engine.value("select retry_count from jobqueue.jobs where id = %s", flaky.id) == 1
    assert engine.status(paused.id) == "pending"  # released, with its checkpoint, when its worker stopped
    assert pooler.leftovers() == []


async def test_a_direct_connection_wakes_an_idle_worker(
    app: App, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.job("quick")
    async def quick() -> None: ...

    listens = settings["listen_dsn"] is not None
    # Without one the worker looks for jobs by itself, otherwise it would not within this test.
    worker = await app.make_worker(poll=600.0 if listens else 0.1)
    running = asyncio.create_task(worker.run())
    try:
        await eventually(lambda: worker.status().listening == ("listening" if listens else "polling"))
        if listens:
            await eventually(lambda: worker._wake.armed and worker._wake._rung == len(wake_module.LADDER))
        sent = await app.send("quick")
        await seen(app, sent.id, has("completed"))
    finally:
        worker.release_now()
        await running
        await app.close()


async def test_a_pooler_that_nobody_spoke_of_is_noticed(
    pooler: PgBouncer, connection: Connection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake_module, "CANARY_TIMEOUT", 0.3)
    app = App(pooler.dsn)
    handlers(app)
    connection.execute("create table public.charge (n int)")
    with caplog.at_level(logging.WARNING):
        sent = [await app.send("charge", {"n": n}) for n in range(MANY)]
        async with working(app):
            for job in sent:
                await seen(app, job.id, has("completed"))
    await app.close()
    assert "a connection pooler answers" in caplog.text
    left = [kept for kept in pooler.leftovers() if kept != [wake_module.CANARY]]
    assert left == []


async def test_a_job_that_somebody_holds_keeps_no_other_result_from_being_written(
    app: App, connection: Connection, dsn: str
) -> None:
    go = asyncio.Event()

    @app.job("quick")
    async def quick() -> None:
        await go.wait()

    held, *others = [(await app.send("quick")).id for _ in range(5)]
    async with working(app):
        await seen(app, held, has("processing"))
        with psycopg.connect(dsn) as somebody:
            somebody.execute("select from jobqueue.job where id = %s for update", [held])
            go.set()
            for other in others:
                await seen(app, other, has("completed"))
            assert Engine(connection, dsn).status(held) == "processing"
        await seen(app, held, has("completed"))
    await app.close()


async def test_the_api_waits_and_streams(
    app: App, settings: dict[str, Any], connection: Connection, pooler: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings["listen_dsn"] is None:
        monkeypatch.setattr(hub_module, "CHECK_EVERY", 0.1)

    @app.job("quick")
    async def quick(job: Job) -> str:
        await job.progress(50)
        return "done"

    others = {name: value for name, value in settings.items() if name != "dsn"}
    connection.execute("insert into jobqueue.queue (name) values ('quick')")
    async with serving(settings["dsn"], others) as client:
        for _ in range(MANY):
            assert (await client.get("/jobs?limit=5")).status_code == 200
        job_id = (await client.post("/jobs", json={"queue": "quick", "payload": {}})).json()["jobId"]
        etag = (await client.get(f"/jobs/{job_id}")).headers["ETag"]
        async with streaming(client.app, f"/jobs/{job_id}/events") as stream:  # type: ignore[attr-defined]
            waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
            await stream.next("job")
            await work(app)
            assert (await waiting).json()["status"] in {"processing", "completed"}
            assert (await stream.next("done"))[1] is not None
        answer = await client.post(f"/jobs/{job_id}/cancel", json={"reason": "too late"})
        assert answer.status_code == 409
    await app.close()
    assert pooler.leftovers() == []


def test_a_migration_through_a_pooler_is_refused(pooler: PgBouncer) -> None:
    with pytest.raises(ConfigurationError, match="transaction pooler") as caught:
        migrate_up(pooler.dsn)
    assert "JOBQUEUE_LISTEN_DSN" in str(caught.value.hint)
    assert pooler.leftovers() == []


async def test_an_api_that_was_not_told_of_the_pooler_says_what_to_set(pooler: PgBouncer) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        async with serving(pooler.dsn):
            raise AssertionError("it has started")
    assert "a connection pooler" in str(caught.value)
    assert caught.value.hint == "Set JOBQUEUE_POOLER=1."
