"""The worker, against a real database: claims, runs, settles, stops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import psycopg
import pytest

from jobqueue import App, Job
from jobqueue.errors import Cancelled, InvalidInput, PermanentError, Retry, Snooze
from jobqueue.worker.worker import Worker

Query = Callable[..., Any]


@pytest.fixture
def app(dsn: str) -> App:
    return App(dsn)


@pytest.fixture
def query(connection: psycopg.Connection[Any]) -> Query:
    def one(text: str, *parameters: Any) -> Any:
        row = connection.execute(text.encode(), parameters).fetchone()
        assert row is not None
        return row[0] if len(row) == 1 else row

    return one


async def run(app: App, **options: Any) -> Worker:
    """Run a worker until nothing is left to do."""
    worker = await app.make_worker(until_idle=True, **options)
    async with asyncio.timeout(60):
        await worker.run()
    await app.close()
    return worker


@contextlib.asynccontextmanager
async def running(app: App, **options: Any) -> AsyncIterator[Worker]:
    """A worker in the background; released at the end."""
    worker = await app.make_worker(**options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.release_now()
        async with asyncio.timeout(60):
            await task
        await app.close()


async def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.02)


async def test_a_job_runs_and_its_result_is_stored(app: App, query: Query) -> None:
    @app.job("double")
    async def double(job: Job, payload: dict[str, int]) -> dict[str, int]:
        job.stats["seen"] = 1
        return {"twice": payload["n"] * 2}

    sent = await app.send("double", {"n": 21})
    await run(app)
    status, result, stats, attempt = query(
        "select status, result, stats, attempt from jobqueue.jobs where id = %s", sent.id
    )
    assert (status, result, stats, attempt) == ("completed", {"twice": 42}, {"seen": 1}, 1)


async def test_a_worker_runs_more_jobs_than_it_has_slots(app: App, query: Query) -> None:
    @app.job("wait")
    async def wait(job: Job) -> None:
        await asyncio.sleep(0.001)

    await app.send_many("wait", [{"n": n} for n in range(1000)])
    await run(app, concurrency=10)
    assert query("select count(*) from jobqueue.job where status = 'completed'") == 1000
    assert query("select count(*) from jobqueue.claim_batch") == 0


async def test_no_more_handlers_run_at_once_than_the_concurrency(app: App) -> None:
    now = most = 0

    @app.job("count")
    async def count() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1

    await app.send_many("count", [{} for _ in range(60)])
    await run(app, concurrency=7)
    assert most == 7


async def test_threads_run_plain_functions_beside_the_loop(app: App, query: Query) -> None:
    names: set[str] = set()

    @app.job("blocking")
    def blocking(job: Job) -> str:
        names.add(threading.current_thread().name)
        job.sync.progress(1, 2, "half")
        time.sleep(0.01)
        return threading.current_thread().name

    await app.send_many("blocking", [{} for _ in range(20)])
    await run(app, concurrency=4)
    assert query("select count(*) from jobqueue.job where status = 'completed'") == 20
    assert threading.main_thread().name not in names


async def test_context_variables_do_not_leak_into_the_next_job(app: App) -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    seen: list[int] = []

    @app.job("leak")
    async def leak() -> None:
        seen.append(variable.get())
        variable.set(7)

    await app.send_many("leak", [{} for _ in range(5)])
    await run(app)
    assert seen == [0] * 5


async def test_a_failure_is_retried_and_every_reason_is_kept(app: App, query: Query) -> None:
    @app.job("fails", max_retries=2, retry_delay=0)
    async def fails(job: Job) -> None:
        raise RuntimeError(f"reason {job.attempt}")

    sent = await app.send("fails")
    for _ in range(3):
        await run(app)
    assert query("select status, retry_count, error_code from jobqueue.jobs where id = %s", sent.id) == (
        "failed", 2, "RuntimeError",
    )  # fmt: skip
    reasons = query("select array_agg(error_message order by attempt) from jobqueue.attempt where job_id = %s", sent.id)
    assert reasons == ["reason 1", "reason 2", "reason 3"]


@pytest.mark.parametrize(
    ("error", "status", "error_class"),
    [
        (PermanentError("no"), "failed", "permanent"),
        (InvalidInput("bad"), "failed", "invalid"),
        (Retry(after=60), "pending", "transient"),
        (ConnectionError("gone"), "pending", "transient"),
    ],
)
async def test_what_a_handler_raises_decides_how_its_attempt_ends(
    app: App, query: Query, error: Exception, status: str, error_class: str
) -> None:
    @app.job("raises")
    async def raises() -> None:
        raise error

    sent = await app.send("raises")
    await run(app)
    assert query("select status, error_class from jobqueue.jobs where id = %s", sent.id) == (status, error_class)


async def test_a_snooze_spends_no_retry(app: App, query: Query) -> None:
    @app.job("sleepy")
    async def sleepy() -> None:
        raise Snooze(3600)

    sent = await app.send("sleepy")
    await run(app)
    assert query(
        "select status, retry_count, run_at > now() + interval '50 min' from jobqueue.jobs where id = %s", sent.id
    ) == ("pending", 0, True)


async def test_a_handler_may_give_its_job_up(app: App, query: Query) -> None:
    @app.job("gives_up")
    async def gives_up() -> None:
        raise Cancelled("nothing to do here")

    sent = await app.send("gives_up")
    await run(app)
    assert query("select status, status_reason from jobqueue.jobs where id = %s", sent.id) == (
        "cancelled", "nothing to do here",
    )  # fmt: skip


async def test_a_result_that_is_not_json_fails_the_attempt_for_good(app: App, query: Query) -> None:
    @app.job("odd")
    async def odd() -> object:
        return object()

    sent = await app.send("odd")
    await run(app)
    assert query("select status, error_code, retry_count from jobqueue.jobs where id = %s", sent.id) == (
        "failed", "RESULT_INVALID", 0,
    )  # fmt: skip


async def test_a_time_out_stops_an_async_handler(app: App, query: Query) -> None:
    stopped = asyncio.Event()

    @app.job("hangs", timeout=1, max_retries=0)
    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.set()
            raise

    sent = await app.send("hangs")
    await run(app)
    assert stopped.is_set()
    assert query("select status, error_code from jobqueue.jobs where id = %s", sent.id) == ("failed", "TIMEOUT")
    assert query("select outcome from jobqueue.attempt where job_id = %s", sent.id) == "timed_out"


async def test_a_time_out_ends_the_attempt_of_a_thread_that_goes_on(app: App, query: Query) -> None:
    release = threading.Event()

    @app.job("hangs", timeout=1, max_retries=0)
    def hangs() -> None:
        release.wait(20)

    sent = await app.send("hangs")
    async with running(app, concurrency=1):
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "failed")
        release.set()
    assert query("select error_code from jobqueue.jobs where id = %s", sent.id) == "TIMEOUT"


async def test_a_cancel_stops_a_running_handler(app: App, query: Query) -> None:
    @app.job("long")
    async def long() -> None:
        await asyncio.sleep(60)

    sent = await app.send("long")
    async with running(app):
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "processing")
        assert query("select jobqueue.cancel(%s, 'not needed')", sent.id) == "processing"
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "cancelled")


async def test_a_forced_cancel_makes_the_claim_stale_and_the_handler_stops(app: App, query: Query) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    @app.job("long")
    async def long() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    sent = await app.send("long")
    async with running(app):
        await eventually(started.is_set)  # a job that is only `processing` may still wait inside the worker
        assert query("select jobqueue.cancel(%s, 'at once', true)", sent.id) == "cancelled"
        async with asyncio.timeout(60):
            await stopped.wait()
    assert query("select status from jobqueue.jobs where id = %s", sent.id) == "cancelled"


async def test_a_pause_takes_effect_at_the_next_checkpoint_and_resume_goes_on_after_it(app: App, query: Query) -> None:
    steps: list[int] = []
    go_on = asyncio.Event()

    @app.job("steps", pausable=True)
    async def steps_of(job: Job) -> None:
        first = job.last_checkpoint.data["next"] if job.last_checkpoint else 0
        for step in range(first, 4):
            steps.append(step)
            if step == 1:
                await go_on.wait()
            await job.checkpoint(f"step {step}", {"next": step + 1})

    sent = await app.send("steps")
    async with running(app):
        await eventually(lambda: steps == [0, 1])
        assert query("select jobqueue.pause(%s, 'lunch')", sent.id) == "processing"
        go_on.set()
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "paused")
        query("select jobqueue.resume(%s, 'back')", sent.id)
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "completed")
    assert steps == [0, 1, 2, 3]


async def test_batch_handlers_get_many_jobs_and_answer_for_each(app: App, query: Query) -> None:
    sizes: list[int] = []

    @app.job("batch", batch_size=50, max_retries=0)
    async def batch(jobs: list[Job]) -> list[Any]:
        sizes.append(len(jobs))
        return [PermanentError("odd") if job.payload["n"] % 2 else job.payload["n"] for job in jobs]

    await app.send_many("batch", [{"n": n} for n in range(200)])
    await run(app)
    assert max(sizes) == 50
    assert query("select count(*) from jobqueue.job where status = 'completed' and result = payload->'n'") == 100
    assert query("select count(*) from jobqueue.job where status = 'failed' and error_class = 'permanent'") == 100


async def test_progress_reaches_the_database_and_the_last_word_counts(app: App, query: Query) -> None:
    @app.job("reports")
    async def reports(job: Job) -> None:
        for n in range(500):
            await job.progress(n + 1, 1000, f"item {n + 1}")
        await asyncio.sleep(0.6)
        raise PermanentError("stop here")

    sent = await app.send("reports")
    await run(app)
    done, pct, message, version = query(
        "select progress_done, progress_pct, progress_message, version from jobqueue.jobs where id = %s", sent.id
    )
    assert (done, pct, message) == (500, 50, "item 500")
    assert version < 20


async def test_a_worker_leaves_job_types_alone_that_it_has_no_handler_for(app: App, query: Query) -> None:
    @app.job("known", queue="shared")
    async def known() -> None: ...

    await app.send("known")
    query("select created from jobqueue.send('shared', '{}', '{\"job_type\": \"of another release\"}')")
    await run(app)
    assert query("select status, attempt from jobqueue.jobs where job_type = 'of another release'") == ("pending", 0)
    assert query("select status from jobqueue.jobs where job_type = 'known'") == "completed"


async def test_several_queues_are_served_by_priority(app: App) -> None:
    order: list[int] = []

    @app.job("a")
    async def a(job: Job) -> None:
        order.append(job.payload["n"])

    @app.job("b")
    async def b(job: Job) -> None:
        order.append(job.payload["n"])

    for n in range(6):
        await app.send("ab"[n % 2], {"n": n}, priority=n)
    await run(app, concurrency=1)
    assert order == [5, 4, 3, 2, 1, 0]


async def test_a_drained_worker_finishes_what_runs_and_gives_back_what_waits(app: App, query: Query) -> None:
    started = asyncio.Event()

    @app.job("slow")
    async def slow() -> None:
        started.set()
        await asyncio.sleep(0.3)

    await app.send_many("slow", [{} for _ in range(10)])
    worker = await app.make_worker(concurrency=2)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        await started.wait()
        worker.drain()
        await task
    await app.close()
    counts = query(
        "select count(*) filter (where status = 'completed'), count(*) filter (where status = 'pending'),"
        " coalesce(sum(retry_count), 0) from jobqueue.job"
    )
    assert counts[0] >= 2
    assert counts[0] + counts[1] == 10
    assert counts[2] == 0


async def test_released_handlers_go_back_without_spending_a_retry(app: App, query: Query) -> None:
    started = asyncio.Event()

    @app.job("long")
    async def long() -> None:
        started.set()
        await asyncio.sleep(60)

    sent = await app.send("long")
    async with running(app):
        async with asyncio.timeout(60):
            await started.wait()
    assert query("select status, retry_count, attempt from jobqueue.jobs where id = %s", sent.id) == ("pending", 0, 1)
    assert query("select outcome from jobqueue.attempt where job_id = %s", sent.id) == "released"


async def test_a_delayed_job_runs_when_it_is_due(app: App, query: Query) -> None:
    @app.job("later")
    async def later() -> None: ...

    sent = await app.send("later", delay=1)
    async with running(app):
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "completed")
    late = query("select extract(epoch from started_at - run_at)::float8 from jobqueue.jobs where id = %s", sent.id)
    assert late >= 0


async def test_a_job_of_a_producer_that_commits_late_is_found(app: App, dsn: str, query: Query) -> None:
    """Its place in the line lies below the floor of a busy worker when it becomes visible."""

    @app.job("late")
    async def late() -> None: ...

    await app.send("late")
    async with await psycopg.AsyncConnection.connect(dsn) as producer:
        row = await (await producer.execute("select id from jobqueue.send('late')")).fetchone()
        assert row is not None
        async with running(app, concurrency=5):
            for _ in range(20):
                await app.send_many("late", [{} for _ in range(100)])
            await eventually(lambda: query("select count(*) from jobqueue.job where status = 'completed'") == 2001)
            await producer.commit()
            await eventually(lambda: query("select status from jobqueue.jobs where id = %s", row[0]) == "completed")


async def test_the_transaction_of_a_handler_completes_its_job(
    app: App, query: Query, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("create table effect (n int)")

    @app.job("writes")
    async def writes(job: Job) -> None:
        async with job.transaction() as connection:
            await connection.execute("insert into effect values (1)")

    sent = await app.send("writes")
    await run(app)
    assert query("select count(*) from effect") == 1
    assert query("select status from jobqueue.jobs where id = %s", sent.id) == "completed"
