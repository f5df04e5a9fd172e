"""One visit of a page: who comes, what they may read, and the answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import psycopg
from psycopg import AsyncConnection
from starlette.responses import Response

from jobqueue.api import statements
from jobqueue.api.context import Call
from jobqueue.api.ui import rendering
from jobqueue.api.ui.assets import path_of
from jobqueue.api.ui.forms import Form, read_form

READ_SECONDS = 3.0
"""No statement of a page may take longer: who looks at ten million jobs gets what is quick, and is told what is not."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    # Not no-referrer: browsers would then send "Origin: null" with our own forms.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "HX-Request, Cookie",
}

_CONTEXT = "select set_config('statement_timeout', %s, true), jobqueue.http_context(%s, %s, true)"


@dataclass(frozen=True, slots=True)
class Banner:
    """A message above the page. `kind`: note, warning or error."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Visit:
    """One request for a page. `query`: its parameters, the last of each name. `can_log_out`: it came by a session."""

    call: Call
    query: Mapping[str, str]
    section: str = ""
    can_log_out: bool = False
    takes_keys: bool = False
    banners: list[Banner] = field(default_factory=list)

    # -- Who ----------------------------------------------------------------------------------------------------------

    @property
    def actor(self) -> str | None:
        """How the audit names the caller; None if the API has no keys."""
        return statements.actor_of(self.call)

    @property
    def sees_traces(self) -> bool:
        """Whether the caller may see stack traces, logins and addresses."""
        return statements.sees_traces(self.call)

    @property
    def may_act(self) -> bool:
        """Whether the caller may act on jobs."""
        return self.may("jobs:act")

    def may(self, *scopes: str) -> bool:
        """Return whether the caller has any of these scopes."""
        return self.call.principal.has_scope(*scopes)

    def refusal(self, *scopes: str) -> str | None:
        """Return why a button that needs one of these scopes is disabled; None if it is not."""
        return None if self.may(*scopes) else f"your key lacks the scope {' or '.join(scopes)}"

    @property
    def context(self) -> tuple[str | None, str]:
        """Role and tenants: what functions of sql/functions/http*.sql take first."""
        return self.call.services.database.role, self.call.tenants

    # -- Where --------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> str:
        """The path of the API, without `/ui`: what examples for curl begin with."""
        return self.call.base

    def url(self, path: str, /, **query: Any) -> str:
        """Return the address of a page below `/ui`; parameters that are None or empty are left out."""
        given = {name: value for name, value in query.items() if value is not None and value not in ("", [], ())}
        return self.call.base + "/ui" + path + (f"?{urlencode(given, doseq=True)}" if given else "")

    def asset(self, name: str) -> str:
        """Return the address of a static file."""
        return self.url(path_of(name))

    def query_list(self, name: str) -> list[str]:
        """Return all values of a parameter."""
        pairs = parse_qsl(self.call.scope["query_string"].decode("ascii", "ignore"))
        return [value for given, value in pairs if given == name and "\0" not in value]

    def of_query(self, query: Mapping[str, str]) -> Visit:
        """Return this visit as if it had come with other parameters: those of a form."""
        return replace(self, query=query)

    # -- Reading ------------------------------------------------------------------------------------------------------

    async def ask(self, query: str, *parameters: Any, seconds: float | None = None) -> list[tuple[Any, ...]]:
        """Run a function of sql/functions/http*.sql, whose first two parameters (role, tenants) are put before these."""
        return await self.rows(query, *self.context, *parameters, seconds=seconds)

    async def rows(self, query: str, *parameters: Any, seconds: float | None = None) -> list[tuple[Any, ...]]:
        """Run any reading statement as the caller, under the row policies. Raises QueryCanceled after so many seconds."""
        return await self.call.services.database.reading(lambda: self._read(query, parameters, seconds))

    async def json(self, query: str, *parameters: Any) -> Any:
        """Return the JSON value that a function of `ask` answers with, or None."""
        ((text, *_),) = await self.ask(query, *parameters)
        return None if text is None else json.loads(text)

    async def ask_if_quick(self, query: str, *parameters: Any, missing: str) -> list[tuple[Any, ...]] | None:
        """As `ask`; None, and a banner that `missing` is not shown, if it takes too long."""
        try:
            return await self.ask(query, *parameters)
        except psycopg.errors.QueryCanceled:
            text = f"{missing} is not shown: reading it took longer than {READ_SECONDS:g} s."
            self.banners.append(Banner("warning", text))
            return None

    @asynccontextmanager
    async def reading(self, seconds: float | None = None) -> AsyncIterator[AsyncConnection[Any]]:
        """A read-only transaction as the caller, with a time-out for each statement (`READ_SECONDS`)."""
        database = self.call.services.database
        limit = f"{round((seconds or READ_SECONDS) * 1000)}ms"
        async with database.connection() as connection, connection.transaction():
            await connection.execute(_CONTEXT, (limit, database.role, self.call.tenants))
            yield connection

    async def _read(self, query: str, parameters: tuple[Any, ...], seconds: float | None) -> list[tuple[Any, ...]]:
        async with self.reading(seconds) as connection:
            cursor = await connection.execute(query.encode(), parameters)
            return await cursor.fetchall()

    # -- Acting -------------------------------------------------------------------------------------------------------

    async def do(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a writing function of sql/functions/http*.sql as the caller; as `ask`."""
        return await statements.write(self.call, query, *parameters)

    async def form(self) -> Form:
        """Return the form that was sent. Raises ApiError."""
        return await read_form(self.call.scope, self.call.receive)

    # -- Answering ----------------------------------------------------------------------------------------------------

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a page; for app.js, which reads it again, only its `main` part."""
        only_main = self.call.header(b"hx-request") == "true"
        content = rendering.render(template, {"v": self, **values}, only_main=only_main)
        return Response(content, status, headers=dict(HEADERS), media_type="text/html; charset=utf-8")

    def goto(self, path: str, *, done: str | None = None, **query: Any) -> Response:
        """Return the way on after an action. `done`: its name in `rendering.DONE`, which the next page says."""
        own, _, given = path.partition("?")
        before = {name: value for name, value in parse_qsl(given) if name not in {"done", "counts"}}
        location = self.url(own, **{**before, "done": done, **query})
        return Response(status_code=303, headers={**HEADERS, "Location": location})
