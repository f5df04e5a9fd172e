"""Who sent a request, by what it carries.

```
Authorization: Bearer jq_…   ─►  ApiKeys   (sql/functions/api_keys.sql)
Authorization: Bearer <JWT>  ─►  Tokens    (tokens.py), if the settings name a key to check them with
nothing                      ─►  this machine, while there are no keys and no tokens; else 401
```

A process keeps what it knows of keys in memory and asks the database once a second whether any key has changed. So a
revoked key is let in by no process after a second. A new one is let in at once, also if it was asked with before: before
a key is refused as unknown once more, that question is asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from jobqueue.api.database import Database
from jobqueue.api.errors import ApiError
from jobqueue.api.identity import BUCKETS, LOCAL, Authenticator, Principal, unauthorized
from jobqueue.api.tokens import Tokens
from jobqueue.keys import PREFIX, Key, parse_key

TRUSTED_SECONDS = 1.0
"""How long a process believes that no key has changed: the bound on how late a revocation takes effect."""
REMEMBERED_SECONDS = 60.0
"""After this long a key is looked up again, so that its last use is noted."""
MOST_REMEMBERED = 10_000
"""Keys that are known, and as many that are known to be none (until any key changes)."""

PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Only a proxy sends these, and whoever asks it may be anywhere."""

_STATE = "select version, any_keys from jobqueue.api_keys_state()"
_FIND = """\
select subject, tenants, scopes, act_as, quota_reads, quota_writes, quota_streams, problem, valid_for
from jobqueue.find_api_key(%s, %s)"""


@dataclass(frozen=True, slots=True)
class _Known:
    """A key that was looked up; `problem` says why it is not let in, `until` is a time of the event loop."""

    principal: Principal
    problem: str | None
    until: float


class ApiKeys:
    """The keys of one database, as one process knows them."""

    def __init__(self, database: Database, trusted_seconds: float = TRUSTED_SECONDS) -> None:
        self._database = database
        self._trusted_seconds = trusted_seconds
        self._known: dict[bytes, _Known] = {}
        self._unknown: set[bytes] = set()
        self._version = -1
        self._any = True
        self._trusted_until = 0.0
        self._looked_at = 0.0
        self._looking = asyncio.Lock()
        self._finding = asyncio.Lock()

    async def exist(self) -> bool:
        """Return whether there is any key; a revoked one counts."""
        await self._refresh()
        return self._any

    async def find(self, text: str) -> Principal:
        """Return whose key this is. Raises ApiError: 401 if it is none, or is not let in any more."""
        asked_at = asyncio.get_running_loop().time()
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in self._known:
            # Before anything is asked of the database; a known key was checked when it was looked up.
            _parsed(text)
        await self._refresh()
        known = self._known.get(digest)
        if known is None or asyncio.get_running_loop().time() >= known.until:
            known = await self._look_up(_parsed(text), asked_at)
        if known.problem is not None:
            key = _parsed(text)
            raise unauthorized(
                f"The API key {key.id} was {known.problem}."
                if known.problem == "revoked"
                else f"The API key {key.id} has {known.problem}.",
                hint="Ask the operator for a new one (jobqueue keys create).",
                error="invalid_token",
            )
        return known.principal

    async def _refresh(self, since: float = 0.0) -> None:
        """Learn whether any key has changed, unless that is known, and was asked after `since`."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._trusted_until and self._looked_at >= since:
            return
        async with self._looking:
            asked_at = loop.time()
            if asked_at < self._trusted_until and self._looked_at >= since:
                return
            ((version, any_keys),) = await self._database.rows(_STATE, (), read_only=True)
            if version != self._version:
                self._known.clear()
                self._unknown.clear()
            self._version, self._any = version, any_keys
            self._looked_at, self._trusted_until = asked_at, asked_at + self._trusted_seconds

    async def _look_up(self, key: Key, asked_at: float) -> _Known:
        # One after the other: whoever tries keys has one connection at most, and a key that many ask with is read once.
        async with self._finding:
            known, now = self._known.get(key.hash), asyncio.get_running_loop().time()
            if known is not None and now < known.until:
                return known
            if key.hash in self._unknown:
                # It may have been let in since; one look answers all who wait here.
                await self._refresh(since=asked_at)
                if key.hash in self._unknown:
                    raise _unknown_key()
            return await self._read(key, self._version, now)

    async def _read(self, key: Key, version: int, asked_at: float) -> _Known:
        rows = await self._database.rows(_FIND, (key.id, key.hash), read_only=True)
        if not rows:
            if len(self._unknown) >= MOST_REMEMBERED:
                self._unknown.clear()
            if version == self._version:
                self._unknown.add(key.hash)
            raise _unknown_key()
        subject, tenants, scopes, act_as, *quotas, problem, valid_for = rows[0]
        lasts = REMEMBERED_SECONDS if valid_for is None else min(REMEMBERED_SECONDS, max(valid_for, 0.0))
        principal = Principal(key.id, subject, ",".join(tenants), frozenset(scopes), act_as, _quotas(quotas))
        known = _Known(principal, problem, asked_at + lasts)
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        # Not what was read before a change that another request has learnt of meanwhile.
        if version == self._version:
            self._known[key.hash] = known
        return known


class DefaultAuthenticator:
    """Keys and tokens; nobody but this machine as long as there are neither."""

    def __init__(self, keys: ApiKeys, tokens: Tokens | None = None) -> None:
        self.keys = keys
        self.tokens = tokens

    async def __call__(self, connection: HTTPConnection) -> Principal | None:
        """Return who asks. Raises ApiError: 401 for credentials that are not let in, 403 for other machines."""
        given = bearer_of(connection)
        if given is None:
            if self.tokens is not None or await self.keys.exist():
                return None
            require_this_machine(connection)
            return LOCAL
        if given.startswith(PREFIX):
            return await self.keys.find(given)
        if self.tokens is not None:
            return self.tokens.read(given)
        raise unauthorized("This is no API key.", hint="A key begins with jq_.", error="invalid_token")


def _unknown_key() -> ApiError:
    return unauthorized("The API key is unknown.", hint="jobqueue keys list shows all.", error="invalid_token")


def _parsed(text: str) -> Key:
    """The key in a text. Raises ApiError (401) if there is none."""
    key = parse_key(text)
    if key is None:
        raise unauthorized(
            "The API key is mistyped: its checksum is wrong.",
            hint="Copy the whole key, from jq_ to its end.",
            error="invalid_token",
        )
    return key


def first_of(*authenticators: Authenticator) -> Authenticator:
    """Return an authenticator that asks several, in order, until one knows who sent the request."""

    async def ask(connection: HTTPConnection) -> Principal | None:
        for authenticator in authenticators:
            if (principal := await authenticator(connection)) is not None:
                return principal
        return None

    return ask


def bearer_of(connection: HTTPConnection) -> str | None:
    """Return what follows `Authorization: Bearer`, or None. Raises ApiError (401) if it is empty or given twice."""
    headers = connection.headers.getlist("authorization")
    if not headers:
        return None
    scheme, _, value = headers[0].strip().partition(" ")
    if scheme.lower() != "bearer" and len(headers) == 1:
        return None
    if len(headers) > 1 or not value.strip() or not value.isascii():
        raise unauthorized("The Authorization header cannot be read.", error="invalid_request")
    return value.strip()


def require_this_machine(connection: HTTPConnection) -> None:
    """Raise ApiError (403) for a request from another machine, or one that a web page elsewhere could have made.

    A Unix socket has no client address: the file's rights decide. A host name with a dot is refused because a foreign
    page can have its own name point here (DNS rebinding), and because it means that a proxy stands in front.
    """
    client = connection.scope.get("client")
    by_proxy = any(name in connection.headers for name in PROXY_HEADERS)
    if by_proxy or (client and not _is_loopback(client[0])) or not _is_local_name(connection.headers.get("host", "")):
        raise ApiError(
            "FORBIDDEN",
            "Without an API key only requests from this machine, to its own name, are answered.",
            hint="Create a key (jobqueue keys create), or connect to the loopback address or a Unix socket.",
        )


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # No network at all: an in-process client.
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_local_name(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or (host.startswith("[") and "]:" in host) else host
    name = name.strip("[]").rstrip(".").lower()
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _quotas(limits: list[int | None]) -> Mapping[str, int]:
    return {bucket: limit for bucket, limit in zip(BUCKETS, limits, strict=True) if limit is not None}
