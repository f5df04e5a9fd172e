"""The connector's own ways: how it is told where the jobs live, how it is woken, which rights it needs, what it refuses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import procrastinate
import psycopg
import pytest
from procrastinate import exceptions
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool

from jobqueue.procrastinate import JobqueueConnector, SyncJobqueueConnector, backstage, job_uuid
from tests.procrastinate.engines import QUIET, ConnectorEngine, Observer
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


async def test_an_idle_worker_is_woken_by_a_new_job_and_by_one_whose_time_has_come(dsn: str) -> None:
    engine, seen = ConnectorEngine(dsn), Observer()
    app = engine.app()

    @app.task(name="t")
    async def task() -> None:
        pass

    async with app.open_async(), engine.worker(app, fetch_job_polling_interval=600):
        for number in (1, 2):
            seen.deferred(await task.defer_async())
            assert await seen.until(app.job_manager, number, "succeeded")
        seen.deferred(await task.configure(schedule_in={"milliseconds": 200}).defer_async())
        assert await seen.until(app.job_manager, 3, "succeeded")


@pytest.mark.parametrize("given", ["dsn", "conninfo", "kwargs", "environment", "pool"])
async def test_where_the_jobs_live_can_be_said_as_procrastinates_connectors_take_it(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    if given == "environment":
        monkeypatch.setenv("JOBQUEUE_DSN", dsn)
    ways: dict[str, Any] = {
        "dsn": {"dsn": dsn}, "conninfo": {"conninfo": dsn}, "kwargs": {"kwargs": conninfo_to_dict(dsn)},
        "environment": {}, "pool": {},
    }  # fmt: skip
    app = procrastinate.App(connector=JobqueueConnector(**ways[given]))

    @app.task(name="t")
    async def task() -> None:
        pass

    pool = AsyncConnectionPool(dsn, open=False, min_size=1) if given == "pool" else None
    if pool is not None:
        await pool.open()
    async with app.open_async(pool):
        await task.defer_async()
        await asyncio.wait_for(app.run_worker_async(wait=False, **QUIET), 60)
    if pool is not None:
        await pool.close()
    assert rows(connection, "select status from jobqueue.job") == [("completed",)]
    if given != "pool":
        blocking = procrastinate.App(connector=SyncJobqueueConnector(**ways[given]))
        with blocking.open():
            assert blocking.job_manager.check_connection()


async def test_the_role_of_workers_is_enough_for_an_application_and_the_producers_for_deferring(
    dsn: str, connection: Connection
) -> None:
    def acting_as(role: str) -> procrastinate.App:
        app = procrastinate.App(connector=JobqueueConnector(make_conninfo(dsn, options=f"-c role={role}"), min_size=1))

        @app.task(name="t", lock="L", queueing_lock="Q", retry=procrastinate.RetryStrategy(max_attempts=1))
        async def task() -> None:
            raise OSError

        return app

    producer = acting_as("jobqueue_producer")
    async with producer.open_async():
        id = await producer.tasks["t"].defer_async()
        with pytest.raises(exceptions.AlreadyEnqueued):
            await producer.tasks["t"].defer_async()
        assert len(list(await producer.job_manager.list_jobs_async())) == 1
        with pytest.raises(exceptions.ConnectorException):
            await producer.job_manager.finish_job_by_id_async(id, procrastinate.jobs.Status.FAILED, delete_job=False)
    worker = acting_as("jobqueue_worker")
    async with worker.open_async():
        await asyncio.wait_for(worker.run_worker_async(wait=False, **QUIET), 60)
        assert (await worker.job_manager.get_job_status_async(id)).value == "failed"
        await worker.job_manager.delete_old_jobs(nb_hours=0, include_failed=True)
    assert value(connection, "select count(*) from jobqueue.job") == 0


async def test_jobs_of_other_applications_are_none_of_a_stock_workers_business(
    dsn: str, connection: Connection
) -> None:
    connection.execute("select jobqueue.send('ours', '{}')")
    app = ConnectorEngine(dsn).app()
    async with app.open_async():
        await app.configure_task("theirs").defer_async()
        await asyncio.wait_for(app.run_worker_async(wait=False, **QUIET), 60)
        listed = [job.task_name for job in await app.job_manager.list_jobs_async()]
    found = dict(rows(connection, "select job_type, status from jobqueue.job"))
    assert found == {"ours": "pending", "theirs": "failed"}, "as procrastinate does with a task that it does not know"
    assert listed == ["theirs"]


async def test_a_task_with_a_time_limit_or_a_label_has_it_however_it_is_deferred(
    dsn: str, connection: Connection
) -> None:
    app = ConnectorEngine(dsn).app()
    types = [
        {
            "name": "t",
            "queue": "registered",
            "label": "Mail to {payload.to}",
            "options": {"timeout": 60},
            "pausable": True,
        }
    ]
    connection.execute("select jobqueue.register_job_types(%s)", [json.dumps(types)])
    async with app.open_async():
        await app.configure_task("t").defer_async(to="Ann")
    row = rows(connection, "select display_name, options, pausable from jobqueue.job")
    assert row == [("Mail to Ann", {"timeout": 60}, True)]
    assert rows(connection, "select timeout from jobqueue.queue where name = 'default'") == [(None,)]


async def test_what_cannot_be_stored_is_refused_with_the_reason(dsn: str, connection: Connection) -> None:
    app = ConnectorEngine(dsn).app()
    async with app.open_async():
        for options, arguments, reason in (
            ({"queue": "no spaces"}, {}, "cannot be the name of a queue"),
            ({}, {"text": "x" * 9_000_000}, "payload is too large"),
        ):
            with pytest.raises(exceptions.ConnectorException, match=reason):
                await app.configure_task("t", **options).defer_async(**arguments)
    assert value(connection, "select count(*) from jobqueue.job") == 0


async def test_a_missing_schema_is_named_and_can_be_applied_from_procrastinate(empty_dsn: str) -> None:
    app = ConnectorEngine(empty_dsn).app()
    async with app.open_async():
        assert not await app.check_connection_async()
        with pytest.raises(exceptions.ConnectorException, match="jobqueue migrate up"):
            await app.configure_task("t").defer_async()
        await app.schema_manager.apply_schema_async()
        assert await app.check_connection_async()
        assert job_uuid(await app.configure_task("t").defer_async()).version == 7


async def test_what_was_claimed_ahead_and_has_waited_goes_back_and_can_be_aborted_before_it_starts(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backstage, "WAITED_TOO_LONG", 3600.0)
    app = ConnectorEngine(dsn).app()
    manager = app.job_manager
    waiting = "select count(*) from jobqueue.job where status = 'pending'"
    async with app.open_async():
        ids = await app.configure_task("t").batch_defer_async(*({} for _ in range(20)))
        worker = await manager.register_worker()
        connector: Any = app.connector
        behind = connector._backstages[job_uuid(worker)]
        # As if it had just finished a hundred jobs, however long the next lines take.
        behind._finished.append((asyncio.get_running_loop().time() + 3600, 100))
        assert await manager.fetch_job(queues=None, worker_id=worker) is not None
        assert value(connection, waiting) == 0, "all were claimed"
        assert await manager.cancel_job_by_id_async(ids[10], abort=True)
        behind._lease.beat_now()
        async with asyncio.timeout(60):
            while (await manager.get_job_status_async(ids[10])).value != "aborted":
                await asyncio.sleep(0.01)
        for held in behind._ready:
            held.arrived -= 7200
        async with asyncio.timeout(60):
            while value(connection, waiting) < 18:
                await asyncio.sleep(0.01)
        assert value(connection, "select sum(retry_count) from jobqueue.job") == 0
        await manager.unregister_worker(worker)
    assert value(connection, waiting) == 19, "a worker that goes gives back what it has"


async def test_a_worker_that_is_asked_to_drain_or_cannot_beat_starts_nothing_more(
    dsn: str, connection: Connection
) -> None:
    app = ConnectorEngine(dsn).app()
    manager = app.job_manager
    async with app.open_async():
        ids = await app.configure_task("t").batch_defer_async({}, {})
        worker = await manager.register_worker()
        connector: Any = app.connector
        behind = connector._backstages[job_uuid(worker)]
        job = await manager.fetch_job(queues=None, worker_id=worker)
        assert job is not None
        behind._fence(True)
        assert behind.held[str(job_uuid(ids[0]))].job.cancel_requested, "its lease may end"
        behind._fence(False)
        value(connection, "select jobqueue.drain_worker(%s, 'deploy')", [job_uuid(worker)])
        behind._lease.beat_now()
        async with asyncio.timeout(60):
            while not behind._draining:
                await asyncio.sleep(0.01)
        assert await manager.fetch_job(queues=None, worker_id=worker) is None
