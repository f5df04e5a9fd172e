"""One statement per request: the functions of sql/functions/http*.sql take role and tenants first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobqueue.api.context import Call


async def read(call: Call, query: str, *parameters: Any, tenants: str | None = None) -> list[tuple[Any, ...]]:
    """Run a reading statement as the caller. `tenants`: instead of those that the request sees."""
    return await call.services.database.rows(query, _with_context(call, parameters, tenants), read_only=True)


async def write(call: Call, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a writing statement as the caller."""
    return await call.services.database.rows(query, _with_context(call, parameters, None))


def actor_of(call: Call) -> str | None:
    """Return how the audit names the caller: their subject, else their key; None if the API has no keys."""
    return call.principal.subject or call.principal.key


def sees_traces(call: Call) -> bool:
    """Return whether the caller may see stack traces, logins and addresses: with jobs:act or admin."""
    return not call.principal.scopes.isdisjoint({"jobs:act", "admin"})


def _with_context(call: Call, parameters: Sequence[Any], tenants: str | None) -> tuple[Any, ...]:
    return (call.services.database.role, call.tenants if tenants is None else tenants, *parameters)
