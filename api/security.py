"""What every answer has and every request is noted by: security headers, a request id, one line of the access log.

The log has method, path, status, time and the key's id; never the query (it may hold a ticket), headers or bodies.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobqueue.api.encoding import dump_json
from jobqueue.api.errors import ApiError, envelope
from jobqueue.api.meter import Meter

logger = logging.getLogger("jobqueue.api.access")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
MOST_HEADERS = 100
MOST_HEADER_BYTES = 32 * 1024
LONGEST_PATH = 4096
QUIET = ("/livez", "/readyz", "/metrics")
"""Probes and scrapes come every few seconds: logged as debug unless they fail."""

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
EXPOSED_HEADERS = (
    *("ETag", "Location", "Link", "Retry-After", "Request-Id", "Idempotent-Replayed", "WWW-Authenticate"),
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "RateLimit", "RateLimit-Policy"),
)
"""What scripts of the origins in JOBQUEUE_API_CORS_ORIGINS may read of an answer."""


class Headers:
    """ASGI middleware: every answer has the security headers and its request id, which the scope has too.

    A client's own `X-Request-Id` is kept if it is 1 to 128 letters, digits, `.`, `_` or `-`. A request with more than
    100 headers, 32 kB of them, or a path over 4 kB is answered 431 or 414 here.
    """

    def __init__(self, app: ASGIApp, access_log: bool = True, meter: Meter | None = None) -> None:
        self.app = app
        self.access_log = access_log
        self.meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if REQUEST_ID.fullmatch(given) else b"req_" + secrets.token_hex(12).encode()
        scope["jobqueue.request_id"] = request_id.decode()
        began, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = message["headers"]
                has_policy = any(name == b"content-security-policy" for name, _ in own)
                message["headers"] = [
                    *own,
                    *(_missing(own) if has_policy else SECURITY_HEADERS),
                    (b"request-id", request_id),
                ]
            await send(message)

        try:
            await (_excess(scope) or self.app)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - began
            if self.meter is not None:
                self.meter.count(scope, status, seconds)
            if self.access_log:
                _log(scope, status, seconds)


def _missing(own: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The security headers that a page with a policy of its own does not set itself."""
    names = {name for name, _ in own}
    return [header for header in SECURITY_HEADERS if header[0] not in names]


def request_id_of(scope: Scope) -> str:
    """Return the id under which this request is logged."""
    return str(scope.get("jobqueue.request_id", ""))


def _excess(scope: Scope) -> Response | None:
    """The refusal of a request whose head is too large."""
    found = scope["headers"]
    if len(found) > MOST_HEADERS or sum(len(name) + len(value) for name, value in found) > MOST_HEADER_BYTES:
        message = f"At most {MOST_HEADERS} headers with {MOST_HEADER_BYTES} bytes are read."
        error = ApiError("TOO_LARGE", message, status=431)
    elif len(scope.get("raw_path") or b"") > LONGEST_PATH:
        error = ApiError("TOO_LARGE", f"A path has at most {LONGEST_PATH} bytes.", status=414)
    else:
        return None
    body = dump_json(envelope(error, request_id_of(scope)))
    return Response(body, error.status, headers={"Connection": "close"}, media_type="application/json")


def _log(scope: Scope, status: int, seconds: float) -> None:
    path = (
        (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0][:500].decode("ascii", "backslashreplace")
    )
    level = logging.DEBUG if path.endswith(QUIET) and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    key = scope.get("jobqueue.key")
    logger.log(
        level,
        "%s %s %s in %.1f ms%s",
        scope["method"][:20],
        path,
        status or "aborted",
        seconds * 1000,
        f" by {key}" if key else "",
        extra={
            "event": "http.request",
            "request_id": request_id_of(scope),
            "duration_ms": round(seconds * 1000, 1),
            "outcome": str(status) if status else "aborted",
        },
    )
