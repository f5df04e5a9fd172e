"""A procrastinate application run by our worker: `jobqueue worker their.app`.

`adopt` makes a `jobqueue.App` of it: one handler per task and alias, and a schedule per periodic task.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import procrastinate
from procrastinate import exceptions

from jobqueue.app import App
from jobqueue.errors import ConfigurationError
from jobqueue.handlers import Handler
from jobqueue.job import Job, reset_current_job, set_current_job
from jobqueue.payloads import Payload
from jobqueue.procrastinate.connector import JobqueueConnector
from jobqueue.procrastinate.periodic import TICK, make_schedules, prepare_queues, send_tick
from jobqueue.procrastinate.pools import conninfo_of
from jobqueue.procrastinate.running import TaskRunner, ends_for_good, stock_worker
from jobqueue.procrastinate.task_options import ENTRY, options_of

if TYPE_CHECKING:
    from jobqueue.telemetry.tracing import Telemetry
    from jobqueue.worker.worker import Worker

logger = logging.getLogger(__name__)


def adopt(app: procrastinate.App) -> NativeApp:
    """Return the jobqueue application that runs a procrastinate application's tasks.

    Its connector must be a JobqueueConnector. Raises ConfigurationError if it is not, and what importing the
    application's `import_paths` raises.
    """
    if not isinstance(app.connector, JobqueueConnector):
        raise ConfigurationError(
            f"the application's connector is a {type(app.connector).__name__}, so its jobs live elsewhere",
            hint="procrastinate.App(connector=jobqueue.procrastinate.JobqueueConnector(…)).",
        )
    app.perform_import_paths()  # type: ignore[no-untyped-call]
    return NativeApp(app, app.connector)


class NativeApp(App):
    """The tasks of a procrastinate application as handlers. Made by `adopt`.

    `worker_defaults` of the application are heeded: queues, name,
    additional_context and middleware.
    """

    def __init__(self, theirs: procrastinate.App, connector: JobqueueConnector) -> None:
        arguments = connector._pool_args
        place = conninfo_of(arguments.get("conninfo"), _of_libpq(arguments.get("kwargs")))
        super().__init__(place or None, classify=ends_for_good)
        self.theirs = theirs
        self.worker_id: UUID = uuid4()
        self.stock_worker = stock_worker(theirs)
        for name, task in theirs.tasks.items():
            self.registry.add(task_handler(name, TaskRunner(task, self.stock_worker, self.worker_id)))
        self.registry.add(tick_handler(self))

    def _trace_with(self, telemetry: Telemetry) -> None:
        super()._trace_with(telemetry)
        if isinstance(self.theirs.connector, JobqueueConnector):
            self.theirs.connector.telemetry = telemetry

    async def make_worker(
        self,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        until_idle: bool = False,
        **options: Any,
    ) -> Worker:
        """Return a worker that opens the procrastinate application and makes its schedules before it runs."""
        own = self.theirs.worker_defaults.get("queues")
        worker = await super().make_worker(queues or (list(own) if own else None), concurrency, until_idle, **options)
        self.stock_worker.worker_id = worker.id.int
        self.stock_worker.stop = worker.drain  # type: ignore[method-assign]
        # The application's connections live as long as the worker runs.
        worker.run = functools.partial(self._run, worker.run)  # type: ignore[method-assign]
        return worker

    async def _run(self, run: Callable[[], Awaitable[None]]) -> None:
        async with self._opened():
            await prepare_queues(self)
            await make_schedules(self)
            await run()

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        connector = self.theirs.connector
        assert isinstance(connector, JobqueueConnector)
        if connector._async_pool is not None:
            yield
            return
        try:
            await self.theirs.open_async()
            yield
        finally:
            with contextlib.suppress(exceptions.ConnectorException):
                await self.theirs.close_async()
            await self.close()


def task_handler(name: str, runner: TaskRunner) -> Handler:
    """Return the handler of a task under one of its names."""
    task = runner.task
    options = options_of(task.func)
    process = options.executor == "process"
    return Handler(
        name=name,
        queue=task.queue,
        function=getattr(task.func, ENTRY) if process else task.func,
        executor="process" if process else "async" if runner.is_async else "thread",
        batch_size=1,
        takes_batch=False,
        options=options.send,
        stages=None,
        label=options.label,
        pausable=options.pausable,
        classify=ends_for_good,
        middleware=(),
        payload=Payload(name, Any),
        invoke=_async(runner.run) if runner.is_async else _blocking(runner.run_blocking),
        invoke_batch=_no_batch,
    )


def tick_handler(app: NativeApp) -> Handler:
    """Return the handler that defers the job of a periodic task whose locks a schedule cannot express."""
    return Handler(
        name=TICK, queue=TICK, function=send_tick, executor="async", batch_size=1, takes_batch=False, options={},
        stages=None, label=None, pausable=False, classify=None, middleware=(),
        payload=Payload(TICK, Any), invoke=_async(functools.partial(send_tick, app)), invoke_batch=_no_batch,
    )  # fmt: skip


def _async(run: Callable[[Job], Awaitable[Any]]) -> Callable[[Job], Any]:
    def invoke(job: Job) -> Any:
        set_current_job(job)
        return run(job) if job.claim.checkpoint_id is None else prepared(job)

    async def prepared(job: Job) -> Any:
        await job.prepare()
        return await run(job)

    return invoke


def _blocking(run: Callable[[Job], Any]) -> Callable[[Job], Any]:
    def invoke(job: Job) -> Any:
        with _current(job):
            if job.claim.checkpoint_id is not None:
                job._channel.blocking(job.prepare())
            return run(job)

    return invoke


@contextlib.contextmanager
def _current(job: Job) -> Iterator[None]:
    token = set_current_job(job)
    try:
        yield
    finally:
        reset_current_job(token)


def _no_batch(jobs: list[Job]) -> Any:
    raise TypeError("a task runs one job at a time")


def _of_libpq(kwargs: Any) -> Any:
    from jobqueue.database.pool import NETWORK_DEFAULTS

    own = {"application_name", "client_encoding", *NETWORK_DEFAULTS}
    return {name: value for name, value in (kwargs or {}).items() if name not in own}
