"""Conditional requests and polling: ETags, Retry-After."""

from __future__ import annotations

import random
import re

ENDED = frozenset({"completed", "failed", "cancelled", "skipped"})

_ETAG = re.compile(r'(?:W/)?("[^"]*")|(\*)')


def parse_if_none_match(value: str | None) -> list[str] | None:
    """Return the ETags of an If-None-Match header as weak ones (`W/"…"`), or `["*"]`; None if there is none."""
    if value is None:
        return None
    found = ["*" if star else f"W/{tag}" for tag, star in _ETAG.findall(value)]
    return found[:20] or None


def retry_after(status: str, due_in: float | None, ends_in: float | None) -> int | None:
    """Return how many seconds a client should wait before it polls again; None once the job has ended.

    `due_in`: seconds to the job's run_at; `ends_in`: seconds to its estimated end, if there is an estimate. Processing:
    a tenth of what is left, 1 to 15 s. Pending: a fifth, 2 to 30 s; with its time ahead: until then, at most 60 s.
    Paused or blocked: 30 s. Up to 10 % more at random, so that clients do not come all at once.
    """
    if status in ENDED:
        return None
    if status == "processing":
        seconds = _clamp((ends_in or 0.0) / 10, 2 if ends_in is None else 1, 15)
    elif status == "pending" and due_in is not None and due_in > 2:
        seconds = min(due_in, 60.0)
    elif status == "pending":
        seconds = _clamp((ends_in or 0.0) / 5, 2, 30)
    else:
        seconds = 30.0
    return max(1, round(seconds * random.uniform(1.0, 1.1)))


def _clamp(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)
