"""The operation table: one row per route drives routing, the checks of a request, and the OpenAPI document.

A resource's file (jobs.py, probes.py, …) holds its handlers and its rows; app.py puts the rows together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from jobqueue.api.context import Call

Handler = Callable[[Call], Awaitable[Response]]

COMMON_ERRORS = ("UNAUTHORIZED", "FORBIDDEN", "QUOTA_EXCEEDED", "INTERNAL", "UNAVAILABLE", "TIMED_OUT")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter or header. `parse` turns its text into a value and raises ApiError; headers are for show."""

    name: str
    description: str
    schema: Mapping[str, Any]
    parse: Callable[[str], Any] = str
    example: Any = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer: its body (one of these models; none: empty), and the headers that it may have.

    `media`: what it is if it is no JSON; the document then says that it is text.
    """

    description: str
    models: tuple[type[BaseModel], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    media: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    `name`: operationId. `path`: without prefix; `{id}` is a job's id unless `path_schemas` has its schema. `scopes`: any
    one of these is needed; none: open to all. `request_required`: whether a body must be there. `errors`: codes beside
    those of every operation. `of_tenant`: also mounted below a tenant. `is_probe`: also answered without the prefix, and
    without looking at who asks. `is_stream`: counts against the quota of streams, and takes `?ticket=` instead of a key.
    `link`: its name among the `links` of a job. `at_root`: also answered without the prefix. `is_free`: costs no quota.
    `public_setting`: the setting that opens it to all.
    """

    name: str
    method: str
    path: str
    summary: str
    handler: Handler
    tag: str
    description: str = ""
    scopes: tuple[str, ...] = ()
    query: tuple[Parameter, ...] = ()
    headers: tuple[Parameter, ...] = ()
    request: tuple[type[BaseModel], ...] = ()
    path_schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    request_examples: Mapping[str, Any] = field(default_factory=dict)
    request_required: bool = True
    replies: Mapping[int, Reply] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    of_tenant: bool = False
    is_probe: bool = False
    is_stream: bool = False
    link: str | None = None
    at_root: bool = False
    is_free: bool = False
    public_setting: str | None = None

    @property
    def bucket(self) -> str:
        """The quota that it counts against: reads, writes or streams."""
        if self.is_stream:
            return "streams"
        return "reads" if self.method in {"GET", "HEAD"} else "writes"
