"""Running one task natively: its context, its middleware, what its retry strategy decides, and how an abort ends.

Job ──► context ──► worker middleware ──► task middleware ──► the task
                                                                ├─ returns: the result is kept
                                                                ├─ JobAborted: the job is cancelled (aborted)
                                                                └─ raises: its retry strategy decides
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import json
import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import procrastinate
from procrastinate import exceptions, middleware, retry
from procrastinate import jobs as procrastinate_jobs
from procrastinate import worker as procrastinate_worker
from procrastinate.job_context import AbortReason, JobContext
from procrastinate.tasks import Task

from jobqueue.classify import ErrorClass, Failure, classify, failure_of
from jobqueue.errors import Cancelled, HandlerSignal
from jobqueue.job import Job
from jobqueue.procrastinate.rows import job_of, needs_start
from jobqueue.procrastinate.statements import bounded, end_of

START, RETRY = "procrastinate_start", "procrastinate_retry"
_ENDS_ATTEMPT = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, HandlerSignal)

logger = logging.getLogger(__name__)


class TaskRunner:
    """Runs the jobs of one task.

    `worker`: what middleware gets as its worker, a procrastinate.worker.Worker that does not run.
    """

    def __init__(self, task: Task[Any, Any, Any], worker: procrastinate_worker.Worker, worker_id: UUID) -> None:
        self.task = task
        self.is_async = inspect.iscoroutinefunction(task.func)
        self._worker, self._worker_id = worker, worker_id
        self._around_job = worker.worker_middleware
        self._around_task = worker._resolve_task_middlewares(task, self.is_async)
        self._plain = not (self._around_job or self._around_task or task.pass_context)
        self._loads = (
            worker.app.connector.json_loads or getattr(worker.app.connector, "_json_loads", None) or json.loads
        )

    async def run(self, job: Job) -> Any:
        """Run it in the event loop."""
        if needs_start(job.claim) and not await job._channel.call(job, START):
            return self._gone(job)
        theirs = job_of(job.claim, self._worker_id, self._loads)
        arguments = arguments_of(job, theirs)
        try:
            if self._plain:
                return await self.task(**arguments)
            return await self._surrounded(self._context(job, theirs), arguments)
        except BaseException as error:
            ending = self._ending(theirs, error)
            if ending is None:
                raise _as_ours(error) from error
            await job.flush()
            await job._channel.call(job, RETRY, ending=ending)
            return self._gone(job)

    def run_blocking(self, job: Job) -> Any:
        """Run it in a thread or a child process."""
        channel = job._channel
        if needs_start(job.claim) and not channel.blocking(channel.call(job, START)):
            return self._gone(job)
        theirs = job_of(job.claim, self._worker_id, self._loads)
        arguments = arguments_of(job, theirs)
        try:
            if self._plain:
                return self._awaited(self.task(**arguments), job)
            context = self._context(job, theirs)
            if self._around_job:
                return channel.blocking(self._in_this_thread(context, arguments, job))
            return self._awaited(self._call_blocking(context, arguments), job)
        except BaseException as error:
            ending = self._ending(theirs, error)
            if ending is None:
                raise _as_ours(error) from error
            channel.blocking(job.flush())
            channel.blocking(channel.call(job, RETRY, ending=ending))
            return self._gone(job)

    async def _surrounded(self, context: JobContext, arguments: dict[str, Any]) -> Any:
        first = [context] if self.task.pass_context else []

        async def call() -> Any:
            async def run_task() -> Any:
                return await self.task(*first, **arguments)

            return await middleware.compose(self._around_task, run_task, context, self._worker)()

        return await middleware.compose(self._around_job, call, context, self._worker)()

    async def _in_this_thread(self, context: JobContext, arguments: dict[str, Any], job: Job) -> Any:
        """Worker middleware runs on the loop; the task that it surrounds in another thread, as under the stock worker."""

        async def call() -> Any:
            result = await asyncio.to_thread(self._call_blocking, context, arguments)
            return await result if inspect.isawaitable(result) else result

        return await middleware.compose(self._around_job, call, context, self._worker)()

    def _call_blocking(self, context: JobContext, arguments: dict[str, Any]) -> Any:
        first = [context] if self.task.pass_context else []
        run_task = functools.partial(self.task, *first, **arguments)
        return middleware.compose(self._around_task, run_task, context, self._worker)()

    def _awaited(self, result: Any, job: Job) -> Any:
        """A plain function may return something to await; it is awaited on the worker's loop."""
        return job._channel.blocking(_await(result)) if inspect.isawaitable(result) else result

    def _context(self, job: Job, theirs: procrastinate_jobs.Job) -> JobContext:
        return JobContext(
            app=self._worker.app,
            worker_name=self._worker.worker_name,
            worker_queues=self._worker.queues,
            additional_context=dict(self._worker.additional_context or {}),
            job=theirs,
            abort_reason=lambda: AbortReason.USER_REQUEST if job.cancel_requested else None,
            start_timestamp=time.time(),
        )

    def _ending(self, theirs: procrastinate_jobs.Job, error: BaseException) -> str | None:
        """What the retry strategy makes of an exception, as JSON text; None: nothing, it goes on to the worker."""
        if isinstance(error, (*_ENDS_ATTEMPT, exceptions.JobAborted)):
            return None
        decision = decide(self.task, error, theirs)
        if decision is None:
            return None
        logger.info(
            "%s failed and is tried again: %s",
            theirs.call_string,
            error,
            extra={"event": "job.retry", "job_id": theirs.id},
        )
        end = end_of(
            "retry", at=bounded(decision.retry_at), priority=decision.priority, queue=decision.queue, lock=decision.lock
        )
        return json.dumps({**end, "error": failure_of(error).as_error()})

    def _gone(self, job: Job) -> None:
        """The job is not this worker's any more: it was put back into the line, or was lost."""
        job._settled = True


def decide(task: Task[Any, Any, Any], error: BaseException, job: procrastinate_jobs.Job) -> retry.RetryDecision | None:
    """Ask a task's retry strategy."""
    answer = task.get_retry_exception(exception=error, job=job)
    return answer.retry_decision if answer is not None else None


def ends_for_good(error: BaseException) -> Failure | ErrorClass | None:
    """The classifier of tasks: only their retry strategy tries again, so what is transient elsewhere ends here."""
    failure = classify(error)
    if isinstance(error, HandlerSignal) or failure.error_class != "transient":
        return failure
    return Failure("permanent", failure.code, failure.message)


def arguments_of(job: Job, theirs: procrastinate_jobs.Job) -> dict[str, Any]:
    """Return a task's arguments; those of a schedule's job get the `timestamp` of their tick."""
    arguments: dict[str, Any] = theirs.task_kwargs
    if job.claim.metadata is not None and (tick := (job.metadata.get("schedule") or {}).get("tick")):
        arguments = {**arguments, "timestamp": int(datetime.fromisoformat(tick).timestamp())}
    return arguments


def _as_ours(error: BaseException) -> BaseException:
    if isinstance(error, exceptions.JobAborted):
        return Cancelled(str(error) or "aborted by its task")
    return error


async def _await(value: Any) -> Any:
    return await value


# -- In a child process -----------------------------------------------------------------------------------------------

_runners: dict[Callable[..., Any], TaskRunner] = {}


def run_in_child(function: Callable[..., Any], job: Job) -> Any:
    """Run the task of a function that was imported by a child process. Raises ConfigurationError."""
    runner = _runners.get(function)
    if runner is None:
        found: Any = importlib.import_module(function.__module__)
        for name in function.__qualname__.split("."):
            found = getattr(found, name)
        task: Task[Any, Any, Any] = found
        app = task.blueprint
        if not isinstance(app, procrastinate.App):
            raise exceptions.UnboundTaskError
        with contextlib.suppress(ImportError):
            app.perform_import_paths()  # type: ignore[no-untyped-call]
        runner = _runners[function] = TaskRunner(task, stock_worker(app), UUID(int=0))
    return runner.run_blocking(job)


def stock_worker(app: procrastinate.App) -> procrastinate_worker.Worker:
    """Return the application's stock worker, as middleware knows it; it is not run.

    Raises what its constructor says of the application's middleware.
    """
    return procrastinate_worker.Worker(app=app, **app.worker_defaults)
