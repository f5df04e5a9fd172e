"""How a handler wants to be called, read from its signature once, when it is registered.

A handler may take the job (`job: Job` or `Job | None`), its payload (a pydantic model, a dataclass, a dict) or nothing,
in either order; a batch handler takes `list[Job]`. Without annotations a parameter called `job` is the job, and the
other one the payload.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobqueue.job import Job
from jobqueue.payloads import without_none

Role = Literal["job", "payload", "batch"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class CallShape:
    """What to pass, in order."""

    roles: tuple[Role, ...]
    payload: Any
    """The annotation of the payload; Any if it has none, None if the handler takes no payload."""

    @property
    def is_batch(self) -> bool:
        """Whether it takes a list of jobs."""
        return self.roles == ("batch",)


def inspect_handler(function: Callable[..., Any], names: Mapping[str, Any] | None = None) -> CallShape:
    """Return how to call a handler. `names`: local names for annotations given as text.

    Raises TypeError, with what is possible, for a signature that cannot be served.
    """
    hints = _hints(function, names or {})
    parameters = [p for p in inspect.signature(function).parameters.values() if not _is_optional(p)]
    if any(p.kind not in _POSITIONAL for p in parameters):
        raise _refused(function, "its parameters must be positional")
    if len(parameters) > 2:
        raise _refused(function, f"it takes {len(parameters)} arguments")
    roles = _roles([(p.name, hints.get(p.name, inspect.Parameter.empty)) for p in parameters])
    if sorted(roles) not in ([], ["job"], ["payload"], ["batch"], ["job", "payload"]):
        raise _refused(function, f"it takes {' and '.join(roles)}")
    payload = next(
        (hints.get(p.name, Any) for p, role in zip(parameters, roles, strict=True) if role == "payload"), None
    )
    return CallShape(tuple(roles), payload)


def _roles(parameters: Sequence[tuple[str, Any]]) -> list[Role]:
    roles = [_role(name, annotation) for name, annotation in parameters]
    if len(roles) == 2 and roles == ["payload", "payload"] and parameters[0][1] is inspect.Parameter.empty:
        return ["job", "payload"]
    return roles


def _role(name: str, annotation: Any) -> Role:
    if annotation is inspect.Parameter.empty:
        return "job" if name == "job" else "payload"
    bare = without_none(annotation)
    if isinstance(bare, type) and issubclass(bare, Job):
        return "job"
    if typing.get_origin(bare) in (list, Sequence) and typing.get_args(bare) == (Job,):
        return "batch"
    return "payload"


def _is_optional(parameter: inspect.Parameter) -> bool:
    """What has a default is left alone, unless it is the job or the payload by its place."""
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return True
    return parameter.default is not inspect.Parameter.empty and parameter.name not in ("job", "payload")


def _hints(function: Callable[..., Any], names: Mapping[str, Any]) -> dict[str, Any]:
    target = inspect.unwrap(function)
    try:
        return typing.get_type_hints(target, localns={"Job": Job, **names}, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"an annotation of the handler {_name(function)} cannot be resolved: {error}; "
            "its types must be importable where the handler is defined"
        ) from None
    except TypeError:
        # A callable object without annotations of its own.
        return {}


def _refused(function: Callable[..., Any], why: str) -> TypeError:
    return TypeError(
        f"the handler {_name(function)} cannot be called: {why}. A handler may take job: Job, a payload, both "
        "or nothing; a batch handler takes list[Job]."
    )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
