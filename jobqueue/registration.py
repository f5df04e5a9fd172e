"""Registering handlers: `@app.job("index_repository", queue="indexing", max_retries=3)`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from jobqueue.handlers import Executor, Registry, make_handler
from jobqueue.hooks import HookRegistration, Hooks, Middleware
from jobqueue.labels import Label

if TYPE_CHECKING:
    from jobqueue.classify import Classifier

F = TypeVar("F", bound=Callable[..., Any])


class Registration(HookRegistration):
    """The part of `App` that keeps its handlers and hooks."""

    def __init__(self, classify: Classifier | None = None) -> None:
        self.registry = Registry()
        self.hooks = Hooks()
        self.classify = classify

    @overload
    def job(self, name: F) -> F: ...
    @overload
    def job(
        self,
        name: str | None = None,
        *,
        queue: str | None = None,
        label: Label | None = None,
        executor: Executor | None = None,
        batch_size: int = 1,
        stages: list[Any] | None = None,
        pausable: bool = False,
        classify: Classifier | None = None,
        middleware: Sequence[Middleware] = (),
        **options: Any,
    ) -> Callable[[F], F]: ...
    def job(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        queue: str | None = None,
        label: Label | None = None,
        executor: Executor | None = None,
        batch_size: int = 1,
        stages: list[Any] | None = None,
        pausable: bool = False,
        classify: Classifier | None = None,
        middleware: Sequence[Middleware] = (),
        **options: Any,
    ) -> Any:
        """Register a handler: `@app.job("index_repository", queue="indexing", max_retries=3)`.

        `name`: the job_type (default: the function's name). `queue`: where its jobs wait (default: the name).
        `label`: the jobs' name for people, `"Indexing: {payload.path}"` or a function of payload and metadata.
        `executor`: default "async" for async def, "thread" for def; or "process". `batch_size`: jobs per call for a
        handler that takes list[Job] (default 1). `stages`: names, or objects with name and weight. `pausable`: a
        running job may be paused at any stage, checkpoint or saved item. `classify`: its own error classifier.
        `middleware`: its own middleware, inside of the app's (see `App.middleware`).
        `options`: options of `send` for all its jobs, for example max_retries, timeout, priority; those of a call win.

        Returns the function unchanged, so it can still be called. Raises TypeError for a signature that cannot be
        served, UnknownOption, ConfigurationError for a name that is taken.
        """
        frame = sys._getframe(1)

        def register(function: F) -> F:
            handler = make_handler(
                function,
                None if callable(name) else name,
                queue=queue,
                label=label,
                executor=executor,
                batch_size=batch_size,
                stages=stages,
                pausable=pausable,
                classify=classify or self.classify,
                middleware=middleware,
                options=options,
                names=frame.f_locals,
            )
            self.registry.add(handler)
            return function

        return register(name) if callable(name) else register
