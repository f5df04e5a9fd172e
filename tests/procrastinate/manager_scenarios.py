"""The same calls for both stock workers: what the job manager does, and what only procrastinate's own worker has."""

from __future__ import annotations

import asyncio
from typing import Any

import procrastinate
import psycopg
from procrastinate import exceptions, jobs
from procrastinate.job_context import AbortReason

from tests.procrastinate.engines import Engine, Observer
from tests.procrastinate.scenarios import Scenario, now

WITHOUT_OURS: dict[str, Scenario] = {}
"""Scenarios in which our worker has no part."""


def without_ours(scenario: Scenario) -> Scenario:
    WITHOUT_OURS[scenario.__name__] = scenario
    return scenario


@without_ours
async def the_worker_deletes_ended_jobs(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="t")
    async def task(fails: bool) -> None:
        if fails:
            raise ValueError

    async with app.open_async():
        for condition in ("never", "successful", "always"):
            seen.deferred(*await task.batch_defer_async({"fails": False}, {"fails": True}))
            await engine.work(app, delete_jobs=condition)
        return await seen.statuses(app.job_manager)


@without_ours
async def a_worker_that_stops_aborts_what_takes_too_long(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    started = asyncio.Semaphore(0)

    @app.task(name="plain", pass_context=True)
    async def plain(context: procrastinate.JobContext) -> None:
        started.release()
        try:
            await asyncio.sleep(600)
        finally:
            seen.log.append(context.abort_reason() is AbortReason.SHUTDOWN)

    @app.task(name="again", retry=True)
    async def again() -> None:
        started.release()
        await asyncio.sleep(600)

    async with app.open_async():
        seen.deferred(await plain.defer_async(), await again.defer_async())
        async with engine.worker(app, concurrency=2, shutdown_graceful_timeout=0.05):
            await asyncio.wait_for(started.acquire(), 60)
            await asyncio.wait_for(started.acquire(), 60)
        return seen.log, await seen.statuses(app.job_manager)


@without_ours
async def jobs_are_cancelled_before_they_run(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        manager = app.job_manager
        for _ in range(4):
            seen.deferred(await app.configure_task("t", queueing_lock=None).defer_async())
        one, two, three, four = seen.ids
        answers = [
            await manager.cancel_job_by_id_async(one),
            await manager.cancel_job_by_id_async(one),
            await manager.cancel_job_by_id_async(two, delete_job=True),
            await manager.cancel_job_by_id_async(two),
            await manager.cancel_job_by_id_async(123456789),
        ]
        answers.append(await asyncio.to_thread(manager.cancel_job_by_id, three))
        await manager.finish_job_by_id_async(four, jobs.Status.SUCCEEDED, delete_job=False)
        answers.append(await manager.cancel_job_by_id_async(four, abort=True))
        answers.append(await seen.error(lambda: manager.get_job_status_async(two)))
        return answers, await seen.statuses(manager)


@without_ours
async def jobs_are_finished_and_retried_by_hand(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        manager = app.job_manager
        for _ in range(5):
            seen.deferred(await app.configure_task("t", lock=None).defer_async())
        a, b, c, d, e = seen.ids
        await manager.finish_job_by_id_async(a, jobs.Status.SUCCEEDED, delete_job=False)
        await manager.finish_job_by_id_async(b, jobs.Status.FAILED, delete_job=False)
        await manager.finish_job_by_id_async(c, jobs.Status.FAILED, delete_job=True)
        await manager.finish_job_by_id_async(d, jobs.Status.ABORTED, delete_job=False)
        errors = [
            await seen.error(lambda: manager.finish_job_by_id_async(a, jobs.Status.FAILED, delete_job=False)),
            await seen.error(lambda: manager.finish_job_by_id_async(c, jobs.Status.FAILED, delete_job=False)),
            await seen.error(lambda: manager.finish_job_by_id_async(e, jobs.Status.CANCELLED, delete_job=False)),
            await seen.error(lambda: manager.retry_job_by_id_async(a, now())),
            await seen.error(lambda: manager.retry_job_by_id_async(e, now())),
            await seen.error(lambda: manager.retry_job_by_id_async(99, now())),
        ]
        await manager.retry_job_by_id_async(b, now(3600), priority=4, queue="late", lock="L")
        rows = await seen.rows(manager)
        return errors, [(row[0], row[1], row[3], row[4], row[5], row[9]) for row in rows]


@without_ours
async def jobs_are_fetched_and_settled_by_hand(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        manager = app.job_manager
        worker = await manager.register_worker()
        nothing = await manager.fetch_job(queues=None, worker_id=worker)
        for queue in ("a", "b", "a", "a"):
            seen.deferred(await app.configure_task("t", queue=queue).defer_async(x=1))
        first = await manager.fetch_job(queues=["b"], worker_id=worker)
        second = await manager.fetch_job(queues=["a", "b"], worker_id=worker)
        third = await manager.fetch_job(queues=["a"], worker_id=worker)
        assert first is not None
        assert second is not None
        assert third is not None
        fetched = [
            (seen.number(job.id), job.status, job.queue, job.worker_id == worker) for job in (first, second, third)
        ]
        await manager.update_heartbeat(worker)
        pruned = await manager.prune_stalled_workers(60)
        stalled = list(await manager.get_stalled_jobs())
        await manager.finish_job(first, jobs.Status.SUCCEEDED, delete_job=False)
        await manager.finish_job(second, jobs.Status.FAILED, delete_job=True)
        await manager.retry_job(third, now(3600), priority=2, queue="c", lock="K")
        await manager.unregister_worker(worker)
        return nothing, fetched, pruned, stalled, await seen.rows(manager)


@without_ours
async def a_job_whose_abort_was_asked_for_is_not_tried_again(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        manager = app.job_manager
        worker = await manager.register_worker()
        seen.deferred(await app.configure_task("t", queue="a").defer_async())
        job = await manager.fetch_job(queues=None, worker_id=worker)
        assert job is not None
        assert job.id is not None
        answers = [
            await manager.cancel_job_by_id_async(job.id, abort=abort, delete_job=True) for abort in (False, True, True)
        ]
        lists = [await manager.list_jobs_to_abort_async(queue) for queue in (None, "a", "b")]
        asked = [[seen.number(id) for id in ids] for ids in lists]
        listed = await seen.rows(manager)
        await manager.retry_job(job, now())
        await manager.unregister_worker(worker)
        return answers, asked, listed[0][:2], listed[0][10], [row[1] for row in await seen.rows(manager)]


@without_ours
async def jobs_are_listed(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        manager = app.job_manager
        for task, queue, lock, queueing in (("t", "a", "L", None), ("t", "b", None, "Q"), ("u", "a", None, None)):
            configured = app.configure_task(task, queue=queue, lock=lock, queueing_lock=queueing)
            seen.deferred(await configured.defer_async(n=1))
        await manager.cancel_job_by_id_async(seen.ids[2])
        filters: list[dict[str, Any]] = [
            {}, {"queue": "a"}, {"task": "t"}, {"status": "todo"}, {"lock": "L"}, {"queueing_lock": "Q"},
            {"id": seen.ids[1]}, {"id": 77}, {"worker_id": 5}, {"queue": "a", "status": "cancelled"},
        ]  # fmt: skip
        listed = [[row[0] for row in await seen.rows(manager, **given)] for given in filters]
        summaries = [
            list(await manager.list_queues_async()), list(await manager.list_queues_async(status="todo")),
            list(await manager.list_tasks_async()), list(await manager.list_tasks_async(queue="a")),
            list(await manager.list_locks_async()), list(await manager.list_locks_async(lock="none")),
            list(await asyncio.to_thread(manager.list_queues)), await manager.check_connection_async(),
        ]  # fmt: skip
        return listed, summaries


@without_ours
async def a_periodic_tick_is_deferred_once(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    def job(timestamp: int, **options: Any) -> jobs.Job:
        return app.configure_task("tick", task_kwargs={"timestamp": timestamp}, **options).job

    async with app.open_async():
        manager = app.job_manager

        async def defer(timestamp: int, periodic_id: str = "", **options: Any) -> bool:
            given = job(timestamp, **options)
            return await manager.defer_periodic_job(given, periodic_id, timestamp) is not None

        answers = [await defer(100), await defer(100), await defer(100, "other <id>"), await defer(160)]
        answers.append(await defer(220, queueing_lock="q"))
        error = await seen.error(lambda: defer(280, queueing_lock="q"))
        again = await defer(280)
        listed = sorted((row.task_kwargs["timestamp"], row.status) for row in await manager.list_jobs_async())
        return answers, error, again, listed


@without_ours
async def deferring_joins_the_applications_transaction(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    counts = []
    async with app.open_async():
        async with await psycopg.AsyncConnection.connect(engine.dsn) as connection:
            await app.configure_task("t", connection=connection).defer_async(n=1)
            await connection.rollback()
            counts.append(len(list(await app.job_manager.list_jobs_async())))
            await app.configure_task("t", connection=connection).batch_defer_async({"n": 1}, {"n": 2})
            counts.append(len(list(await app.job_manager.list_jobs_async())))
            await connection.commit()
        counts.append(len(list(await app.job_manager.list_jobs_async())))
    return counts


@without_ours
async def a_blocking_application_does_the_same(engine: Engine, seen: Observer) -> Any:
    def run() -> Any:
        app = procrastinate.App(connector=engine.sync_connector())
        with app.open():
            manager = app.job_manager
            seen.deferred(app.configure_task("t", queueing_lock="Q").defer(n=1))
            seen.deferred(*app.configure_task("t").batch_defer({"n": 2}, {"n": 3}))
            errors = []
            try:
                app.configure_task("t", queueing_lock="Q").defer(n=4)
            except exceptions.AlreadyEnqueued as error:
                errors.append(str(error))
            with psycopg.connect(engine.dsn) as connection:
                app.configure_task("t", connection=connection).defer(n=5)
                connection.rollback()
            answers = [manager.cancel_job_by_id(seen.ids[0]), manager.cancel_job_by_id(seen.ids[0])]
            status = manager.get_job_status(seen.ids[0]).value
            return errors, answers, status, manager.check_connection(), sorted(map(seen.row, manager.list_jobs()))

    return await asyncio.to_thread(run)


@without_ours
async def the_status_counts_and_other_queries_of_the_application_work(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    async with app.open_async():
        await app.configure_task("t").defer_async()
        counted = await app.connector.execute_query_all_async(procrastinate.sql.queries["count_jobs_status"])
        own = await app.connector.execute_query_one_async("select %(x)s::int + 1 as y", x=1)
        missing = await seen.error(lambda: app.connector.execute_query_one_async("select 1 where false"))
        wrong = await seen.error(lambda: app.connector.execute_query_async("select nonsense"))
        return counted, own, missing, wrong
