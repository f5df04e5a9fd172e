"""A job inside a child process: the handler is imported there, and its job talks to the database through the parent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from jobqueue.connections import Connections
from jobqueue.handlers import Handler, make_handler
from jobqueue.job import Claim, Job
from jobqueue.worker.process_child import Link, Stopped, current_link, load_target

T = TypeVar("T")

Outcome = tuple[str | None, dict[str, Any] | None, bool]


class ProcessChannel:
    """`jobqueue.job.Channel` over the link to the parent. Only `transaction()` opens a connection in the child."""

    def __init__(self, link: Link, dsn: str) -> None:
        self.connections = Connections(dsn, application_name="jobqueue handlers", max_size=1)
        self._link = link
        self._lock = threading.Lock()
        self._runner = asyncio.Runner()

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        """Pass progress on to the parent, which merges and sends it."""
        self._link.call("report", pct, message, data)

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        """Return the scalar of `jobqueue.<function>(id, token, …)`."""
        return self._link.call("call", function, **arguments)

    async def keys(self, job: Job) -> set[str]:
        """Return the done keys."""
        return set(self._link.call("keys"))

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        return list(self._link.call("rows", query, *parameters))

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """Run it here and wait; one at a time, from any thread of the child."""
        with self._lock:
            return self._runner.run(awaitable)


_channel: ProcessChannel | None = None
_handlers: dict[str, Handler] = {}


def run_job(reference: str, claim: Claim, dsn: str, around: tuple[str, Any] | None = None) -> Outcome:
    """Run the handler that `reference` names for a job, `around` it a context manager with its argument.

    Returns the result as JSON text, the job's stats, and whether the handler completed the job in a transaction.
    Raises what the handler raises, ConfigurationError if it cannot be imported.
    """
    global _channel
    link = current_link()
    if _channel is None:
        _channel = ProcessChannel(link, dsn)
    handler = _handlers.get(reference)
    if handler is None:
        handler = _handlers[reference] = make_handler(load_target(reference), claim.job_type, executor="process")
    job = Job(claim, _channel)
    link.on_order = job.deliver
    try:
        with _surrounding(around):
            result = handler.invoke(job)
    except Stopped:
        # The parent has stopped to answer.
        raise
    except BaseException:
        job.end_loops()
        _channel.blocking(job.flush())
        raise
    job.end_loops()
    return handler.encode_result(result), job._stats, job.settled


def _surrounding(around: tuple[str, Any] | None) -> AbstractContextManager[None]:
    return nullcontext() if around is None else load_target(around[0])(around[1])
