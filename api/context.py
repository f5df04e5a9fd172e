"""Who asks, what they ask, and the transaction in which it is answered."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import AsyncConnection
from starlette.types import Receive, Scope

from jobqueue.api.database import Database
from jobqueue.api.errors import ApiError
from jobqueue.api.hub import Hub
from jobqueue.api.limits import MAX_BODY_BYTES, parse_json, read_body
from jobqueue.settings import Settings

if TYPE_CHECKING:
    from jobqueue.api.probes import Readiness

ALL_TENANTS = "*"
ALL_SCOPES = frozenset({"jobs:read", "jobs:write", "jobs:act", "metrics", "admin"})

_CONTEXT = "select jobqueue.http_context(%s, %s, %s)"


@dataclass(frozen=True, slots=True)
class Services:
    """What all requests of a process share."""

    settings: Settings
    database: Database
    hub: Hub
    readiness: Readiness
    max_body_bytes: int = MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: `key` names the API key (None: no keys exist), `tenants` is 'a,b' or '*'."""

    key: str | None = None
    subject: str | None = None
    tenants: str = ALL_TENANTS
    scopes: frozenset[str] = ALL_SCOPES

    def may_use(self, tenant: str) -> bool:
        """Return whether a tenant is theirs."""
        return self.tenants == ALL_TENANTS or tenant in self.tenants.split(",")


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
        value = parse_json(body)
        return body.decode("utf-8"), value

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection[Any]]:
        """A transaction under this request's role and tenants; GET and HEAD cannot write in it."""
        database = self.services.database
        read_only = self.scope["method"] in {"GET", "HEAD"}
        async with database.connection() as connection, connection.transaction():
            await connection.execute(_CONTEXT, (database.role, self.tenants, read_only))
            yield connection


def principal_of(scope: Scope) -> Principal:
    """Return who asks. Without API keys that is everybody on this machine, with all rights, and nobody else.

    Raises ApiError: 403 for a request from another machine. (A Unix socket has no client address: the file's rights
    decide.)
    """
    client = scope.get("client")
    if client and not _is_loopback(client[0]):
        raise ApiError(
            "FORBIDDEN",
            "Without an API key only requests from this machine are answered.",
            hint="Create a key, or connect through the loopback address or a Unix socket.",
        )
    return Principal()


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # No network at all: an in-process client.
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
