"""From an ASGI request to a view's handler: who asks, may they, and errors as pages."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote

import psycopg
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jobqueue.api.authenticators import DefaultAuthenticator
from jobqueue.api.context import Call, Services
from jobqueue.api.errors import ApiError, to_api_error
from jobqueue.api.identity import Principal, require_scope
from jobqueue.api.quotas import Charge
from jobqueue.api.security import request_id_of
from jobqueue.api.ui import sessions
from jobqueue.api.ui.forms import require_own_page
from jobqueue.api.ui.views import Handler, View
from jobqueue.api.ui.visit import READ_SECONDS, Banner, Visit

NOBODY = Principal()
_TENANT = re.compile(r"[^\x00-\x1f\x7f,]{1,200}")


class ViewEndpoint:
    """One view, as an ASGI application."""

    def __init__(self, services: Services, view: View) -> None:
        self.services = services
        self.view = view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = self._visit(scope, receive, NOBODY)
        try:
            response = await self._answer(visit, scope, receive)
        except ClientDisconnect:
            return
        except Exception as error:
            response = error_page(visit, error)
        await response(scope, receive, send)

    async def _answer(self, visit: Visit, scope: Scope, receive: Receive) -> Response:
        handler = self.view.act if scope["method"] == "POST" else self.view.show
        if handler is None or scope["method"] not in {"GET", "HEAD", "POST"}:
            allow = "GET, HEAD" + (", POST" if self.view.act else "")
            raise ApiError("METHOD_NOT_ALLOWED", "This page is not sent anything.", headers={"Allow": allow})
        acts = scope["method"] == "POST"
        if acts:
            require_own_page(scope)
        if self.view.is_open:
            return await handler(visit)
        principal = await identify(self.services, HTTPConnection(scope))
        if principal is None:
            return self._to_login(visit, acts=acts)
        scope["jobqueue.key"] = principal.key
        visit = self._visit(scope, receive, principal)
        try:
            return await self._as(visit, handler, acts=acts)
        except ClientDisconnect:
            raise
        except Exception as error:
            return error_page(visit, error)

    async def _as(self, visit: Visit, handler: Handler, *, acts: bool) -> Response:
        principal = visit.call.principal
        require_scope(principal, self.view.act_scopes if acts else self.view.scopes)
        tenant = visit.call.tenant
        if tenant is not None and not (_TENANT.fullmatch(tenant) and tenant != "*" and principal.may_use(tenant)):
            raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})
        # Pages cost no quota: one that keeps itself current would use up an hour's in minutes. Actions do.
        charge: Charge | None = await self.services.quotas.reserve(principal, "writes") if acts else None
        response: Response | None = None
        try:
            response = await handler(visit)
        finally:
            if charge is not None:
                spent = response is not None and response.status_code == 303
                charge.settle(Response() if spent else None)
        assert response is not None
        return response

    def _visit(self, scope: Scope, receive: Receive, principal: Principal) -> Visit:
        path = scope["path_params"]
        call = Call(
            services=self.services,
            scope=scope,
            receive=receive,
            headers=dict(scope["headers"]),
            path=path,
            query={},
            principal=principal,
            tenant=path.get("tenant"),
            base=scope.get("root_path", "") + self.services.settings.api_prefix,
            request_id=request_id_of(scope),
        )
        by_session = principal.key is not None and sessions.token_of(HTTPConnection(scope)) is not None
        return Visit(call, _query(scope), self.view.section, by_session, takes_keys(self.services))

    def _to_login(self, visit: Visit, *, acts: bool) -> Response:
        is_stream = "text/event-stream" in (visit.call.header(b"accept") or "")
        if not visit.takes_keys or is_stream:
            raise ApiError(
                "UNAUTHORIZED",
                "You are not logged in, or not any more.",
                hint="Load the page again, or log in to the application that this dashboard belongs to.",
            )
        following = "/" if acts else self._asked_for(visit.call.scope)
        return visit.goto("/login", next=None if following == "/" else following)

    def _asked_for(self, scope: Scope) -> str:
        """The path below `/ui`, with its query."""
        mounted_at = scope.get("root_path", "")
        path = scope["path"].removeprefix(mounted_at).removeprefix(self.services.settings.api_prefix + "/ui")
        query = scope["query_string"].decode("ascii", "ignore")
        return quote(path, safe="/~!$&'()*+,;=:@-._") + (f"?{query}" if query else "")


async def identify(services: Services, connection: HTTPConnection) -> Principal | None:
    """Return who asks: by the session's cookie, else as the API's authenticator says. None: nobody.

    Raises ApiError as the authenticator does.
    """
    if takes_keys(services) and (principal := await sessions.find(services.database, connection)) is not None:
        return principal
    return await services.authenticate(connection)


def takes_keys(services: Services) -> bool:
    """Return whether browsers may log in by an API key; an application's own authenticator knows its users itself."""
    return isinstance(services.authenticate, DefaultAuthenticator)


def error_page(visit: Visit, error: Exception) -> Response:
    """Return a page that says what went wrong and what to do."""
    found = to_api_error(error, visit.call.request_id)
    if isinstance(error, psycopg.errors.QueryCanceled):
        text = f"This took longer than {READ_SECONDS:g} s and was given up. Narrow it: fewer jobs, a queue, a status."
        visit.banners.append(Banner("warning", text))
    response = visit.render("error.html", found.status, error=found, request_id=visit.call.request_id)
    for name, value in found.headers.items():
        response.headers[name] = value
    return response


def _query(scope: Scope) -> dict[str, str]:
    """The parameters that can be stored; a page takes no offence at others."""
    try:
        pairs = parse_qsl(scope["query_string"].decode("ascii"), errors="strict", max_num_fields=200)
    except ValueError:
        return {}
    return {name: value for name, value in pairs if "\0" not in value}
