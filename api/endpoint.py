"""From an ASGI request to a handler's call: one endpoint per path, which knows its methods."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobqueue.api.context import Call, Principal, Services, principal_of
from jobqueue.api.errors import ApiError, error_response, to_api_error
from jobqueue.api.limits import parse_query
from jobqueue.api.operations import Operation

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TENANT = re.compile(r"[^\x00-\x1f\x7f,]{1,200}")

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


class Headers:
    """ASGI middleware: every answer has the security headers and its request id, which the scope has too.

    A client's own `X-Request-Id` is kept if it is 1 to 128 letters, digits, `.`, `_` or `-`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if REQUEST_ID.fullmatch(given) else b"req_" + secrets.token_hex(12).encode()
        scope["jobqueue.request_id"] = request_id.decode()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message["headers"]
                has_policy = any(name == b"content-security-policy" for name, _ in own)
                message["headers"] = [
                    *own,
                    *(SECURITY_HEADERS[1:] if has_policy else SECURITY_HEADERS),
                    (b"request-id", request_id),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Endpoint:
    """All operations of one path, as an ASGI application."""

    def __init__(self, services: Services, base: str, operations: Mapping[str, Operation]) -> None:
        self.services = services
        self.base = base
        self.operations = dict(operations)
        if "GET" in self.operations:
            self.operations.setdefault("HEAD", self.operations["GET"])
        self.allow = ", ".join(sorted(self.operations))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            operation = self.operations.get(scope["method"])
            if operation is None:
                raise ApiError(
                    "METHOD_NOT_ALLOWED",
                    f"This path does not know {scope['method'][:20]}.",
                    hint=f"It knows {self.allow}.",
                    headers={"Allow": self.allow},
                )
            response = await operation.handler(self._call(operation, scope, receive))
        except ClientDisconnect:
            return
        except Exception as error:
            response = error_answer(scope, error)
        await response(scope, receive, send)

    def _call(self, operation: Operation, scope: Scope, receive: Receive) -> Call:
        path = scope["path_params"]
        principal = Principal() if operation.is_probe else principal_of(scope)
        require_scope(principal, operation.scopes)
        tenant = path.get("tenant")
        if tenant is not None and not (_TENANT.fullmatch(tenant) and tenant != "*" and principal.may_use(tenant)):
            raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})
        return Call(
            services=self.services,
            scope=scope,
            receive=receive,
            headers=dict(scope["headers"]),
            path=path,
            query=_parsed_query(operation, scope["query_string"]),
            principal=principal,
            tenant=tenant,
            base=self.base if tenant is None else self.base.replace("{tenant}", quote(tenant, safe="")),
            request_id=request_id_of(scope),
        )


def error_answer(scope: Scope, error: Exception) -> Response:
    """Return the envelope of an error for the request in `scope`."""
    accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
    return error_response(to_api_error(error), request_id_of(scope), accept)


def request_id_of(scope: Scope) -> str:
    """Return the id under which this request is logged."""
    return str(scope.get("jobqueue.request_id", ""))


def require_scope(principal: Principal, scopes: tuple[str, ...]) -> None:
    """Raise ApiError (403) unless the caller has one of the scopes, or admin, or none is asked for."""
    if scopes and principal.scopes.isdisjoint((*scopes, "admin")):
        raise ApiError("FORBIDDEN", f"This needs the scope {' or '.join(scopes)}.", details={"scopes": list(scopes)})


def _parsed_query(operation: Operation, query: bytes) -> dict[str, Any]:
    if not query:
        return {}
    parsers = {parameter.name: parameter.parse for parameter in operation.query}
    return {name: parsers[name](text) for name, text in parse_query(query, parsers).items()}
