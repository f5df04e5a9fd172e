"""The same calls for every engine. A scenario gets an engine and an observer, and returns what an application can see."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from typing import Any

import procrastinate
from procrastinate import builtin_tasks, exceptions, jobs
from procrastinate.job_context import AbortReason

from tests.procrastinate.engines import Engine, Observer

Scenario = Callable[[Engine, Observer], Awaitable[Any]]
EVERYWHERE: dict[str, Scenario] = {}
"""Scenarios whose jobs a worker runs: for all three engines."""


def everywhere(scenario: Scenario) -> Scenario:
    EVERYWHERE[scenario.__name__] = scenario
    return scenario


def now(seconds: float = 0) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


@everywhere
async def deferred_jobs_run_in_order_of_priority_with_their_arguments(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="note", queue="notes", aliases=["remember"])
    async def note(text: str, **more: Any) -> None:
        seen.log.append((text, more))

    @app.task(name="plain", queue="notes", priority=3)
    def plain(n: int) -> None:
        seen.log.append(n)

    blueprint = procrastinate.Blueprint()

    @blueprint.task(name="inner", queue="notes")
    async def inner() -> None:
        seen.log.append("inner")

    app.add_tasks_from(blueprint, namespace="outer")
    async with app.open_async():
        seen.deferred(await note.defer_async(text="ä\"'\\ \n", deep={"list": [1, None, 2.5, {"x": True}]}))
        seen.deferred(await note.configure(priority=-5, queue="slow").defer_async(text="last"))
        seen.deferred(*await plain.batch_defer_async({"n": 1}, {"n": 2}, {"n": 3}))
        seen.deferred(await note.configure(priority=9, task_kwargs={"text": "a", "b": 1}).defer_async(b=2))
        seen.deferred(await app.configure_task("remember", queue="notes", priority=1).defer_async(text="by its alias"))
        seen.deferred(await inner.defer_async())
        seen.log.append(await seen.rows(app.job_manager))
        await engine.work(app)
        return seen.log, await seen.rows(app.job_manager)


@everywhere
async def jobs_with_one_lock_run_one_at_a_time_in_order(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    order: dict[str | None, list[Any]] = {}

    @app.task(name="locked", lock="customer", pass_context=True)
    async def locked(context: procrastinate.JobContext, n: int) -> None:
        log = order.setdefault(context.job.lock, [])
        log.append(("start", n))
        await asyncio.sleep(0.02)
        log.append(("end", n))

    async with app.open_async():
        seen.deferred(*await locked.batch_defer_async({"n": 1}, {"n": 2}))
        seen.deferred(await locked.configure(priority=2).defer_async(n=3))
        seen.deferred(await locked.configure(lock="other", priority=-1).defer_async(n=4))
        async with engine.worker(app, concurrency=4, fetch_job_polling_interval=0.05):
            for number in range(1, 5):
                await seen.until(app.job_manager, number, "succeeded")
        return order, await seen.rows(app.job_manager), list(await app.job_manager.list_locks_async())


@everywhere
async def one_job_per_queueing_lock_waits_and_another_may_once_it_has_started(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    refusals = []

    @app.task(name="report", queueing_lock="report")
    async def report(again: bool) -> None:
        if again:
            refusals.append(await seen.error(lambda: report.defer_async(again=False)))
            refusals.append(await seen.error(lambda: report.defer_async(again=False)))

    async with app.open_async():
        seen.deferred(await report.defer_async(again=True))
        refusals.append(await seen.error(lambda: report.defer_async(again=False)))
        refusals.append(await seen.error(lambda: report.configure(queue="another").defer_async(again=False)))
        refusals.append(await seen.error(lambda: report.batch_defer_async({"again": False}, {"again": False})))
        twins = report.configure(queueing_lock="twins")
        refusals.append(await seen.error(lambda: twins.batch_defer_async({"again": False}, {"again": False})))
        await engine.work(app)
        await engine.work(app)
        return refusals, [job.status for job in await app.job_manager.list_jobs_async(queueing_lock="report")]


@everywhere
async def jobs_wait_for_their_time(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="timed")
    async def timed(n: int) -> None:
        seen.log.append(n)

    async with app.open_async():
        seen.deferred(await timed.configure(schedule_in={"hours": 1}).defer_async(n=1))
        seen.deferred(await timed.configure(schedule_at=now(-60)).defer_async(n=2))
        seen.deferred(await timed.configure(schedule_at=now(3600), priority=100).defer_async(n=3))
        seen.log.append(await seen.error(lambda: timed.configure(schedule_at=now(), schedule_in={"hours": 1})))
        await engine.work(app)
        return seen.log, await seen.rows(app.job_manager)


@everywhere
async def retry_strategies_decide(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    class Moves(procrastinate.BaseRetryStrategy):
        def get_retry_decision(self, *, exception: BaseException, job: jobs.Job) -> procrastinate.RetryDecision | None:
            if job.attempts:
                return None
            return procrastinate.RetryDecision(retry_in={"seconds": 0}, priority=7, queue="second", lock="new")

    only = procrastinate.RetryStrategy(max_attempts=5, retry_exceptions={KeyError})

    @app.task(name="twice", retry=2, pass_context=True)
    async def twice(context: procrastinate.JobContext) -> None:
        seen.log.append(("twice", context.job.attempts))
        raise ValueError

    @app.task(name="plain", retry=1)
    def plain() -> None:
        raise KeyError("x")

    @app.task(name="picky", retry=only, pass_context=True)
    async def picky(context: procrastinate.JobContext) -> None:
        raise KeyError if context.job.attempts == 0 else ValueError

    @app.task(name="moves", retry=Moves(), pass_context=True)
    async def moves(context: procrastinate.JobContext) -> None:
        seen.log.append((context.job.queue, context.job.priority, context.job.lock, context.job.attempts))
        raise OSError

    @app.task(name="later", retry=procrastinate.RetryStrategy(wait=3600))
    async def later() -> None:
        raise OSError

    @app.task(name="never")
    async def never() -> None:
        raise OSError

    async with app.open_async():
        for task in (twice, plain, picky, moves, later, never):
            seen.deferred(await task.defer_async())
        seen.deferred(await never.configure(queue="second").defer_async())
        await engine.work(app)
        return sorted(seen.log, key=str), await seen.rows(app.job_manager)


@everywhere
async def a_retry_keeps_its_queueing_lock(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="again", retry=procrastinate.RetryStrategy(wait=3600), queueing_lock="again")
    async def again() -> None:
        raise OSError

    async with app.open_async():
        seen.deferred(await again.defer_async())
        await engine.work(app)
        return await seen.error(again.defer_async), await seen.rows(app.job_manager)


@everywhere
async def running_jobs_are_aborted(engine: Engine, seen: Observer) -> Any:
    app = engine.app()
    started = asyncio.Event()
    reasons = []
    loop = asyncio.get_running_loop()

    @app.task(name="endless", pass_context=True)
    async def endless(context: procrastinate.JobContext) -> None:
        started.set()
        try:
            await asyncio.sleep(600)
        finally:
            reasons.append((context.should_abort(), context.abort_reason() is AbortReason.USER_REQUEST))

    @app.task(name="blocking", pass_context=True)
    def blocking(context: procrastinate.JobContext) -> None:
        loop.call_soon_threadsafe(started.set)
        import time

        while not context.should_abort():
            time.sleep(0.01)
        raise exceptions.JobAborted

    @app.task(name="gives_up")
    async def gives_up() -> None:
        started.set()
        raise exceptions.JobAborted

    async with app.open_async(), engine.worker(app):
        for number, task in enumerate((endless, blocking, gives_up), 1):
            started.clear()
            seen.deferred(await task.defer_async())
            await asyncio.wait_for(started.wait(), 60)
            if task is not gives_up:
                manager, id = app.job_manager, seen.ids[-1]
                seen.log.append(await manager.cancel_job_by_id_async(id))
                seen.log.append(await manager.cancel_job_by_id_async(id, abort=True))
            seen.log.append(await seen.until(app.job_manager, number, "aborted", "succeeded", "failed"))
        return seen.log, reasons, await seen.rows(app.job_manager)


@everywhere
async def middleware_surrounds_jobs_and_tasks(engine: Engine, seen: Observer) -> Any:
    async def around_job(call_next: Any, context: Any, worker: Any) -> Any:
        seen.log.append(("job begins", context.job.task_name, worker.worker_name))
        try:
            return await call_next()
        finally:
            seen.log.append("job ends")

    async def around_async(call_next: Any, context: Any, worker: Any) -> Any:
        seen.log.append("async begins")
        return await call_next()

    def around_sync(call_next: Any, context: Any, worker: Any) -> Any:
        seen.log.append("sync begins")
        return call_next()

    def swallow(call_next: Any, context: Any, worker: Any) -> Any:
        try:
            return call_next()
        except ValueError:
            return seen.log.append("swallowed")

    app = engine.app(
        {"task_middleware": [around_async, around_sync], "worker_middleware": [around_job], "name": "mw",
         "additional_context": {"region": "eu"}}
    )  # fmt: skip

    @app.task(name="async", pass_context=True)
    async def in_loop(context: procrastinate.JobContext, n: int) -> None:
        seen.log.append(
            (context.worker_name, context.additional_context, context.task.name, context.job.task_kwargs, n)
        )

    @app.task(name="sync", task_middleware=[swallow])
    def in_thread() -> None:
        raise ValueError

    async with app.open_async():
        seen.deferred(await in_loop.defer_async(n=1))
        seen.deferred(await in_thread.defer_async())
        await engine.work(app)
        return seen.log, await seen.statuses(app.job_manager)


@everywhere
async def a_blocking_task_defers_and_reads(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="parent")
    def parent() -> None:
        seen.deferred(child.configure(queueing_lock="c").defer(n=1))
        try:
            child.configure(queueing_lock="c").defer(n=2)
        except exceptions.AlreadyEnqueued:
            seen.log.append("already")
        seen.log.append([job.status for job in app.job_manager.list_jobs(task="child")])

    @app.task(name="child")
    def child(n: int) -> None:
        seen.log.append(n)

    async with app.open_async():
        seen.deferred(await parent.defer_async())
        await engine.work(app)
        await engine.work(app)
        return seen.log, await seen.statuses(app.job_manager)


@everywhere
async def the_applications_own_json_is_used(engine: Engine, seen: Observer) -> Any:
    class Money:
        def __init__(self, cents: int) -> None:
            self.cents = cents

    def dumps(value: Any) -> str:
        return json.dumps(value, default=lambda money: {"cents": money.cents})

    def loads(text: Any) -> Any:
        return json.loads(text, object_hook=lambda found: Money(found["cents"]) if "cents" in found else found)

    app = engine.app(json_dumps=dumps, json_loads=loads)

    @app.task(name="pay")
    async def pay(amount: Any) -> None:
        seen.log.append((type(amount).__name__, amount.cents))

    async with app.open_async():
        seen.deferred(await pay.defer_async(amount=Money(250)))
        await engine.work(app)
        (job,) = await app.job_manager.list_jobs_async()
        return seen.log, type(job.task_kwargs["amount"]).__name__


@everywhere
async def the_built_in_task_removes_old_jobs(engine: Engine, seen: Observer) -> Any:
    app = engine.app()

    @app.task(name="done")
    async def done(fails: bool) -> None:
        if fails:
            raise ValueError

    # under a name of its own: the built-in one gets longer with every application of a process
    clean = app.task(name="clean", pass_context=True)(builtin_tasks.remove_old_jobs.func)

    async with app.open_async():
        seen.deferred(*await done.batch_defer_async({"fails": False}, {"fails": True}))
        await engine.work(app)
        seen.deferred(await clean.defer_async(max_hours=0))
        await engine.work(app)
        seen.deferred(await clean.defer_async(max_hours=0, remove_failed=True))
        seen.log.append(await seen.statuses(app.job_manager))
        await engine.work(app)
        return seen.log, [row[:2] for row in await seen.rows(app.job_manager)]
