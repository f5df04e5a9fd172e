"""From an ASGI request to a handler's call: one endpoint per path, which knows its methods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jobqueue.api.context import Call, Services
from jobqueue.api.errors import ApiError, error_response, to_api_error
from jobqueue.api.identity import Principal, require_scope, unauthorized
from jobqueue.api.limits import parse_query
from jobqueue.api.operations import Operation
from jobqueue.api.quotas import Charge
from jobqueue.api.security import request_id_of
from jobqueue.api.tickets import take_ticket

_TENANT = re.compile(r"[^\x00-\x1f\x7f,]{1,200}")


class Endpoint:
    """All operations of one path, as an ASGI application."""

    def __init__(self, services: Services, base: str, operations: Mapping[str, Operation]) -> None:
        self.services = services
        self.base = base
        self.operations = dict(operations)
        self.route = base + next(iter(self.operations.values())).path
        self.is_stream = any(operation.is_stream for operation in self.operations.values())
        if "GET" in self.operations:
            self.operations.setdefault("HEAD", self.operations["GET"])
        self.allow = ", ".join(sorted(self.operations))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        charge: Charge | None = None
        try:
            operation = self.operations.get(scope["method"])
            if operation is None:
                raise ApiError(
                    "METHOD_NOT_ALLOWED",
                    f"This path does not know {scope['method'][:20]}.",
                    hint=f"It knows {self.allow}.",
                    headers={"Allow": self.allow},
                )
            call = await self._call(operation, scope, receive)
            if not operation.is_free:
                charge = await self.services.quotas.reserve(call.principal, operation.bucket)
            response = await operation.handler(call)
        except ClientDisconnect:
            _settle(charge, None)
            return
        except Exception as error:
            response = error_answer(scope, error)
        except BaseException:
            _settle(charge, None)
            raise
        _settle(charge, response)
        await response(scope, receive, send)

    async def _call(self, operation: Operation, scope: Scope, receive: Receive) -> Call:
        path = scope["path_params"]
        ticket, query = take_ticket(scope) if operation.is_stream else (None, scope["query_string"])
        is_open = operation.is_probe or self._is_public(operation)
        principal = Principal() if is_open else await self._principal(scope, ticket)
        if not is_open:
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
            query=_parsed_query(operation, query),
            principal=principal,
            tenant=tenant,
            base=scope.get("root_path", "")
            + (self.base if tenant is None else self.base.replace("{tenant}", quote(tenant, safe=""))),
            request_id=request_id_of(scope),
        )

    def _is_public(self, operation: Operation) -> bool:
        setting = operation.public_setting
        return setting is not None and bool(getattr(self.services.settings, setting))

    async def _principal(self, scope: Scope, ticket: str | None) -> Principal:
        """Who asks. Raises ApiError: 401 if nobody says so, or not truly."""
        if ticket is not None:
            principal = await self.services.tickets.redeem(ticket, scope["path"])
            scope["jobqueue.by_ticket"] = True
        else:
            found = await self.services.authenticate(HTTPConnection(scope))
            if found is None:
                raise unauthorized("An API key is needed.", hint="Send Authorization: Bearer jq_….")
            principal = found
        scope["jobqueue.key"] = principal.key
        return principal


def _settle(charge: Charge | None, response: Response | None) -> None:
    if charge is not None:
        charge.settle(response)


def error_answer(scope: Scope, error: Exception) -> Response:
    """Return the envelope of an error for the request in `scope`."""
    accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
    return error_response(to_api_error(error, request_id_of(scope)), request_id_of(scope), accept)


def _parsed_query(operation: Operation, query: bytes) -> dict[str, Any]:
    if not query:
        return {}
    parsers = {parameter.name: parameter.parse for parameter in operation.query}
    return {name: parsers[name](text) for name, text in parse_query(query, parsers).items()}
