"""The three engines, with one way to run an application's worker on each."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import procrastinate
from procrastinate import jobs, manager

from jobqueue.procrastinate import JobqueueConnector, SyncJobqueueConnector, adopt

QUIET = {"install_signal_handlers": False, "listen_notify": True}


class Engine:
    """A database, and how an application runs on it."""

    name = ""
    table = "jobqueue.job"

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def connector(self, **options: Any) -> Any:
        """An asynchronous connector."""
        return JobqueueConnector(self.dsn, **options)

    def sync_connector(self) -> Any:
        """A blocking connector."""
        return SyncJobqueueConnector(self.dsn)

    def app(self, worker_defaults: Any = None, **options: Any) -> procrastinate.App:
        """A new application."""
        return procrastinate.App(connector=self.connector(**options), worker_defaults=worker_defaults)

    async def work(self, app: procrastinate.App, **options: Any) -> None:
        """Run jobs until none is ready."""
        await asyncio.wait_for(app.run_worker_async(wait=False, **QUIET, **options), 60)

    @contextlib.asynccontextmanager
    async def worker(self, app: procrastinate.App, **options: Any) -> AsyncIterator[None]:
        """A worker that runs during the block, and stops in order at its end."""
        task = asyncio.create_task(app.run_worker_async(**QUIET, **options))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)


class StockEngine(Engine):
    """procrastinate's own tables and worker."""

    name = "stock"
    table = "procrastinate_jobs"

    def connector(self, **options: Any) -> Any:
        return procrastinate.PsycopgConnector(conninfo=self.dsn, min_size=1, **options)

    def sync_connector(self) -> Any:
        return procrastinate.SyncPsycopgConnector(conninfo=self.dsn, min_size=1)


class ConnectorEngine(Engine):
    """Our tables, procrastinate's worker."""

    name = "connector"

    def connector(self, **options: Any) -> Any:
        return JobqueueConnector(self.dsn, min_size=1, **options)

    def sync_connector(self) -> Any:
        return SyncJobqueueConnector(self.dsn, min_size=1)


class NativeEngine(ConnectorEngine):
    """Our tables, our worker."""

    name = "native"

    async def work(self, app: procrastinate.App, **options: Any) -> None:
        worker = await adopt(app).make_worker(options.get("queues"), options.get("concurrency", 1), until_idle=True)
        await asyncio.wait_for(worker.run(), 60)

    @contextlib.asynccontextmanager
    async def worker(self, app: procrastinate.App, **options: Any) -> AsyncIterator[None]:
        worker = await adopt(app).make_worker(options.get("queues"), options.get("concurrency", 1))
        task = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.drain()
            await asyncio.wait_for(task, 60)


class Observer:
    """What can be seen of an application's jobs, in words that do not depend on the engine: ids count from 1."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.log: list[Any] = []

    def deferred(self, *ids: int) -> int:
        """Note new jobs; the number of the last."""
        self.ids += ids
        return len(self.ids)

    def number(self, id: int | None) -> int | None:
        """The number of a job."""
        return None if id is None else self.ids.index(id) + 1

    def row(self, job: jobs.Job) -> tuple[Any, ...]:
        """A job, as far as it can be compared."""
        return (
            self.number(job.id), job.status, job.task_name, job.queue, job.priority, job.lock, job.queueing_lock,
            job.task_kwargs, job.attempts, job.scheduled_at is not None, job.abort_requested, job.worker_id is not None,
        )  # fmt: skip

    async def rows(self, jobs_of: manager.JobManager, **filters: Any) -> list[tuple[Any, ...]]:
        """The listed jobs, in the order in which they were deferred."""
        return sorted(self.row(job) for job in await jobs_of.list_jobs_async(**filters))

    async def statuses(self, jobs_of: manager.JobManager) -> list[tuple[str, int]]:
        """Status and attempts of all jobs, in the order in which they were deferred."""
        return [(row[1], row[8]) for row in await self.rows(jobs_of)]

    async def until(self, jobs_of: manager.JobManager, number: int, *statuses: str) -> str:
        """Wait until a job has one of these statuses."""
        async with asyncio.timeout(60):
            while (status := (await jobs_of.get_job_status_async(self.ids[number - 1])).value) not in statuses:
                await asyncio.sleep(0.01)
        return status

    @staticmethod
    async def error(call: Callable[[], Any]) -> str:
        """The name of the exception that a call raises, or `none`; what the engines say beside it differs."""
        try:
            result = call()
            if asyncio.iscoroutine(result):
                await result
        except Exception as error:
            return re.sub(r"^(Sync|Async)", "", type(error).__name__)
        return "none"
