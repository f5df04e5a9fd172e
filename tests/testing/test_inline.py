"""Inline, a job runs while it is sent: in this process, with a real Job, and inside of the caller's transaction."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

from jobqueue import App, InvalidArgument, Job, PermanentError, Snooze, current_job
from jobqueue.testing import assert_sent, drain, inline
from tests.support.application import Connection, rows


class Page(BaseModel):
    number: int


def make_app(dsn: str, seen: list[Any]) -> App:
    app = App(dsn)

    @app.job(stages=["scan"])
    async def index(job: Job, payload: Page) -> dict[str, int]:
        assert current_job() is job
        async with job.stage("scan"):
            await job.progress(payload.number, 17, "Processing")
        await job.checkpoint("scanned", {"page": payload.number})
        async for item in job.remaining(["a", "b"]):
            seen.append(item)  # noqa: PERF401
        job.stats["pages"] = payload.number
        return {"page": payload.number}

    @app.job
    def block(job: Job, payload: dict[str, Any]) -> str:
        job.sync.progress(1, 2)
        with job.sync.stage("only", of=1):
            seen.append(threading.current_thread() is threading.main_thread())
        for item in job.sync.remaining([1, 2]):
            seen.append(item)  # noqa: PERF402
        return "blocked"

    @app.job(max_retries=1, retry_delay=60)
    async def fail(payload: dict[str, Any]) -> None:
        raise {"permanent": PermanentError, "other": ConnectionError, "snooze": Snooze}[payload["how"]]("9 s")

    @app.job
    async def outer(job: Job) -> None:
        await app.send("index", Page(number=1))
        assert current_job() is job

    @app.job(batch_size=10)
    async def batch(jobs: list[Job]) -> list[int]:
        return [job.payload["n"] for job in jobs]

    @app.job
    async def own(job: Job) -> None:
        async with job.transaction("own"):
            pass

    return app


async def test_a_job_has_run_when_send_returns(dsn: str, connection: Connection) -> None:
    seen: list[Any] = []
    outside = current_job()
    async with make_app(dsn, seen) as app:
        with inline(app):
            sent = await app.send("index", Page(number=5))
            record = await app.get(sent.id)
            assert (record.status, record.result, record.stats) == ("completed", {"page": 5}, {"pages": 5})
            assert (record.progress_done, record.checkpoint_stage, seen) == (2, "scanned", ["a", "b"])
            assert rows(connection, "select name, status from jobqueue.stage") == [("scan", "completed")]
            with pytest.raises(InvalidArgument, match="number"):
                await app.send("index", {"number": "five"})
            nested = await app.send("outer")
            assert (await app.get(nested.id)).status == "completed"
            many = await app.send_many("batch", [{"n": 1}, {"n": 2}])
            assert [(await app.get(job.id)).result for job in many] == [1, 2]
            blocking = await app.send("block", {})
            assert (await app.get(blocking.id)).result == "blocked"
            own = await app.send("own")
            assert (await app.get(own.id)).result == "own"
        assert current_job() is outside
        assert (await app.get((await app.send("block", {})).id)).status == "pending"


async def test_the_database_knows_of_a_failure_before_send_raises_it(dsn: str) -> None:
    async with make_app(dsn, []) as app:
        with inline(app):
            with pytest.raises(PermanentError):
                await app.send("fail", {"how": "permanent"})
            assert assert_sent(app, "fail", {"how": "permanent"}).status == "failed"
            with pytest.raises(ConnectionError):
                await app.send("fail", {"how": "other"})
            retried = assert_sent(app, "fail", {"how": "other"})
            assert (retried.status, retried.retry_count, retried.error_code) == ("pending", 1, "ConnectionError")
            snoozed = await app.send("fail", {"how": "snooze"})
            assert (await app.get(snoozed.id)).status == "pending"
        with inline(app, raise_errors=False):
            quiet = await app.send("fail", {"how": "permanent"})
            assert (await app.get(quiet.id)).error_message == "9 s"


async def test_inside_of_a_transaction_all_of_it_is_taken_back_with_it(dsn: str, connection: Connection) -> None:
    seen: list[Any] = []
    async with make_app(dsn, seen) as app:
        with inline(app):
            async with await psycopg.AsyncConnection.connect(dsn) as mine:
                sent = await app.send("index", Page(number=2), connection=mine)
                cursor = await mine.execute("select status, result from jobqueue.jobs where id = %s", [sent.id])
                assert await cursor.fetchall() == [("completed", {"page": 2})]
                with pytest.raises(Exception, match="cannot have a transaction of its own"):
                    await app.send("own", connection=mine)
                await mine.rollback()
    assert seen == ["a", "b"]
    assert rows(connection, "select count(*) from jobqueue.job") == [(0,)]


async def test_what_is_not_ready_or_not_ours_waits_for_a_worker(dsn: str) -> None:
    async with make_app(dsn, []) as app:
        with inline(app):
            delayed = await app.send("block", {}, delay=60)
            foreign = await app.send("elsewhere", {}, queue="elsewhere")
            assert [(await app.get(sent.id)).status for sent in (delayed, foreign)] == ["pending", "pending"]
        assert (await drain(app, delayed=True)).completed == 1


def test_blocking_sends_run_plain_functions_in_the_same_thread_and_coroutines_in_a_loop(dsn: str) -> None:
    seen: list[Any] = []
    app = make_app(dsn, seen)
    with inline(app):
        plain = app.send_sync("block", {})
        assert seen == [True, 1, 2]
        (coroutine,) = app.send_many_sync("index", [Page(number=3)])
        with psycopg.connect(dsn) as mine:
            app.send_sync("block", {}, connection=mine)
            mine.rollback()
        with pytest.raises(ConnectionError):
            app.send_sync("fail", {"how": "other"})
    assert app.get_sync(plain.id).result == "blocked"
    assert app.get_sync(coroutine.id).result == {"page": 3}
    app.close_sync()


async def test_middleware_and_hooks_are_called(dsn: str) -> None:
    calls: list[str] = []
    app = make_app(dsn, [])

    @app.middleware
    async def around(job: Job, call_next: Any) -> Any:
        calls.append("before")
        return [await call_next(job)]

    app.after_job(lambda job, result: calls.append("after"))
    app.on_failure(lambda job, failure: calls.append(failure.status))
    async with app:
        with inline(app):
            sent = await app.send("block", {})
            assert (await app.get(sent.id)).result == ["blocked"]
            with pytest.raises(PermanentError):
                await app.send("fail", {"how": "permanent"})
            assert calls == ["before", "after", "before", "failed"]
            loop_was_blocked = await asyncio.to_thread(app.send_sync, "block", {})
            assert app.get_sync(loop_was_blocked.id).status == "completed"
