"""Periodic tasks as schedules: the database sends their jobs, every tick once, however many workers run or are away.

A schedule can hold a lock (its queue admits one job per lock), but no queueing_lock: a task with one gets a schedule of
small jobs, each of which defers the task's job as procrastinate's worker would.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from procrastinate import exceptions
from procrastinate.jobs import Job as TheirJob
from procrastinate.periodic import PeriodicTask

from jobqueue.errors import BadRequest, ConfigurationError, translate
from jobqueue.job import Job
from jobqueue.procrastinate.ids import schedule_name
from jobqueue.procrastinate.rows import job_of
from jobqueue.procrastinate.running import arguments_of
from jobqueue.procrastinate.task_options import options_of

if TYPE_CHECKING:
    import procrastinate
    from psycopg import AsyncConnection

TICK = "procrastinate.tick"
"""The job_type, and the queue, of jobs that defer a periodic task's job."""
PREPARE_QUEUE = "select jobqueue.procrastinate_adopt_queue(%s, %s)"


class Adopted(Protocol):
    """What runs a procrastinate application's tasks: a `NativeApp`."""

    theirs: procrastinate.App
    worker_id: UUID

    def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
        """Lend a connection, or the one that is given."""

    @property
    def schedule(self) -> Callable[..., Awaitable[Any]]:
        """As `App.schedule`."""


async def prepare_queues(app: Adopted) -> None:
    """Make the queues of all tasks before the worker registers them: theirs have no time-out, and admit locks."""
    locks: dict[str, bool] = {}
    for task in app.theirs.tasks.values():
        locks[task.queue] = locks.get(task.queue, False) or task.lock is not None
    async with app._lend(None) as connection:
        for queue, has_locks in sorted(locks.items()):
            with translate():
                await connection.execute(PREPARE_QUEUE, (queue, has_locks))


async def make_schedules(app: Adopted) -> None:
    """Make, or make again, a schedule for every periodic task. Raises ConfigurationError for one that cannot be read."""
    for periodic in app.theirs.periodic_registry.periodic_tasks.values():
        await make_schedule(app, periodic)


async def make_schedule(app: Adopted, periodic: PeriodicTask[Any, Any, Any]) -> None:
    """Make one schedule; one that is there with the same expression keeps its place and what it has missed."""
    task = periodic.task
    job = task.configure(**periodic.configure_kwargs).job
    name = schedule_name(task.name, periodic.periodic_id)
    zone = options_of(task.func).time_zone or "UTC"
    arguments = {name: value for name, value in job.task_kwargs.items() if name != "timestamp"}
    async with app._lend(None) as connection:
        await connection.execute(PREPARE_QUEUE, (job.queue, job.lock is not None))
    try:
        if job.queueing_lock is not None:
            payload = {"task": task.name, "periodic_id": periodic.periodic_id, "args": arguments}
            await app.schedule(name, TICK, expression_of(periodic.cron), payload, queue=TICK, time_zone=zone)
            return
        options: dict[str, Any] = {"priority": job.priority}
        if job.lock is not None:
            options["singleton_key"] = job.lock
        await app.schedule(
            name, task.name, expression_of(periodic.cron), arguments, queue=job.queue, time_zone=zone, **options
        )
    except BadRequest as error:
        raise ConfigurationError(
            f"the periodic task {task.name} cannot be scheduled: {error}",
            hint="Give it a cron expression of 5 fields, or run it with procrastinate's own worker.",
        ) from error


def expression_of(cron: str) -> str:
    """Return a cron expression of croniter in our form: with 6 fields the seconds stand first here, last there."""
    fields = cron.split()
    return " ".join([fields[5], *fields[:5]]) if len(fields) == 6 else cron


async def send_tick(app: Adopted, job: Job) -> int | None:
    """Defer the job of a tick; returns its id, or None if its queueing_lock is held, as procrastinate's worker does."""
    given: Mapping[str, Any] = job.payload
    periodic = app.theirs.periodic_registry.periodic_tasks.get((given["task"], given["periodic_id"]))
    if periodic is None:
        raise ConfigurationError(
            f"there is no periodic task {given['task']} any more",
            hint=f"Remove its schedule: jobqueue schedules remove {schedule_name(given['task'], given['periodic_id'])}",
        )
    theirs: TheirJob = job_of(job.claim, app.worker_id)
    timestamp = arguments_of(job, theirs)["timestamp"]
    deferrer = periodic.task.configure(**periodic.configure_kwargs)
    try:
        return await deferrer.defer_async(**{**given["args"], "timestamp": timestamp})
    except exceptions.AlreadyEnqueued:
        return None
