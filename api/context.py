"""Who asks, what they ask, and the transaction in which it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import AsyncConnection
from starlette.types import Receive, Scope

from jobqueue.api.database import Database
from jobqueue.api.hub import Hub
from jobqueue.api.identity import ALL_TENANTS, Authenticator, Principal
from jobqueue.api.limits import MAX_BODY_BYTES, parse_json, read_body
from jobqueue.api.quotas import Quotas
from jobqueue.api.reads import Reads
from jobqueue.api.tickets import Tickets
from jobqueue.settings import Settings

if TYPE_CHECKING:
    from jobqueue.api.probes import Readiness

__all__ = ["ALL_TENANTS", "Call", "Principal", "Services"]

LARGE_BODY = 256 * 1024
"""Bodies from this size on are parsed in a thread."""

_CONTEXT = "select jobqueue.http_context(%s, %s, %s)"


@dataclass(frozen=True, slots=True)
class Services:
    """What all requests of a process share."""

    settings: Settings
    database: Database
    hub: Hub
    readiness: Readiness
    authenticate: Authenticator
    quotas: Quotas
    tickets: Tickets
    reads: Reads
    max_body_bytes: int = MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Call:
    """One request, checked: `query` has only known parameters, already parsed; `tenant` is the path's, or None."""

    services: Services
    scope: Scope
    receive: Receive
    headers: Mapping[bytes, bytes]
    path: Mapping[str, str]
    query: Mapping[str, Any]
    principal: Principal
    tenant: str | None
    base: str
    request_id: str

    @property
    def tenants(self) -> str:
        """The tenants that this request sees: the path's one, or all of the caller's."""
        return self.tenant if self.tenant is not None else self.principal.tenants

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def json(self) -> tuple[str, Any]:
        """Return the body as it came in, and its value. Raises ApiError: 400, 413, 415 or 422 (see limits.py)."""
        body = await read_body(self.scope, self.receive, self.headers, self.services.max_body_bytes)
        # Millions of numbers take seconds to check, in which no other request of this process would be answered.
        value = parse_json(body) if len(body) < LARGE_BODY else await asyncio.to_thread(parse_json, body)
        return body.decode("utf-8"), value

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection[Any]]:
        """A transaction under this request's role and tenants; GET and HEAD cannot write in it."""
        database = self.services.database
        read_only = self.scope["method"] in {"GET", "HEAD"}
        async with database.connection() as connection, connection.transaction():
            await connection.execute(_CONTEXT, (database.role, self.tenants, read_only))
            yield connection
