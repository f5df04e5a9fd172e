"""Tickets: what a browser's EventSource, which cannot send headers, gives instead of a key: `GET /events?ticket=…`.

A ticket stands for who asked for it, opens one path, once, within a minute. The database keeps its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from datetime import datetime
from urllib.parse import parse_qsl, urlencode

from starlette.types import Scope

from jobqueue.api.database import Database
from jobqueue.api.identity import Principal, unauthorized

PARAMETER = "ticket"

_FORM = re.compile(r"[A-Za-z0-9_-]{43}")
_KEEP = "select jobqueue.keep_ticket(%s, %s::jsonb, %s)"
_IS_LIVE = "select jobqueue.api_key_is_live(%s)"
_USE = "select jobqueue.use_ticket(%s, %s)"


class Tickets:
    """The tickets of one database; any process may redeem what another has made."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def make(self, principal: Principal, path: str) -> tuple[str, datetime]:
        """Return a ticket for the stream at `path` (with prefix and tenant, without query), and when it ends."""
        ticket = secrets.token_urlsafe(32)
        parameters = (_hash(ticket), json.dumps(principal.to_json()), path)
        ((ends,),) = await self._database.rows(_KEEP, parameters)
        return ticket, ends

    async def redeem(self, ticket: str, path: str) -> Principal:
        """Return whom a ticket stands for and use it up.

        Raises ApiError: 401 if it is none, for another path, or of a key or token that is not let in any more.
        """
        principal = None
        if _FORM.fullmatch(ticket):
            ((found,),) = await self._database.rows(_USE, (_hash(ticket), path))
            principal = None if found is None else Principal.from_json(found)
        if principal is None or not await self.is_still_good(principal):
            raise unauthorized(
                "The ticket is unknown, used, too old, or for another stream.",
                hint="Ask for a new one: POST /stream-tickets.",
                error="invalid_token",
            )
        return principal

    async def is_still_good(self, principal: Principal) -> bool:
        """Return whether the key or token that a used ticket stood for is still let in; others always are."""
        if principal.until is not None and principal.until < time.time():
            return False
        if principal.key is None:
            return True
        ((live,),) = await self._database.rows(_IS_LIVE, (principal.key,), read_only=True)
        return bool(live)


def take_ticket(scope: Scope) -> tuple[str | None, bytes]:
    """Return the ticket in a request's query, or None, and the query without it."""
    query: bytes = scope["query_string"]
    if PARAMETER.encode() + b"=" not in query:
        return None, query
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    ticket = next((value for name, value in pairs if name == PARAMETER), None)
    rest = urlencode([pair for pair in pairs if pair[0] != PARAMETER])
    return ticket, rest.encode()


def _hash(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode()).digest()
