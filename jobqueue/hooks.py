"""Hooks: functions of the app around its jobs and in the life of its workers.

```
before_job ─► middleware (the app's, then the handler's own) ─► handler ─► back through middleware ─► stored ─► after_job
    └────────────────────┴── an exception ends the attempt ──┴─────────────────┘ ─► written ─► on_failure
on_worker_start ─► … on_lost, on_warning … ─► on_worker_stopping ─► on_worker_stopped
```

Hooks of one kind run in the order in which they were registered. All run in the worker's event loop, also around handlers in
threads and processes; a plain `def` hook must therefore be short. This module only keeps them; `worker/hooks.py` calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from jobqueue.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])
Hook = Callable[..., Any]
CallNext = Callable[[Any], Awaitable[Any]]
Middleware = Callable[[Any, CallNext], Awaitable[Any]]
Timed = Callable[[str, Collection[str]], AbstractContextManager[None]]
"""Measures what happens inside of a block: the name of the operation, and the queues that it is about."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """How an attempt failed, as `on_failure` hears of it after the database has decided what follows."""

    error: BaseException | None
    """What the handler raised; None for a time-out and for a result that was too large."""
    error_class: str
    """transient, permanent, quota, invalid or lost."""
    code: str
    message: str
    status: str
    """The status of the job now: pending (a retry follows), failed, or what was asked of it (cancelled, paused)."""

    @property
    def will_retry(self) -> bool:
        """Whether a retry follows."""
        return self.status == "pending"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The worker that a hook of its life is called for."""

    id: UUID
    name: str
    queues: tuple[str, ...] | None
    """None: all queues."""
    concurrency: int


@dataclass(frozen=True, slots=True)
class WorkerWarning:
    """What `on_warning` hears: a row of `jobqueue.health()` that is not ok, once per process and cause."""

    name: str
    status: str
    """warn or fail."""
    detail: str
    what_to_do: str | None


@dataclass(frozen=True, slots=True)
class _Entry:
    hook: Hook
    job_types: frozenset[str] | None


@dataclass(slots=True)
class Hooks:
    """The hooks of an app, by kind, in order of registration."""

    before_job: list[_Entry] = field(default_factory=list)
    after_job: list[_Entry] = field(default_factory=list)
    on_failure: list[_Entry] = field(default_factory=list)
    middleware: list[_Entry] = field(default_factory=list)
    on_lost: list[_Entry] = field(default_factory=list)
    on_warning: list[_Entry] = field(default_factory=list)
    on_worker_start: list[_Entry] = field(default_factory=list)
    on_worker_stopping: list[_Entry] = field(default_factory=list)
    on_worker_stopped: list[_Entry] = field(default_factory=list)
    tracing: Callable[..., Any] | None = None
    """Makes what calls the hooks around jobs, if they are traced; of `app.instrument`."""
    timed: Timed | None = None
    """Measures what a worker asks of the database, if that is wanted; of `app.instrument`."""

    def of(self, kind: str, job_type: str | None = None) -> tuple[Hook, ...]:
        """Return the hooks of a kind, for a job_type those that apply to it."""
        entries: list[_Entry] = getattr(self, kind)
        return tuple(
            entry.hook
            for entry in entries
            if job_type is None or entry.job_types is None or job_type in entry.job_types
        )


class HookRegistration:
    """The part of `App` that registers hooks: `@app.before_job`, or for some job_types `@app.before_job("export")`."""

    hooks: Hooks

    def before_job(self, hook: Any, *job_types: str) -> Any:
        """Call `hook(job)` before each job. An exception fails the attempt like one of the handler.

        Like all of these for jobs: with one or more names instead of the function, only for these job_types. For a batch
        handler it is called once per job.
        """
        return self._register(self.hooks.before_job, hook, job_types)

    def after_job(self, hook: Any, *job_types: str) -> Any:
        """Call `hook(job, result)` after each job that completed. An exception is logged and changes nothing.

        It runs in the handler's context while the completion is being written, and keeps the job's slot until it returns.
        """
        return self._register(self.hooks.after_job, hook, job_types)

    def on_failure(self, hook: Any, *job_types: str) -> Any:
        """Call `hook(job, failure: FailedAttempt)` after each attempt that failed, once the database knows.

        `failure.will_retry` says whether a retry follows. An exception is logged and changes nothing. Not called for
        what is no failure (Retry and time-outs are; Snooze, Cancelled, pause, release are not), nor for an attempt that
        the worker lost: that is `on_lost`.
        """
        return self._register(self.hooks.on_failure, hook, job_types)

    def middleware(self, hook: Any, *job_types: str) -> Any:
        """Wrap jobs: `async def hook(job, call_next)`, where `await call_next(job)` runs the rest and gives the result.

        What it returns is the job's result; it may raise what a handler may (Retry, Snooze, PermanentError, …). The
        first one registered is the outermost. A batch handler gets the list of jobs in the place of the job. Raises
        ConfigurationError if it is not async.
        """
        return self._register(self.hooks.middleware, hook, job_types, check_middleware)

    def on_lost(self, hook: Any, *job_types: str) -> Any:
        """Call `hook(job)` when the claim of a running job was lost: others may have it. An exception is logged."""
        return self._register(self.hooks.on_lost, hook, job_types)

    def on_warning(self, hook: F) -> F:
        """Call `hook(warning: WorkerWarning)` for a backlog, slow jobs, …; once per worker process and cause."""
        return self._add(self.hooks.on_warning, hook, None)

    def on_worker_start(self, hook: F) -> F:
        """Call `hook(worker: WorkerInfo)` before a worker claims its first job. An exception ends the worker."""
        return self._add(self.hooks.on_worker_start, hook, None)

    def on_worker_stopping(self, hook: F) -> F:
        """Call `hook(worker: WorkerInfo)` when a worker begins to drain. An exception is logged."""
        return self._add(self.hooks.on_worker_stopping, hook, None)

    def on_worker_stopped(self, hook: F) -> F:
        """Call `hook(worker: WorkerInfo)` when a worker has written everything. An exception is logged."""
        return self._add(self.hooks.on_worker_stopped, hook, None)

    def _register(
        self,
        entries: list[_Entry],
        hook: Any,
        job_types: tuple[str, ...],
        check: Callable[[Any], object] | None = None,
    ) -> Any:
        if isinstance(hook, str):
            chosen = frozenset({hook, *job_types})
            return lambda function: self._add(entries, function, chosen, check)
        return self._add(entries, hook, None, check)

    def _add(
        self,
        entries: list[_Entry],
        hook: F,
        job_types: frozenset[str] | None,
        check: Callable[[Any], object] | None = None,
    ) -> F:
        if not callable(hook):
            raise ConfigurationError(f"{hook!r} is no function", hint="Use it as @app.before_job or with job_types.")
        if check is not None:
            check(hook)
        entries.append(_Entry(hook, job_types))
        return hook


def check_middleware(function: Any) -> None:
    """Raise ConfigurationError for a middleware that is not async: nobody would wait for what it calls."""
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
        name = getattr(function, "__qualname__", repr(function))
        raise ConfigurationError(
            f"the middleware {name} must be async",
            hint="Write: async def middleware(job, call_next): return await call_next(job).",
        )
