"""Inline mode: a job runs while it is sent, in the caller's process, and in the caller's transaction if there is one.

```
app.send ─► stored ─► claimed (this job only) ─► handler ─► completed / failed ─► app.send returns
            └────────── on the same connection: nothing is committed that the caller does not commit ─────────┘
```
The job is a real one: its payload and its result are checked, its progress, stages and checkpoints are stored, its
middleware and hooks run, and the database decides what follows a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from jobqueue import client
from jobqueue.app import App
from jobqueue.classify import failure_of
from jobqueue.client import Sent
from jobqueue.errors import Cancelled, ConfigurationError, LeaseLost, Retry, Snooze
from jobqueue.hooks import FailedAttempt
from jobqueue.job import Claim, Job, Paused
from jobqueue.json_text import to_json_text
from jobqueue.worker.hooks import make_job_hooks, tell

if TYPE_CHECKING:
    from jobqueue.connections import Connections
    from jobqueue.handlers import Handler

T = TypeVar("T")

WORKER = "00000000-0000-4000-8000-000000000001"
_AS_TEXT = ("id", "claim_token", "payload", "metadata", "stats", "options")
_JSON = frozenset({"payload", "metadata", "stats", "options"})
_FIELDS = ", ".join(f"c.{name}::text" if name in _AS_TEXT else f"c.{name}" for name in Claim._fields)
# Nothing if it is not its turn: it waits for its time, for other jobs, for a slot, or its queue is paused.
CLAIM = f"""
    select {_FIELDS}
    from jobqueue.job j
    cross join lateral jobqueue.claim_queue(
        j.queue, %s::text::uuid, array[-j.priority], array[j.ready_seq], null, array[j.ready_seq + 1], 1, 1, 1, null) c
    where j.id = %s and j.ready_seq is not null and j.job_type = any(%s::text[])
"""  # noqa: S608
DONE_KEYS = "select key from jobqueue.done_keys(%s::text::uuid) as k (key)"


@contextlib.contextmanager
def inline(app: App, *, raise_errors: bool = True) -> Iterator[App]:
    """Inside the block `app.send`, `send_many` and their blocking forms run each job at once: `with inline(app):`.

    `raise_errors`: what a handler raises is raised by `send` too, after the database knows of it (default); False leaves
    it to the job's status. `Retry`, `Snooze`, `Cancelled` and a pause are no errors. A plain `def` handler that is sent
    with `send_sync` runs in the caller's thread, and one with executor="process" in this process.

    A job that is not ready (a delay, dependencies, a limit, a paused queue) or of a job_type without a handler here stays
    where it is, for `drain`. Flows, schedules and published events are not run inline. Time-outs are not enforced.
    `job.transaction()` needs the job to be committed: with `connection=` it raises ConfigurationError.
    """
    runner = _Inline(app, raise_errors)
    names = ("send", "send_sync", "send_many", "send_many_sync")
    for name in names:
        setattr(app, name, getattr(runner, name))
    try:
        yield app
    finally:
        for name in names:
            delattr(app, name)


class _Inline:
    """The four ways of sending, each followed by running."""

    def __init__(self, app: App, raise_errors: bool) -> None:
        self._app, self._raise_errors = app, raise_errors

    async def send(self, name: Any, payload: Any = None, *, connection: Any = None, **options: Any) -> Sent:
        sent = await App.send(self._app, name, payload, connection=connection, **options)
        await self._run([sent], connection)
        return sent

    async def send_many(self, name: Any, payloads: Any, *, connection: Any = None, **options: Any) -> list[Sent]:
        sent = await App.send_many(self._app, name, payloads, connection=connection, **options)
        await self._run(sent, connection)
        return sent

    def send_sync(self, name: Any, payload: Any = None, *, connection: Any = None, **options: Any) -> Sent:
        sent = App.send_sync(self._app, name, payload, connection=connection, **options)
        self._run_sync([sent], connection)
        return sent

    def send_many_sync(self, name: Any, payloads: Any, *, connection: Any = None, **options: Any) -> list[Sent]:
        sent = App.send_many_sync(self._app, name, payloads, connection=connection, **options)
        self._run_sync(sent, connection)
        return sent

    async def _run(self, jobs: Sequence[Sent], connection: Any) -> None:
        for sent in jobs:
            attempt = _Attempt(self._app, _Lender(self._app, connection, is_async=True), self._raise_errors)
            if sent.created and await attempt.claim(sent):
                # A task of its own: what the handler sets in its context does not leak into the caller's.
                await asyncio.create_task(attempt.run())

    def _run_sync(self, jobs: Sequence[Sent], connection: Any) -> None:
        for sent in jobs:
            attempt = _Attempt(self._app, _Lender(self._app, connection, is_async=False), self._raise_errors)
            if sent.created and client.blocking(attempt.claim(sent)):
                if attempt.needs_loop:
                    _run_in_loop(attempt.run())
                else:
                    attempt.run_here()


class _Attempt:
    """One attempt at one job."""

    job: Job
    handler: Handler

    def __init__(self, app: App, lender: _Lender, raise_errors: bool) -> None:
        self._app, self._lender, self._raise_errors = app, lender, raise_errors
        self._channel = InlineChannel(lender)
        self._hooks = make_job_hooks(app.hooks, app.registry)

    async def claim(self, sent: Sent) -> bool:
        """Take the job; False if it is not ready or somebody else's."""
        rows = await self._lender.rows(CLAIM, (WORKER, sent.id, list(self._app.registry)))
        if not rows:
            return False
        values = dict(zip(Claim._fields, rows[0], strict=True))
        raw = {name: None if values[name] is None else values[name].encode() for name in _JSON}
        self.job = Job(Claim(**{**values, **raw}), self._channel)
        self.handler = self._app.registry[self.job.job_type]
        return True

    @property
    def needs_loop(self) -> bool:
        return self.handler.executor == "async" or self._hooks is not None

    async def run(self) -> None:
        """In an event loop; plain functions in a thread."""
        self._channel.loop = asyncio.get_running_loop()
        call = self.handler.invoke if self.handler.executor == "async" else self._in_thread
        around = call if self._hooks is None else self._hooks.around(self.handler, call)
        try:
            value = self._value_of(await around(self.job))
            await self._complete(value)
        except Exception as error:
            await self._end(error)
        except Paused as error:
            await self._end(error)
        else:
            if self._hooks is not None:
                await self._hooks.after(self.handler, self.job, value)

    def run_here(self) -> None:
        """In this thread, which runs no event loop while the handler works."""
        try:
            client.blocking(self._complete(self._value_of(self.handler.invoke(self.job))))
        except Exception as error:
            client.blocking(self._end(error))
        except Paused as error:
            client.blocking(self._end(error))
        finally:
            self.job.end_loops()
            self._channel.close()

    async def _in_thread(self, job: Job) -> Any:
        return await asyncio.to_thread(self.handler.invoke, job)

    def _value_of(self, result: Any) -> Any:
        value = result[0] if self.handler.takes_batch and result is not None else result
        if self.handler.takes_batch and isinstance(value, BaseException):
            raise value
        return value

    async def _complete(self, value: Any) -> None:
        text = self.handler.encode_result(value)
        await self._channel.flush(self.job)
        if not self.job.settled:
            await self._channel.call(self.job, "complete", result=text, stats=self.job.stats_text())

    async def _end(self, error: BaseException) -> None:
        """As a worker would; see `jobqueue.worker.run.Runner.end`."""
        job, channel = self.job, self._channel
        if job.settled or isinstance(error, LeaseLost):
            raise error
        await job.flush()
        if isinstance(error, Paused) or (isinstance(error, Cancelled) and job.cancel_requested):
            await channel.call(job, "acknowledge")
        elif isinstance(error, Cancelled):
            await channel.call(job, "cancel_own", reason=str(error) or "the handler stopped")
        elif isinstance(error, Snooze):
            await channel.call(job, "snooze", delay=f"{error.delay} s")
        else:
            await self._fail(error)
            if self._raise_errors and not isinstance(error, Retry):
                raise error

    async def _fail(self, error: BaseException) -> None:
        found = failure_of(error, self.handler.classify or self._app.classify)
        retry_in = None if found.retry_in is None else f"{found.retry_in} s"
        error_text = to_json_text(found.as_error())
        status = await self._channel.call(self.job, "fail", error=error_text, retry_in=retry_in)
        if hooks := self._app.hooks.of("on_failure", self.handler.name):
            failed = FailedAttempt(error, found.error_class, found.code, found.message, status)
            await tell(hooks, self.job, failed)


class _Lender:
    """Where statements run: on the caller's connection, else on one of the app's."""

    def __init__(self, app: App, connection: Any, *, is_async: bool) -> None:
        self._app, self._connection, self._is_async = app, connection, is_async

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self._is_async:
            async with self._app._lend(self._connection) as lent:
                return await client.fetch(lent, query, parameters)
        with self._app._lend_blocking(self._connection) as blocking:
            return await client.fetch(blocking, query, parameters)

    @property
    def connections(self) -> Connections:
        if self._connection is not None:
            raise ConfigurationError(
                "a job that runs inline inside of your transaction cannot have a transaction of its own",
                hint="Send it without connection=, or let `drain` run it after the commit.",
            )
        return self._app._connections or self._app._connect()


class InlineChannel:
    """What `Job` talks to here; see `jobqueue.job.Channel`. Progress is written before the next call, and at the end."""

    _TYPES = {"error": "text::jsonb", "result": "text::jsonb", "stats": "text::jsonb", "data": "text::jsonb",
              "detail": "text::jsonb", "output": "text::jsonb", "retry_in": "text::interval", "delay": "text::interval",
              "keys": "text[]"}  # fmt: skip

    def __init__(self, lender: _Lender) -> None:
        self._lender = lender
        self._reports: list[tuple[int | None, str | None, str | None]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._calls: asyncio.AbstractEventLoop | None = None
        self._one_at_a_time = threading.Lock()

    @property
    def connections(self) -> Connections:
        return self._lender.connections

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        self._reports.append((pct, message, None if data is None else to_json_text(data)))

    async def flush(self, job: Job) -> None:
        """Write the progress that is noted."""
        reports, self._reports = self._reports, []
        for pct, message, data in reports:
            query = "select jobqueue.progress(%s::text::uuid, %s::text::uuid, %s::int, %s::text, %s::text::jsonb)"
            rows = await self._lender.rows(query, (job.claim.id, job.claim.claim_token, pct, message, data))
            job.deliver(rows[0][0])

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        await self.flush(job)
        named = [f"{name} => %s::{self._TYPES[name]}" if name in self._TYPES else f"{name} => %s" for name in arguments]
        places = ", ".join(["%s::text::uuid", "%s::text::uuid", *named])
        query = f"select jobqueue.{function}({places})"
        rows = await self._lender.rows(query, (job.claim.id, job.claim.claim_token, *arguments.values()))
        return rows[0][0] if rows else None

    async def keys(self, job: Job) -> set[str]:
        return {row[0] for row in await self._lender.rows(DONE_KEYS, (job.claim.id,))}

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        await self.flush(job)
        return await self._lender.rows(query, parameters)

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        if self.loop is not None:
            return asyncio.run_coroutine_threadsafe(awaitable, self.loop).result()
        # The same loop for all calls of a job, or its generators would end with the first; timers call from a thread.
        with self._one_at_a_time:
            if self._calls is None:
                self._calls = asyncio.new_event_loop()
            return self._calls.run_until_complete(awaitable)

    def close(self) -> None:
        """The handler has ended."""
        if self._calls is not None:
            self._calls.close()


def _run_in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from blocking code, also from code that a running event loop has called."""
    if asyncio._get_running_loop() is None:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="jobqueue-inline") as thread:
        run: Callable[[], T] = lambda: asyncio.run(coroutine)  # noqa: E731
        return thread.submit(run).result()
