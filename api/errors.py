"""Errors as HTTP answers: one table from code to status, one envelope.

The envelope is `{"error": {"code", "message", "details"}}` with the fields of RFC 9457 beside it. What the database
says is repeated only if it is one of jobqueue's own errors; everything else becomes INTERNAL or UNAVAILABLE, with a
request id by which the log can be searched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jobqueue.api.encoding import dump_json
from jobqueue.errors import ConfigurationError, DatabaseUnavailable, JobqueueError, SchemaOutdated, from_postgres

logger = logging.getLogger(__name__)

STATUS_OF_CODE: Mapping[str, int] = {
    "INVALID_ARGUMENT": 422,
    "UNKNOWN_OPTION": 422,
    "CURSOR_MISMATCH": 400,
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "NOT_FOUND": 404,
    "JOB_NOT_FOUND": 404,
    "QUEUE_NOT_FOUND": 404,
    "SCHEDULE_NOT_FOUND": 404,
    "WORKER_NOT_FOUND": 404,
    "BULK_NOT_FOUND": 404,
    "FLOW_NOT_FOUND": 404,
    "BATCH_NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "INVALID_TRANSITION": 409,
    "LEASE_LOST": 409,
    "CONFLICT": 409,
    "TOO_LARGE": 413,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "IDEMPOTENCY_KEY_REUSED": 422,
    "LIMIT_REACHED": 429,
    "QUOTA_EXCEEDED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "TIMED_OUT": 504,
}

HINT_OF_CODE: Mapping[str, str] = {
    "INVALID_ARGUMENT": "GET /openapi.json says what each route takes.",
    "UNKNOWN_OPTION": "GET /openapi.json says what each route takes.",
    "CURSOR_MISMATCH": "Begin anew without a cursor.",
    "UNAUTHORIZED": "Send Authorization: Bearer and a key that has neither expired nor been revoked.",
    "FORBIDDEN": "Use a key that has the scope and sees the tenants that this needs.",
    "NOT_FOUND": "GET /openapi.json lists the routes.",
    "JOB_NOT_FOUND": "It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.",
    "QUEUE_NOT_FOUND": "GET /queues lists the queues. To make one: jobqueue queues create NAME, or let this API make those that"
    " jobs are sent to (JOBQUEUE_API_CREATE_QUEUES=1).",
    "SCHEDULE_NOT_FOUND": "GET /schedules lists those of your tenants.",
    "WORKER_NOT_FOUND": "GET /workers lists them; one that has stopped cannot be drained.",
    "BULK_NOT_FOUND": "It may belong to a tenant that you do not see; operations go a week after their end.",
    "FLOW_NOT_FOUND": "Give the id of a flow, or of a job in one, of a tenant that you see.",
    "BATCH_NOT_FOUND": "It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.",
    "METHOD_NOT_ALLOWED": "The header Allow names the methods of this route.",
    "INVALID_TRANSITION": "details.allowed names what can be done with the job now.",
    "LEASE_LOST": "Another claim has the job, or it has ended: keep what was done for it out.",
    "CONFLICT": "Look at what stands in the way, and try again.",
    "TOO_LARGE": "Keep large data elsewhere, and send where they lie.",
    "UNSUPPORTED_MEDIA_TYPE": "Send JSON, not compressed, with Content-Type: application/json.",
    "IDEMPOTENCY_KEY_REUSED": "Send another request with a key of its own.",
    "LIMIT_REACHED": "Try again after the seconds in Retry-After.",
    "QUOTA_EXCEEDED": "Try again when the quota is whole: X-RateLimit-Reset, in epoch seconds.",
    "INTERNAL": "The log of the server has more under this request_id.",
    "UNAVAILABLE": "Try again after the seconds in Retry-After. With an Idempotency-Key a job is not sent twice.",
    "TIMED_OUT": "Try again after the seconds in Retry-After, or ask for less.",
}
"""What to do, unless an answer says it better. Hints of the database that speak of its functions are not repeated."""

# Of codes that only a newer schema knows.
STATUS_OF_SQLSTATE: Mapping[str, int] = {
    "JQ400": 422,
    "JQ403": 403,
    "JQ404": 404,
    "JQ409": 409,
    "JQ413": 413,
    "JQ429": 429,
}

CODE_OF_STATUS: Mapping[int, str] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "TOO_LARGE",
}

RETRY_SECONDS = {429: 1, 503: 2, 504: 2}


class ApiError(Exception):
    """An answer that is an error.

    `code`: one of `STATUS_OF_CODE`, which also gives the status unless `status` does. `hint`: what to do, put into
    `details.hint`; without one JSON answers have that of `HINT_OF_CODE`. `headers`: beside those of every answer; 429, 503
    and 504 get Retry-After by themselves.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = STATUS_OF_CODE.get(code, 500) if status is None else status
        self.details = {**(details or {}), **({"hint": hint} if hint else {})}
        self.headers = dict(headers or {})


def to_api_error(error: Exception, request_id: str = "") -> ApiError:
    """Return the answer that an exception means; an unknown one becomes INTERNAL and is logged with its traceback.

    `request_id`: under which the log has it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        code = CODE_OF_STATUS.get(error.status_code, "INVALID_ARGUMENT" if error.status_code < 500 else "INTERNAL")
        return ApiError(code, error.detail, status=error.status_code, headers=dict(error.headers or {}))
    if isinstance(error, psycopg.Error):
        return _of_the_database(error, request_id)
    if isinstance(error, TimeoutError):
        return ApiError("TIMED_OUT", "The database took too long.")
    if isinstance(error, DatabaseUnavailable | SchemaOutdated | ConfigurationError):
        # Their text names servers and settings: for the operator's log, not for clients.
        logger.warning("unavailable: %s", error, extra={"request_id": request_id})
        return ApiError("UNAVAILABLE", "The service cannot reach a database that it can use; try again later.")
    if isinstance(error, JobqueueError):
        return ApiError(error.code, error.message, hint=error.hint, details=error.details)
    logger.error("unexpected error", exc_info=error, extra={"request_id": request_id})
    return _internal()


def error_response(error: ApiError, request_id: str, accept: str) -> Response:
    """Return the envelope; as application/problem+json for clients that ask for it."""
    headers = dict(error.headers)
    if error.status in RETRY_SECONDS:
        headers.setdefault("Retry-After", str(RETRY_SECONDS[error.status]))
    headers.setdefault("Cache-Control", "no-store")
    problem = "application/problem+json"
    return Response(
        dump_json(envelope(error, request_id)),
        status_code=error.status,
        headers=headers,
        media_type=problem if problem in accept else "application/json",
    )


def envelope(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the body of an error."""
    details = error.details
    if "hint" not in details and (hint := HINT_OF_CODE.get(error.code)) is not None:
        nearest = details.get("nearest")
        details = {**details, "hint": f'Did you mean "{nearest}"? {hint}' if nearest else hint}
    return {
        "error": {"code": error.code, "message": str(error), "details": details},
        "type": "urn:jobqueue:error:" + error.code.lower().replace("_", "-"),
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.status,
        "detail": str(error),
        "request_id": request_id,
    }


def _of_the_database(error: psycopg.Error, request_id: str) -> ApiError:
    if own := from_postgres(error):
        status = STATUS_OF_CODE.get(own.code) or STATUS_OF_SQLSTATE.get(error.sqlstate or "", 500)
        details = {name: value for name, value in own.details.items() if name != "code"}
        # What to do is said to people at psql there; here it is of no use.
        hint = None if own.hint and "jobqueue." in own.hint else own.hint
        return ApiError(own.code, own.message, status=status, hint=hint, details=details)
    state = error.sqlstate or ""
    if state == "55P03":
        return ApiError("CONFLICT", "Another request holds this; try again.", headers={"Retry-After": "1"})
    if state == "57014":
        return ApiError("TIMED_OUT", "The database took too long.")
    if is_unavailable(error):
        logger.warning("the database is away: %s", " ".join(str(error).split()))
        return ApiError("UNAVAILABLE", "The database cannot be reached now; try again later.")
    if state[:2] in {"22", "54"}:
        # A value that passed the checks here but not the database's, such as a time in the year 300,000.
        logger.info("a value was refused: %s %s", state, error.diag.message_primary)
        return ApiError("INVALID_ARGUMENT", "A value cannot be stored.", details={"sqlstate": state})
    logger.error("the database refused a statement (%s)", state, exc_info=error, extra={"request_id": request_id})
    return _internal()


def is_unavailable(error: psycopg.Error) -> bool:
    """Return whether an error is the connection's or the server's state, so that the same request may work later."""
    if isinstance(error, PoolTimeout | PoolClosed):
        return True
    state = error.sqlstate or ""
    lost = not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    # Connection, resources, shutdown and recovery; a server that became a standby; serialisation and deadlock.
    return lost or state[:2] in {"08", "53", "57"} or state in {"25006", "40001", "40P01"}


def _internal() -> ApiError:
    return ApiError("INTERNAL", "Something went wrong on the server.", hint=HINT_OF_CODE["INTERNAL"])


def title_of_status(status: int) -> str:
    """Return the reason phrase of a status."""
    return HTTPStatus(status).phrase
