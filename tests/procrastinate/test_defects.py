"""What is wrong with procrastinate's own engine (D1 to D15 of the comparison), each as a test that passes here.

D1 a claim per job, eight statements per job · D2 throughput of one commit at a time · D3 two notifications per insert
D4 no fence · D5 no recovery · D6 a busy event loop loses its jobs · D7 a retry that meets its twin is stuck
D8 a notification is lost · D9 a restart of the database ends the worker · D10 a job for later blocks its lock
D11 blocking tasks cannot be stopped · D12 no result, no traceback, no progress · D13 clean-up reads all jobs
D14 waits overflow · D15 no ledger of migrations, no time zones
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncIterator
from typing import Any

import procrastinate
import psycopg
import pytest
from procrastinate.jobs import Status

import jobqueue
from jobqueue.procrastinate import JobqueueConnector, adopt, job_uuid, keep_results, options
from jobqueue.procrastinate.listening import Doorbell
from jobqueue.procrastinate.statements import LONGEST_WAIT
from jobqueue.worker.wake import Wake
from tests.procrastinate import tasks_app
from tests.procrastinate.engines import QUIET, ConnectorEngine, Observer
from tests.support.server import arows, value

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[procrastinate.App]:
    """An open application on the connector."""
    made = procrastinate.App(connector=JobqueueConnector(dsn, min_size=1))
    async with made.open_async():
        yield made


def backstage(app: procrastinate.App) -> Any:
    """What works behind the only worker of an application."""
    connector = app.connector
    assert isinstance(connector, JobqueueConnector)
    (only,) = connector._backstages.values()
    return only


async def run(app: procrastinate.App, **more: Any) -> None:
    """The stock worker, until nothing is ready."""
    await asyncio.wait_for(app.run_worker_async(wait=False, **QUIET, **more), 60)


async def test_jobs_are_claimed_and_settled_many_at_a_time_and_not_by_one_commit_each(
    app: procrastinate.App, connection: Connection
) -> None:
    """D1, D2, D3."""

    @app.task(name="quick")
    async def quick() -> None:
        pass

    connection.execute("listen jobqueue_ready")
    await quick.batch_defer_async(*({} for _ in range(1200)))
    statements = []

    @app.task(name="last", priority=-1)
    async def last() -> None:
        behind = backstage(app)
        statements.append(behind._settler.statements + behind._fetcher.statements)

    await last.defer_async()
    await run(app)
    assert statements[0] / 1200 < 4, "statements per job; its own engine needs 8"
    done = await app.job_manager.list_queues_async()
    assert [queue["succeeded"] for queue in done] == [1201]
    claims = value(connection, "select count(distinct started_at) from jobqueue.job")
    assert claims < 600, "jobs were claimed in batches"
    # a lone result is written at once, so that on a quick machine most of them are
    transactions = value(connection, "select count(distinct completed_at) from jobqueue.job")
    assert transactions < 1201, "results that came during a write went with the next one"
    assert len(list(connection.notifies(timeout=0))) < 20, "its own engine notifies twice per job, for all to hear"
    # A beat adds an estimate to the job that it finds running, and what was claimed ahead and waits too long goes back: on a
    # slow machine that happens to some.
    undisturbed = "select array_agg(distinct version) from jobqueue.job where attempt = 1 and heartbeat_at is null"
    assert value(connection, undisturbed) == [3], "a job is written when it is sent, claimed and completed, and no more"


async def test_a_worker_that_lost_its_job_cannot_finish_the_attempt_of_another(
    app: procrastinate.App, connection: Connection
) -> None:
    """D4."""
    manager = app.job_manager
    await app.configure_task("t").defer_async()
    slow = await manager.register_worker()
    job = await manager.fetch_job(queues=None, worker_id=slow)
    assert job is not None
    assert job.id is not None
    lose(connection, job.id)
    other = await manager.register_worker()
    again = await manager.fetch_job(queues=None, worker_id=other)
    assert again is not None
    assert again.id == job.id
    connector: Any = app.connector
    connector._backstages[job_uuid(other)].held.clear()  # another process
    await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
    await manager.unregister_worker(slow)
    assert (await manager.get_job_status_async(job.id)) is Status.DOING


async def test_jobs_of_a_killed_worker_run_again_without_a_task_for_it(
    app: procrastinate.App, connection: Connection
) -> None:
    """D5."""
    ran = []

    @app.task(name="t")
    async def task() -> None:
        ran.append(1)

    id = await task.defer_async()
    dead = await app.job_manager.register_worker()
    assert await app.job_manager.fetch_job(queues=None, worker_id=dead) is not None
    connector: Any = app.connector
    behind = connector._backstages.pop(job_uuid(dead))
    await asyncio.to_thread(behind._lease.stop)  # killed: nothing is beaten, written or given back any more
    lose(connection, id)
    await run(app)
    assert ran == [1]
    await behind.stop()


def lose(connection: Connection, id: int) -> None:
    """As if the lease of a job had run out."""
    uuid = job_uuid(id)
    connection.execute("update jobqueue.job set lease_until = now() - interval '1 s' where id = %s", [uuid])
    connection.execute("update jobqueue.claim_batch set check_at = now() where %s = any (job_ids)", [uuid])
    assert value(connection, "select jobqueue.rescue(10)") == 1


async def test_a_worker_whose_event_loop_is_busy_keeps_its_jobs(app: procrastinate.App, connection: Connection) -> None:
    """D6."""
    manager = app.job_manager
    await app.configure_task("t").defer_async()
    worker = await manager.register_worker()
    assert await manager.fetch_job(queues=None, worker_id=worker) is not None
    connection.execute("update jobqueue.worker set heartbeat_at = now() - interval '1 min'")
    backstage(app)._lease.beat_now()
    deadline = time.monotonic() + 60
    while value(connection, "select bool_or(heartbeat_at < now() - interval '30 s') from jobqueue.worker"):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the event loop is blocked all the while
    assert value(connection, "select count(*) from jobqueue.procrastinate_prune(30)") == 0
    assert list(await manager.get_stalled_jobs()) == []
    connection.execute("update jobqueue.worker set heartbeat_at = now() - interval '1 min'")
    await manager.prune_stalled_workers(30)
    assert len(list(await manager.list_jobs_async(status="doing"))) == 1, "pruning takes no job away"


async def test_a_retry_whose_twin_was_deferred_meanwhile_is_not_stuck(app: procrastinate.App) -> None:
    """D7."""
    runs = []

    @app.task(name="sync", queueing_lock="sync", retry=1)
    async def synchronize() -> None:
        runs.append(1)
        if len(runs) == 1:
            await synchronize.defer_async()
            raise OSError

    await synchronize.defer_async()
    await run(app)
    assert [job.status for job in await app.job_manager.list_jobs_async()] == ["succeeded", "succeeded"]
    assert len(runs) == 3


async def test_a_notification_that_comes_during_an_empty_fetch_is_delivered_after_it() -> None:
    """D8: the stock worker clears its event when the fetch has returned."""
    bell = Doorbell(Wake(None, None))
    event = asyncio.Event()
    heard = asyncio.Event()

    async def notify(kind: str, id: int) -> None:
        event.set()
        heard.set()

    watching = asyncio.create_task(bell.watch(notify))
    bell.fetching()
    await bell.fetched(False)
    event.clear()
    await asyncio.wait_for(heard.wait(), 60)
    heard.clear()
    bell.fetching()
    bell.wake.ring()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not heard.is_set(), "it would be forgotten"
    await bell.fetched(False)
    event.clear()  # as the worker does, in the same step
    await asyncio.wait_for(heard.wait(), 60)
    assert event.is_set()
    watching.cancel()
    await bell.wake.stop()


async def test_a_worker_outlives_the_loss_of_its_database(dsn: str, connection: Connection) -> None:
    """D9: all connections are cut twice while it works; jobs and a periodic task go on."""
    made = procrastinate.App(connector=JobqueueConnector(dsn, min_size=1))
    ran: list[int] = []

    @made.task(name="t")
    async def task(n: int) -> None:
        ran.append(n)
        if n % 20 == 10:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )

    engine = ConnectorEngine(dsn)
    async with made.open_async():
        await task.batch_defer_async(*({"n": n} for n in range(40)))
        async with engine.worker(made, fetch_job_polling_interval=0.2):
            async with asyncio.timeout(120):
                while value(connection, "select count(*) from jobqueue.job where status <> 'completed'"):
                    await asyncio.sleep(0.02)
    assert sorted(ran) == list(range(40)), "each job ran once"


async def test_a_job_for_later_does_not_block_its_lock(app: procrastinate.App) -> None:
    """D10."""
    ran = []

    @app.task(name="t", lock="L")
    async def task(n: int) -> None:
        ran.append(n)

    await task.configure(schedule_in={"days": 30}).defer_async(n=1)
    await task.defer_async(n=2)
    await run(app)
    assert ran == [2]


async def test_a_lock_holds_over_several_queues(app: procrastinate.App) -> None:
    """Limits of ours count per queue; a lock of procrastinate does not."""
    running, most = 0, 0

    @app.task(name="t", lock="L")
    async def task() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    for queue in ("one", "two", "one"):
        await task.configure(queue=queue).defer_async()
    engine = ConnectorEngine("")
    seen = Observer()
    seen.ids = sorted(job.id for job in await app.job_manager.list_jobs_async() if job.id)
    async with engine.worker(app, concurrency=3, fetch_job_polling_interval=0.1):
        for number in (1, 2, 3):
            await seen.until(app.job_manager, number, "succeeded")
    assert most == 1


async def test_a_blocking_task_is_stopped_in_a_process_and_by_its_time_limit(dsn: str, connection: Connection) -> None:
    """D11."""
    theirs = tasks_app.make(dsn)
    native = adopt(theirs)
    async with theirs.open_async():
        worker = await native.make_worker(concurrency=4)
        running = asyncio.create_task(worker.run())
        await until(lambda: value(connection, "select count(*) from jobqueue.job_type") > 3)
        id = await tasks_app.spin.defer_async()
        limited = await tasks_app.limited.defer_async()
        await until(lambda: status(connection, id) == "processing")
        await until(lambda: worker.held and any(held.started for held in worker.held.values()))
        assert await theirs.job_manager.cancel_job_by_id_async(id, abort=True)
        await until(lambda: status(connection, id) == "cancelled")
        await until(lambda: status(connection, limited) == "failed")
        worker.drain()
        await asyncio.wait_for(running, 60)
    row = connection.execute("select error_code, error_class from jobqueue.job where id = %s", [job_uuid(limited)])
    assert row.fetchone() == ("TIMEOUT", "transient")


async def until(condition: Any) -> None:
    """Wait for a condition, at most 60 s."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def status(connection: Connection, id: int) -> str:
    """Our status of a job."""
    return str(value(connection, "select status from jobqueue.job where id = %s", [job_uuid(id)]))


@pytest.mark.parametrize("native", [False, True])
async def test_results_tracebacks_and_progress_are_kept(
    app: procrastinate.App, aconnection: psycopg.AsyncConnection[tuple[Any, ...]], native: bool
) -> None:
    """D12: under the stock worker with a middleware, under ours without."""

    @app.task(name="counts")
    async def counts() -> dict[str, int]:
        job = jobqueue.current_job()
        assert job is not None
        await job.progress(3, 4, "almost")
        return {"pages": 4}

    @app.task(name="in_thread")
    def in_thread() -> int:
        job = jobqueue.current_job()
        assert job is not None
        job.sync.progress(1, 2)
        return 7

    @app.task(name="breaks")
    async def breaks() -> None:
        raise PermissionError("the door is locked")

    for task in (counts, in_thread, breaks):
        await task.defer_async()
    if native:
        await asyncio.wait_for(adopt(app).run_worker(until_idle=True), 60)
    else:
        await run(app, worker_middleware=[keep_results])
    rows = await arows(
        aconnection, "select job_type, result, progress_message, progress_done from jobqueue.job order by created_at"
    )
    assert rows == [("counts", {"pages": 4}, "almost", 3), ("in_thread", 7, None, 1), ("breaks", None, None, None)]
    ((message, detail),) = await arows(aconnection, "select error_message, error_detail from jobqueue.attempt")
    assert message == "the door is locked"
    assert "raise PermissionError" in detail


async def test_clean_up_reads_only_what_is_old_and_old_jobs_go_by_themselves(
    app: procrastinate.App, connection: Connection
) -> None:
    """D13."""
    await app.configure_task("t").batch_defer_async(*({} for _ in range(300)))
    ids = [job.id for job in await app.job_manager.list_jobs_async()]
    for id in ids[:3]:
        assert id is not None
        await app.job_manager.finish_job_by_id_async(id, Status.SUCCEEDED, delete_job=False)
    old = [job_uuid(id) for id in ids[:2] if id is not None]
    connection.execute(
        "update jobqueue.job set created_at = now() - interval '9 days', completed_at = now() - interval '8 days'"
        " where id = any (%s)",
        [old],
    )
    plan = "\n".join(
        row[0]
        for row in connection.execute(
            "explain select from jobqueue.job j where j.tenant = 'default' and j.created_at < now() - interval '5 h'"
        )
    )
    assert "job_list" in plan
    await app.job_manager.delete_old_jobs(nb_hours=24 * 8 + 1)
    assert value(connection, "select count(*) from jobqueue.job") == 300
    await app.job_manager.delete_old_jobs(nb_hours=24, queue="another")
    assert value(connection, "select count(*) from jobqueue.job") == 300
    connection.execute("select jobqueue.maintain(null, array['retention'])")
    assert value(connection, "select count(*) from jobqueue.job") == 298, "kept for 7 days"
    await app.job_manager.delete_old_jobs(nb_hours=0)
    assert value(connection, "select count(*) from jobqueue.job") == 297


@pytest.mark.parametrize("native", [False, True])
async def test_a_wait_beyond_what_a_date_can_hold_is_a_month_and_not_for_ever(
    app: procrastinate.App, connection: Connection, native: bool
) -> None:
    """D14."""

    @app.task(name="t", retry=procrastinate.RetryStrategy(exponential_wait=10**9))
    async def task() -> None:
        raise OSError

    await task.defer_async()
    connection.execute("update jobqueue.job set retry_count = 40, max_retries = 43")
    if native:
        await asyncio.wait_for(adopt(app).run_worker(until_idle=True), 60)
    else:
        await run(app)
    row = connection.execute("select status, retry_count, run_at - now() from jobqueue.job").fetchone()
    assert row is not None
    assert row[:2] == ("pending", 41)
    assert LONGEST_WAIT - datetime.timedelta(minutes=5) < row[2] <= LONGEST_WAIT


async def test_the_schema_has_a_ledger_and_periodic_tasks_have_time_zones(
    app: procrastinate.App, connection: Connection
) -> None:
    """D15."""
    await app.schema_manager.apply_schema_async()
    assert value(connection, "select count(*) from jobqueue.schema_migration") > 3, "and applying it again did nothing"

    @app.periodic(cron="30 7 * * *")
    @app.task(name="morning")
    @options(time_zone="Europe/Berlin")
    async def morning(timestamp: int) -> None:
        pass

    await asyncio.wait_for(adopt(app).run_worker(until_idle=True), 60)
    row = connection.execute("select time_zone, next_at at time zone 'Europe/Berlin' from jobqueue.schedule").fetchone()
    assert row is not None
    assert row[0] == "Europe/Berlin"
    assert (row[1].hour, row[1].minute) == (7, 30)
