"""Errors of the API as the library's exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobqueue.errors import (
    BY_CODE,
    BadRequest,
    ConflictError,
    JobqueueError,
    LimitReached,
    NotAllowed,
    NotFound,
    TimedOut,
    TooLarge,
)


class Unauthorized(NotAllowed):
    """`UNAUTHORIZED`: the key is missing, unknown, expired or revoked."""

    code = "UNAUTHORIZED"


class ServiceUnavailable(JobqueueError):
    """`UNAVAILABLE`: the API or its database cannot be reached; the same call may work later."""

    code = "UNAVAILABLE"
    exit_code = 69


BY_STATUS: Mapping[int, type[JobqueueError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: NotAllowed,
    404: NotFound,
    405: BadRequest,
    409: ConflictError,
    413: TooLarge,
    415: BadRequest,
    422: BadRequest,
    429: LimitReached,
    503: ServiceUnavailable,
    504: TimedOut,
}


def problem_of(status: int, body: Any, retry_after: float | None) -> JobqueueError:
    """Return the exception that an answer means. `details` has `status`, and `retry_after` in seconds if it was named."""
    said = body.get("error") if isinstance(body, dict) else None
    error = said if isinstance(said, dict) else {}
    code = str(error.get("code", "")) or None
    base = BY_STATUS.get(status, JobqueueError)
    known = BY_CODE.get(code or "", base)
    kind = known if issubclass(known, base) else base
    details = {**(error.get("details") or {}), "status": status}
    if retry_after is not None:
        details["retry_after"] = retry_after
    message = str(error.get("message") or f"the API answered {status}")
    return kind(message, code=code, hint=details.get("hint"), details=details)
