"""Calling an app's hooks around jobs and in the life of a worker.

A worker without hooks has no `JobHooks`, and its runner asks only whether there is one. With hooks, what a job_type needs is
looked up once and kept.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobqueue.hooks import FailedAttempt, Hook, Middleware
from jobqueue.job import set_current_job

if TYPE_CHECKING:
    from jobqueue.handlers import Handler
    from jobqueue.hooks import Hooks
    from jobqueue.job import Job
    from jobqueue.worker.held import Held

Call = Callable[[Any], Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is called for the jobs of one job_type."""

    before: tuple[Hook, ...]
    middleware: tuple[Middleware, ...]
    after: tuple[Hook, ...]


class JobHooks:
    """The hooks around the jobs of a worker. All methods are for the event loop's thread."""

    def __init__(self, hooks: Hooks, handlers: Mapping[str, Handler]) -> None:
        self._hooks = hooks
        self._plans = {name: _plan(hooks, handler) for name, handler in handlers.items()}
        self._tasks: set[asyncio.Task[None]] = set()

    def around(self, handler: Handler, call: Call) -> Call:
        """Return a call with `before_job` and the middleware around it; the job is `current_job()` in all of them."""
        plan = self._plans[handler.name]
        if not plan.before and not plan.middleware:
            return call
        inner = call
        for middleware in reversed(plan.middleware):
            inner = _link(middleware, inner)

        async def run(job: Job | list[Job]) -> Any:
            for one in job if isinstance(job, list) else (job,):
                set_current_job(one)
                for hook in plan.before:
                    await _call(hook, one)
            return await inner(job)

        return run

    def has_after(self, handler: Handler) -> bool:
        """Whether somebody wants to know that jobs of this type completed."""
        return bool(self._plans[handler.name].after)

    async def after(self, handler: Handler, job: Job, result: Any) -> None:
        """Tell that a job completed."""
        for hook in self._plans[handler.name].after:
            await _call_safely(hook, job, result)

    def failed(self, held: Held, error: Mapping[str, Any], status: str) -> None:
        """Tell that an attempt failed; the hooks run beside the worker's own work."""
        hooks = self._hooks.of("on_failure", held.handler.name)
        if hooks and held.job is not None:
            failure = FailedAttempt(
                held.error, str(error["class"]), str(error["code"]), str(error["message"]), status
            )  # fmt: skip
            self._spawn(_all_safely(hooks, held.job, failure))

    def lost(self, held: Held) -> None:
        """Tell that the claim of a running job is gone."""
        hooks = self._hooks.of("on_lost", held.handler.name)
        if hooks and held.job is not None:
            self._spawn(_all_safely(hooks, held.job))

    async def close(self, patience: float) -> None:
        """Wait for hooks under way, for at most `patience` seconds; the rest is cancelled."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            for task in late:
                task.cancel()
            if late:
                logger.warning("%d hooks were still running when the worker stopped", len(late))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine, name="jobqueue-hook")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def make_job_hooks(
    hooks: Hooks, handlers: Mapping[str, Handler], held: Mapping[str, Held] | None = None
) -> JobHooks | None:
    """Return what calls the hooks around jobs, or None if there are none: then jobs cost what they cost without hooks.

    `held`: the worker's jobs, by id; tracing reads there why a handler was stopped.
    """
    if hooks.tracing is not None:
        made: JobHooks = hooks.tracing(hooks, handlers, {} if held is None else held)
        return made
    own = any(handler.middleware for handler in handlers.values())
    if own or hooks.before_job or hooks.after_job or hooks.on_failure or hooks.middleware or hooks.on_lost:
        return JobHooks(hooks, handlers)
    return None


async def tell(hooks: Sequence[Hook], *arguments: Any) -> None:
    """Call hooks one after the other; what they raise is logged."""
    await _all_safely(hooks, *arguments)


async def insist(hooks: Sequence[Hook], *arguments: Any) -> None:
    """Call hooks one after the other. Raises what they raise."""
    for hook in hooks:
        await _call(hook, *arguments)


def _plan(hooks: Hooks, handler: Handler) -> Plan:
    name = handler.name
    return Plan(
        hooks.of("before_job", name), (*hooks.of("middleware", name), *handler.middleware), hooks.of("after_job", name)
    )


def _link(middleware: Middleware, inner: Call) -> Call:
    async def call_next(job: Any) -> Any:
        return await inner(job)

    return lambda job: middleware(job, call_next)


async def _call(hook: Hook, *arguments: Any) -> None:
    result = hook(*arguments)
    if inspect.isawaitable(result):
        awaited: Awaitable[Any] = result
        await awaited


async def _call_safely(hook: Hook, *arguments: Any) -> None:
    try:
        await _call(hook, *arguments)
    except Exception:
        logger.exception("the hook %s failed; nothing else is changed", getattr(hook, "__qualname__", hook))


async def _all_safely(hooks: Sequence[Hook], *arguments: Any) -> None:
    for hook in hooks:
        await _call_safely(hook, *arguments)
