"""Query parameters and headers that several routes have, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import FIELDS, ID
from jobqueue.api.limits import unknown_name
from jobqueue.api.operations import Parameter
from jobqueue.records import Status

LONGEST_WAIT = 30.0
MOST_PER_PAGE = 200
MOST_IDS = 100
LAST_BY_PAGE = 10_000
"""Pages by number reach this far; what lies behind is reached by cursor."""
INCLUDES = ("stages", "attempts")
STATUSES: tuple[str, ...] = get_args(Status)
ERROR_CLASSES = ("transient", "permanent", "quota", "invalid", "lost")

_WAIT = re.compile(r"\d{1,6}(?:\.\d{1,6})?")
_WHOLE = re.compile(r"\d{1,9}")
_TEXT = {"type": "string"}


def parse_wait(text: str) -> float:
    """Return seconds, at most 30. Raises ApiError (400)."""
    if not _WAIT.fullmatch(text):
        raise ApiError("INVALID_ARGUMENT", "wait must be a number of seconds.", status=400, hint="For example wait=25.")
    return min(float(text), LONGEST_WAIT)


def names_of(what: str, known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what reads names separated by commas; it raises ApiError (422) with the nearest for an unknown one."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise ApiError("INVALID_ARGUMENT", **unknown_name(what, name, list(known)))
        return names

    return parse


def whole(name: str, most: int) -> Callable[[str], int]:
    """Return what reads a whole number from 1; a larger one than `most` becomes `most`. It raises ApiError (400, 422)."""

    def parse(text: str) -> int:
        if not _WHOLE.fullmatch(text):
            raise ApiError("INVALID_ARGUMENT", f"{name} must be a whole number.", status=400)
        if int(text) < 1:
            raise ApiError("INVALID_ARGUMENT", f"{name} must be at least 1.")
        return min(int(text), most)

    return parse


def some(name: str) -> Callable[[str], list[str]]:
    """Return what reads texts separated by commas, at least one. It raises ApiError (422)."""

    def parse(text: str) -> list[str]:
        texts = [part.strip() for part in text.split(",") if part.strip()]
        if not 1 <= len(texts) <= MOST_IDS:
            raise ApiError("INVALID_ARGUMENT", f"{name} takes 1 to {MOST_IDS} values, separated by commas.")
        return texts

    return parse


def parse_ids(text: str) -> list[str]:
    """Return ids of jobs. Raises ApiError (422) if one is malformed, or for more than 100."""
    ids = some("ids")(text)
    for given in ids:
        if not ID.fullmatch(given):
            raise ApiError(
                "INVALID_ARGUMENT",
                "ids has something that is not the id of a job.",
                details={"id": given[:100].encode("utf-8", "replace").decode()},
            )
    return ids


def _listed(name: str, description: str, known: tuple[str, ...] | None, example: Any = None) -> Parameter:
    parse = names_of(name, known) if known else some(name)
    return Parameter(name, description + " Several with commas.", _TEXT, parse, example)


WAIT = Parameter(
    "wait",
    "Seconds to wait for news, at most 30: at once if the ETag in If-None-Match differs or, without one, if the "
    "job has ended; else until its version or alive changes.",
    {"type": "number", "minimum": 0},
    parse_wait,
    25,
)
JOB_FIELDS = Parameter(
    "fields", "Only these, separated by commas.", _TEXT, names_of("field", FIELDS), "id,status,progress_pct"
)
INCLUDE = Parameter(
    "include",
    "More: stages, attempts. Stack traces only with jobs:act or admin.",
    _TEXT,
    names_of("include", INCLUDES),
    "stages,attempts",
)
LIMIT = Parameter(
    "limit",
    "Jobs per page: 20, at most 200.",
    {"type": "integer", "minimum": 1},
    whole("limit", MOST_PER_PAGE),
    50,
)
PER_PAGE = Parameter(
    "per_page",
    "The same as limit.",
    {"type": "integer", "minimum": 1},
    whole("per_page", MOST_PER_PAGE),
    50,
)
PAGE = Parameter(
    "page",
    "A page by its number, from 1; reaches 10,000 jobs far. Not together with cursor.",
    {"type": "integer", "minimum": 1},
    whole("page", 10**9),
    1,
)
CURSOR = Parameter("cursor", "`meta.next_cursor` of the page before, with the same filters.", _TEXT)

STATUS = _listed("status", "In this status.", STATUSES, "failed,paused")
QUEUE = _listed("queue", "Of this queue.", None, "indexing")
JOB_TYPE = _listed("job_type", "Of this job_type.", None)
SUBJECT = Parameter("subject", "About this.", _TEXT)
TENANT = Parameter("tenant", "Of this tenant; 403 if it is not yours.", _TEXT)
IDS = Parameter("ids", "These, at most 100, separated by commas.", _TEXT, parse_ids)
CREATED_AFTER = Parameter(
    "created_after", "Sent after this time: RFC 3339 with an offset.", {"type": "string", "format": "date-time"}
)
CREATED_BEFORE = Parameter("created_before", "Sent before this time.", {"type": "string", "format": "date-time"})
ERROR_CLASS = _listed("error_class", "Whose last failure is of this class.", ERROR_CLASSES, "transient")

FILTERS = (STATUS, QUEUE, JOB_TYPE, SUBJECT, TENANT, IDS, CREATED_AFTER, CREATED_BEFORE, ERROR_CLASS)

CONDITION = Parameter("If-None-Match", "The ETag of what the client has.", _TEXT)
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "1 to 255 printable characters, kept for 24 hours: a repeated request finds what the first one did.",
    {"type": "string", "minLength": 1, "maxLength": 260},
)
ETAG_HEADER = {"ETag": 'W/"<version>-<x>": x follows alive while processing, and a 10 s bucket while pending.'}
RETRY_AFTER_HEADER = {"Retry-After": "Seconds until the next poll is worth while; missing once the job has ended."}
