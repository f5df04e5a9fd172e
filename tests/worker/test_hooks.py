"""Hooks and middleware around jobs, and in the life of a worker."""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from jobqueue import App, ConfigurationError, Job, PermanentError, Retry, Snooze, current_job
from jobqueue.hooks import FailedAttempt, Hooks, WorkerInfo, WorkerWarning
from jobqueue.worker.hooks import make_job_hooks
from jobqueue.worker.maintain import Maintainer
from jobqueue.worker.warn import Warnings

Connection = psycopg.Connection[tuple[Any, ...]]
trace_id: ContextVar[str] = ContextVar("trace_id", default="none")


@pytest.fixture
def app(dsn: str) -> App:
    return App(dsn)


def in_child(job: Job, payload: dict[str, int]) -> dict[str, int]:
    """Runs in a process; must be importable there."""
    return {"n": payload["n"]}


async def work(app: App, **options: Any) -> None:
    """Run a worker until nothing is left to do."""
    async with asyncio.timeout(60):
        await app.run_worker(until_idle=True, **options)
    await app.close()


def results(connection: Connection) -> dict[str, Any]:
    """Result, or error code, by job_type."""
    rows = connection.execute(
        "select job_type, coalesce(result, to_jsonb(error_message)) from jobqueue.jobs"
    ).fetchall()
    return dict(rows)


async def test_hooks_and_middleware_surround_every_kind_of_handler_in_their_order(
    app: App, connection: Connection
) -> None:
    told: list[str] = []

    def note(what: str) -> None:
        job = current_job()
        told.append(f"{what} {job.job_type if job else None}")

    @app.before_job
    def first(job: Job) -> None:
        note("first")
        trace_id.set(f"trace of {job.job_type}")

    @app.before_job("in_thread")
    async def second(job: Job) -> None:
        note("second")

    @app.middleware
    async def outer(job: Job | list[Job], call_next: Any) -> Any:
        note("outer")
        result = await call_next(job)
        note("outer again")
        return [*result, "outer"] if isinstance(result, list) else {**result, "outer": True}

    async def inner(job: Job, call_next: Any) -> Any:
        note("inner")
        return {**await call_next(job), "inner": True}

    @app.after_job
    async def after(job: Job, result: Any) -> None:
        note("after")

    @app.job(middleware=[inner])
    async def in_loop(job: Job, payload: dict[str, int]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"n": payload["n"], "trace": trace_id.get()}

    @app.job(middleware=[inner])
    def in_thread(job: Job, payload: dict[str, int]) -> dict[str, Any]:
        return {"n": payload["n"], "trace": trace_id.get()}

    app.job("in_process", executor="process", middleware=[inner])(in_child)
    for name in ("in_loop", "in_thread", "in_process"):
        await app.send(name, {"n": 1})
    await work(app, concurrency=1)
    assert results(connection) == {
        "in_loop": {"n": 1, "trace": "trace of in_loop", "inner": True, "outer": True},
        "in_thread": {"n": 1, "trace": "trace of in_thread", "inner": True, "outer": True},
        "in_process": {"n": 1, "inner": True, "outer": True},
    }
    for name in ("in_loop", "in_thread", "in_process"):
        mine = [line.removesuffix(f" {name}") for line in told if line.endswith(f" {name}")]
        only_here = ["second"] if name == "in_thread" else []
        assert mine == ["first", *only_here, "outer", "inner", "outer again", "after"]
    assert trace_id.get() == "none"


async def test_a_batch_is_one_call_for_middleware_and_many_jobs_for_hooks(app: App, connection: Connection) -> None:
    before: list[int] = []
    after: list[tuple[int, Any]] = []
    failed: list[int] = []
    sizes: list[int] = []
    app.before_job(lambda job: before.append(job.payload["n"]))
    app.after_job(lambda job, result: after.append((job.payload["n"], result)))
    app.on_failure(lambda job, failure: failed.append(job.payload["n"]))

    @app.middleware
    async def count(jobs: list[Job], call_next: Any) -> Any:
        sizes.append(len(jobs))
        return await call_next(jobs)

    async def asynchronous(jobs: list[Job]) -> list[Any]:
        return [PermanentError("odd") if job.payload["n"] % 2 else job.payload["n"] for job in jobs]

    def threaded(jobs: list[Job]) -> list[Any]:
        return [PermanentError("odd") if job.payload["n"] % 2 else job.payload["n"] for job in jobs]

    app.job("a", batch_size=4)(asynchronous)
    app.job("b", batch_size=4)(threaded)
    await app.send_many("a", [{"n": n} for n in range(4)])
    await app.send_many("b", [{"n": n} for n in range(4, 8)])
    await work(app)
    assert sorted(before) == list(range(8))
    assert sorted(after) == [(0, 0), (2, 2), (4, 4), (6, 6)]
    assert sorted(failed) == [1, 3, 5, 7]
    assert sum(sizes) == 8


async def test_what_middleware_and_before_hooks_raise_ends_the_attempt_like_the_handlers_own(
    app: App, connection: Connection
) -> None:
    ran: list[str] = []
    raises = {
        "retried": Retry(after=3600),
        "snoozed": Snooze(3600),
        "refused": PermanentError("no"),
        "unknown": KeyError("x"),
    }

    @app.middleware(*raises)
    async def strict(job: Job, call_next: Any) -> Any:
        raise raises[job.job_type]

    @app.before_job("before")
    def careful(job: Job) -> None:
        raise PermanentError("not before", code="NOT_YET")

    @app.middleware("instead")
    async def instead(job: Job, call_next: Any) -> Any:
        return "from the cache"

    def handler(job: Job) -> None:
        ran.append(job.job_type)

    for name in (*raises, "before", "instead"):
        app.job(name, max_retries=1, retry_delay=3600)(handler)
        await app.send(name)
    await work(app)
    rows = connection.execute("select job_type, status, retry_count, error_code from jobqueue.jobs").fetchall()
    assert {row[0]: row[1:] for row in rows} == {
        "retried": ("pending", 1, "Retry"),
        "snoozed": ("pending", 0, None),
        "refused": ("failed", 0, "PermanentError"),
        "unknown": ("pending", 1, "KeyError"),
        "before": ("failed", 0, "NOT_YET"),
        "instead": ("completed", 0, None),
    }
    assert results(connection)["instead"] == "from the cache"
    assert ran == []


async def test_on_failure_hears_the_error_and_whether_a_retry_follows(app: App) -> None:
    heard: list[tuple[str, FailedAttempt]] = []

    @app.on_failure
    async def tell(job: Job, failure: FailedAttempt) -> None:
        heard.append((job.job_type, failure))
        raise RuntimeError("hooks after the fact change nothing")

    @app.job(max_retries=1, retry_delay=3600)
    async def flaky() -> None:
        raise ConnectionError("reset")

    @app.job(max_retries=0)
    def last() -> None:
        raise ConnectionError("again")

    @app.job
    async def snoozes() -> None:
        raise Snooze(3600)

    @app.job(max_runtime=0.2, max_retries=0)
    async def slow() -> None:
        await asyncio.sleep(60)

    for name in ("flaky", "last", "snoozes", "slow"):
        await app.send(name)
    await work(app)
    by_type = dict(heard)
    assert sorted(name for name, _ in heard) == ["flaky", "last", "slow"]
    flaky_one, last_one, slow_one = by_type["flaky"], by_type["last"], by_type["slow"]
    assert (flaky_one.will_retry, flaky_one.status, flaky_one.error_class) == (True, "pending", "transient")
    assert isinstance(flaky_one.error, ConnectionError)
    assert (last_one.will_retry, last_one.status, last_one.message) == (False, "failed", "again")
    assert (slow_one.error, slow_one.code) == (None, "TIMEOUT")


async def test_a_hook_that_fails_afterwards_is_logged_and_changes_nothing(
    app: App, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    @app.after_job
    async def careless(job: Job, result: Any) -> None:
        raise RuntimeError("afterwards")

    @app.job
    async def fine() -> str:
        return "done"

    await app.send("fine")
    await work(app)
    assert results(connection) == {"fine": "done"}
    assert [record.levelname for record in caplog.records if "careless" in record.getMessage()] == ["ERROR"]


async def test_a_worker_tells_when_it_starts_and_stops_and_loses_a_job(app: App, connection: Connection) -> None:
    told: list[tuple[str, Any]] = []
    lost = asyncio.Event()
    app.on_worker_start(lambda worker: told.append(("start", worker)))
    app.on_worker_stopping(lambda worker: told.append(("stopping", worker)))
    app.on_worker_stopped(lambda worker: told.append(("stopped", worker)))

    @app.on_lost
    async def gone(job: Job) -> None:
        told.append(("lost", job.job_type))
        lost.set()

    @app.job
    async def long() -> None:
        told.append(("runs", None))
        # Somebody else has the job: the next beat says so.
        connection.execute("update jobqueue.job set claim_token = gen_random_uuid()")
        worker._lease.beat_now()
        await asyncio.sleep(60)

    await app.send("long")
    worker = await app.make_worker(["long"], 3)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        await lost.wait()
        worker.drain()
        await running
    await app.close()
    info = WorkerInfo(worker.id, worker.name, ("long",), 3)
    assert told == [("start", info), ("runs", None), ("lost", "long"), ("stopping", info), ("stopped", info)]


async def test_a_start_hook_that_fails_keeps_the_worker_from_claiming(app: App, connection: Connection) -> None:
    @app.on_worker_start
    async def check(worker: WorkerInfo) -> None:
        raise RuntimeError("the model is missing")

    @app.job
    async def never() -> None: ...

    await app.send("never")
    with pytest.raises(RuntimeError, match="the model is missing"):
        await work(app)
    assert connection.execute("select status from jobqueue.job").fetchall() == [("pending",)]


async def test_a_cause_is_warned_of_once_and_again_after_it_was_gone(
    connection: Connection, aconnection: Any, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[WorkerWarning] = []
    hooks = Hooks()
    app = App("unused")
    app.hooks = hooks
    app.on_warning(heard.append)
    # as if a worker had kept house all the while
    connection.execute("update jobqueue.maintenance set next_at = now() + interval '1 hour'")
    connection.execute("select jobqueue.create_queue('mail', '{\"warn_backlog\": 2}')")
    connection.execute("select jobqueue.send('mail') from generate_series(1, 3)")
    warnings = Warnings(hooks)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        await warnings.look(aconnection)
    assert [(w.name, w.status, w.detail) for w in heard] == [("backlog: mail", "warn", "more than 2 jobs are ready")]
    connection.execute("select jobqueue.update_queue('mail', '{\"warn_backlog\": 5}')")
    await warnings.look(aconnection)
    connection.execute("select jobqueue.update_queue('mail', '{\"warn_backlog\": 1}')")
    await warnings.look(aconnection)
    assert len(heard) == 2
    assert sum("backlog: mail" in record.getMessage() for record in caplog.records) == 2
    for seconds in (0.1, 3.0, 3.0):
        await warnings.blocked(seconds)
    assert [w.name for w in heard[2:]] == ["blocked event loop"]


async def test_every_worker_looks_for_something_to_warn_of(dsn: str) -> None:
    looked = asyncio.Event()

    async def look(connection: Any) -> None:
        looked.set()

    async def connect() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(dsn, autocommit=True)

    maintainer = Maintainer(connect, uuid4(), None, lambda: None, look=look, look_every=0.05)
    maintainer.start()
    try:
        async with asyncio.timeout(60):
            await looked.wait()
    finally:
        await maintainer.stop()


def test_without_hooks_a_worker_has_nothing_to_ask() -> None:
    app = App("unused")

    @app.job
    async def plain() -> None: ...

    assert make_job_hooks(app.hooks, app.registry) is None
    app.on_worker_start(lambda worker: None)
    assert make_job_hooks(app.hooks, app.registry) is None
    app.after_job(lambda job, result: None)
    assert make_job_hooks(app.hooks, app.registry) is not None


def test_middleware_that_is_not_async_is_refused() -> None:
    app = App("unused")
    with pytest.raises(ConfigurationError, match="must be async"):
        app.middleware(lambda job, call_next: call_next(job))
    with pytest.raises(ConfigurationError, match="must be async"):
        app.job("x", middleware=[lambda job, call_next: None])(lambda: None)
