"""What our worker can do for a task beyond procrastinate: said at its function, below `@app.task`.

@app.task(queue="exports")
@options(timeout="10 min", executor="process")
def export(customer: int) -> dict: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jobqueue.errors import ConfigurationError
from jobqueue.job import Job
from jobqueue.options import encode_options

F = TypeVar("F", bound=Callable[..., Any])

ATTRIBUTE = "__jobqueue_options__"
ENTRY = "__jobqueue_entry__"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of one task; the defaults are those of every task."""

    executor: Literal["process"] | None = None
    pausable: bool = False
    label: str | None = None
    time_zone: str | None = None
    send: dict[str, Any] = field(default_factory=dict)


def options(
    *,
    executor: Literal["process"] | None = None,
    pausable: bool = False,
    label: str | None = None,
    time_zone: str | None = None,
    **more: Any,
) -> Callable[[F], F]:
    """Give a task's function options for `jobqueue worker`; procrastinate's own worker ignores them.

    `executor`: "process" runs a plain `def` in a child process that can really be stopped (default: a thread).
    `pausable`: a running job may be paused where it reports a stage or a checkpoint (default: no). `label`: the jobs'
    name for people, `"Export for {payload.customer}"`. `time_zone`: of the task's periodic schedules (default UTC).
    `more`: timeout, max_runtime (seconds or a duration; default none), lease, keep_completed, keep_ended, dead_letter.

    Raises UnknownOption, ConfigurationError for executor="process" with an async def.
    """
    encoded = encode_options(more, "a task's options")
    chosen = TaskOptions(executor, pausable, label, time_zone, encoded)

    def mark(function: F) -> F:
        setattr(function, ATTRIBUTE, chosen)
        if executor == "process":
            setattr(function, ENTRY, _entry(function))
        return function

    return mark


def options_of(function: Callable[..., Any]) -> TaskOptions:
    """Return the options of a task's function."""
    found = getattr(function, ATTRIBUTE, None)
    return found if isinstance(found, TaskOptions) else TaskOptions()


def _entry(function: Callable[..., Any]) -> Callable[[Job], Any]:
    """What a child process calls; it finds it as `module:task.func.__jobqueue_entry__`."""
    import inspect

    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f'{function.__qualname__} is an async def, so it cannot run with executor="process"',
            hint="Make it a plain def.",
        )

    def entry(job: Job) -> Any:
        from jobqueue.procrastinate.running import run_in_child

        return run_in_child(function, job)

    entry.__module__ = function.__module__
    entry.__qualname__ = f"{function.__qualname__}.func.{ENTRY}"
    return entry
