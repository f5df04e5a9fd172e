"""Handlers: a job_type, how its payload is decoded, how it is called, how its result is encoded.

All decisions that depend on the signature are made once, at registration: `Handler.invoke` is a closure made for one
shape of call, without a branch or a dictionary lookup more than that shape needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jobqueue.errors import ConfigurationError, PermanentError
from jobqueue.hooks import Middleware, check_middleware
from jobqueue.job import Job, reset_current_job, set_current_job
from jobqueue.json_text import NotStorable, to_json_text
from jobqueue.labels import Label, check_label, render_label, shorten
from jobqueue.options import encode_options
from jobqueue.payloads import Decode, Payload
from jobqueue.signatures import CallShape, inspect_handler

if TYPE_CHECKING:
    from jobqueue.classify import Classifier

Executor = Literal["async", "thread", "process"]
Call = Callable[[Job], Any]
BatchCall = Callable[[list[Job]], Any]


class ResultInvalid(PermanentError):
    """The handler's result cannot be stored; the attempt ends as failed, without a retry."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="RESULT_INVALID")


@dataclass(frozen=True, slots=True)
class Handler:
    """One job_type. `invoke` and `invoke_batch` may be called as methods."""

    name: str
    queue: str
    function: Callable[..., Any]
    executor: Executor
    batch_size: int
    """Jobs per call; above 1 only for batch handlers."""
    takes_batch: bool
    """Whether it takes a list of jobs, even if only one at a time."""
    options: Mapping[str, Any]
    """Options of send that apply to its jobs, as JSON values."""
    stages: list[Any] | None
    label: Label | None
    pausable: bool
    classify: Classifier | None
    payload: Payload
    invoke: Call = field(repr=False)
    """Run it for one job. async: returns the coroutine; otherwise the result. Raises InvalidInput for a bad payload."""
    invoke_batch: BatchCall = field(repr=False)
    """The same for a list of jobs; only if `takes_batch`."""
    middleware: tuple[Middleware, ...] = ()
    """Its own middleware, inside of the app's."""

    @property
    def reference(self) -> str:
        """`module:qualname`, by which a child process finds the function. Raises ConfigurationError if it cannot."""
        module, name = self.function.__module__, self.function.__qualname__
        if "<" in name:
            raise ConfigurationError(
                f'the handler {self.name} runs with executor="process", so it must be defined at the top of a module',
                hint=f"{module}:{name} cannot be imported; move it out of the function that it is in.",
            )
        return f"{module}:{name}"

    def encode_result(self, value: Any) -> str | None:
        """Return a result as JSON text, None for None. Raises ResultInvalid if it cannot be stored."""
        if value is None:
            return None
        try:
            return to_json_text(value)
        except NotStorable as error:
            raise ResultInvalid(f"the result cannot be stored: {error}") from None

    def display_name(self, text: str, metadata: Mapping[str, Any] | None) -> str | None:
        """Return the label of a job with this payload (JSON text), or None. Raises what a label function raises."""
        if self.label is None:
            return None
        data = dict(metadata or {})
        if callable(self.label):
            return shorten(str(self.label(self.payload.validated(text), data)))
        import json

        return render_label(self.label, json.loads(text), data)

    def describe(self) -> dict[str, Any]:
        """The element of `jobqueue.register_job_types`."""
        return {
            "name": self.name,
            "queue": self.queue,
            "label": self.label if isinstance(self.label, str) else None,
            "options": dict(self.options),
            "stages": self.stages,
            "pausable": self.pausable,
        }


class Registry(Mapping[str, Handler]):
    """Handlers by job_type."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(self, handler: Handler) -> None:
        """Register a handler. Raises ConfigurationError if another function has the name."""
        other = self._handlers.get(handler.name)
        if other is not None and not _is_same(other.function, handler.function):
            raise ConfigurationError(
                f"two handlers are called {handler.name}: {_where(other.function)} and {_where(handler.function)}",
                hint='Give one of them another name: @app.job("name").',
            )
        self._handlers[handler.name] = handler

    def of_function(self, function: object) -> Handler | None:
        """Return the handler that a function was registered as, or None."""
        return next((handler for handler in self._handlers.values() if handler.function is function), None)

    def queues(self) -> list[str]:
        """The queues of all handlers, in order of name."""
        return sorted({handler.queue for handler in self._handlers.values()})

    def __getitem__(self, name: str) -> Handler:
        return self._handlers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handlers)

    def __len__(self) -> int:
        return len(self._handlers)


def make_handler(
    function: Callable[..., Any],
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
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, Any] | None = None,
) -> Handler:
    """Make a handler of a function; see `App.job`. `names`: local names for annotations given as text."""
    job_type = name or function.__name__
    shape = inspect_handler(function, names)
    chosen = _executor(function, executor, job_type)
    _check_batch(shape, batch_size, chosen, job_type)
    check_label(label, job_type)
    for function_around in middleware:
        check_middleware(function_around)
    payload = Payload(job_type, shape.payload)
    is_async = chosen == "async"
    batch = _batch_call(function, is_async) if shape.is_batch else _no_batch(job_type)
    return Handler(
        name=job_type,
        queue=queue or job_type,
        function=function,
        executor=chosen,
        batch_size=batch_size,
        takes_batch=shape.is_batch,
        options=encode_options(options or {}, f"the handler {job_type}"),
        stages=list(stages) if stages is not None else None,
        label=label,
        pausable=pausable,
        classify=classify,
        middleware=tuple(middleware),
        payload=payload,
        invoke=(lambda job: batch([job])) if shape.is_batch else _call(function, shape, payload.decode, is_async),
        invoke_batch=batch,
    )


# -- Calls ------------------------------------------------------------------------------------------------------------


def _call(function: Callable[..., Any], shape: CallShape, decode: Decode | None, is_async: bool) -> Call:
    bare = _bare_call(function, shape.roles, decode)
    return _async_call(bare) if is_async else _blocking_call(bare)


def _bare_call(function: Callable[..., Any], roles: tuple[str, ...], decode: Decode | None) -> Call:
    if roles == ():
        return lambda job: function()
    if roles == ("job",):
        return function
    if decode is None:
        return {
            ("payload",): lambda job: function(job.payload),
            ("job", "payload"): lambda job: function(job, job.payload),
            ("payload", "job"): lambda job: function(job.payload, job),
        }[roles]
    # What was not decoded yet goes to the validator as it came: it reads JSON faster than we do.
    return {
        ("payload",): lambda job: function(decode(job._payload)),
        ("job", "payload"): lambda job: function(job, decode(job._payload)),
        ("payload", "job"): lambda job: function(decode(job._payload), job),
    }[roles]


def _async_call(bare: Call) -> Call:
    def invoke(job: Job) -> Any:
        set_current_job(job)
        if job.claim.checkpoint_id is None:
            return bare(job)
        return prepared(job)

    async def prepared(job: Job) -> Any:
        await job.prepare()
        return await bare(job)

    return invoke


def _blocking_call(bare: Call) -> Call:
    def invoke(job: Job) -> Any:
        token = set_current_job(job)
        try:
            if job.claim.checkpoint_id is not None:
                job._channel.blocking(job.prepare())
            return bare(job)
        finally:
            reset_current_job(token)

    return invoke


def _batch_call(function: Callable[[list[Job]], Any], is_async: bool) -> BatchCall:
    async def prepared(jobs: list[Job]) -> Any:
        for job in jobs:
            await job.prepare()
        result: Awaitable[Any] = function(jobs)
        return await result

    def invoke_async(jobs: list[Job]) -> Any:
        if any(job.claim.checkpoint_id is not None for job in jobs):
            return prepared(jobs)
        return function(jobs)

    def invoke(jobs: list[Job]) -> Any:
        for job in jobs:
            if job.claim.checkpoint_id is not None:
                job._channel.blocking(job.prepare())
        return function(jobs)

    return invoke_async if is_async else invoke


def _no_batch(job_type: str) -> BatchCall:
    def refuse(jobs: list[Job]) -> Any:
        raise TypeError(f"the handler {job_type} takes one job at a time")

    return refuse


# -- Checks -----------------------------------------------------------------------------------------------------------


def _executor(function: Callable[..., Any], given: Executor | None, job_type: str) -> Executor:
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if given is None:
        return "async" if is_async else "thread"
    if given not in ("async", "thread", "process"):
        raise ConfigurationError(f'{job_type}: there is no executor "{given}": async, thread or process')
    if is_async != (given == "async"):
        kind = "async def" if is_async else "plain def"
        raise ConfigurationError(
            f'{job_type} is a {kind}, so it cannot run with executor="{given}"',
            hint='async def runs with "async", plain def with "thread" or "process".',
        )
    return given


def _check_batch(shape: CallShape, batch_size: int, executor: Executor, job_type: str) -> None:
    if batch_size < 1:
        raise ConfigurationError(f"{job_type}: batch_size must be at least 1, not {batch_size}")
    if shape.is_batch and executor == "process":
        raise ConfigurationError(f"{job_type}: a batch handler cannot run in a process", hint='Use executor="thread".')
    if batch_size > 1 and not shape.is_batch:
        raise ConfigurationError(f"{job_type} has batch_size={batch_size}, so it must take jobs: list[Job]")


def _is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """A module that is imported twice (reloaded, or run as __main__) registers the same handler again."""
    return one is other or _where(one) == _where(other)


def _where(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
