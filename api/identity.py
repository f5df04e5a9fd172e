"""Who asks: principals, and how an authenticator finds them.

```
request  ─►  authenticator (authenticators.py: API keys, tokens; or an application's own)
         ─►  Principal  ─►  scopes, tenants, quotas
```
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from jobqueue.api.errors import ApiError

ALL_TENANTS = "*"
SCOPES = ("jobs:read", "jobs:write", "jobs:act", "metrics", "admin")
ALL_SCOPES = frozenset(SCOPES)
BUCKETS = ("reads", "writes", "streams")
REALM = "jobqueue"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, and what they may.

    `key`: a name that is theirs for ever; idempotency keys and quotas belong to it (None: neither). `subject`: what
    `created_by` of their jobs says (None: nothing). `tenants`: 'a,b', or '*' for all (default: none). `scopes`: of
    `SCOPES` (none); `admin` holds the others. `act_as`: may name another `created_by` than their subject. `quotas`:
    requests per hour by bucket (`BUCKETS`); a bucket that is missing has no bound. `until`: when what they sent ends,
    in epoch seconds (None: not by itself); a ticket or stream of theirs ends with it.
    """

    key: str | None = None
    subject: str | None = None
    tenants: str = ""
    scopes: frozenset[str] = frozenset()
    act_as: bool = False
    quotas: Mapping[str, int] = field(default_factory=dict)
    until: float | None = None

    def may_use(self, tenant: str) -> bool:
        """Return whether a tenant is theirs."""
        return self.tenants == ALL_TENANTS or tenant in self.tenants.split(",")

    def has_scope(self, *scopes: str) -> bool:
        """Return whether they have any of the scopes; `admin` counts as each."""
        return not self.scopes.isdisjoint((*scopes, "admin"))

    @property
    def may_act_as_others(self) -> bool:
        """Whether they may send jobs in somebody else's name: with `act_as` or the scope `admin`."""
        return self.act_as or "admin" in self.scopes

    @property
    def only_tenant(self) -> str | None:
        """Their tenant if they have exactly one: what their jobs get that name none."""
        return None if self.tenants in {"", ALL_TENANTS} or "," in self.tenants else self.tenants

    def to_json(self) -> dict[str, Any]:
        """Return it as `from_json` reads it; for tickets."""
        return {
            "key": self.key,
            "subject": self.subject,
            "tenants": self.tenants,
            "scopes": sorted(self.scopes),
            "act_as": self.act_as,
            "quotas": dict(self.quotas),
            "until": self.until,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Principal:
        """Return the principal of `to_json`."""
        return cls(
            key=value["key"],
            subject=value["subject"],
            tenants=value["tenants"],
            scopes=frozenset(value["scopes"]),
            act_as=value["act_as"],
            quotas=value["quotas"],
            until=value.get("until"),
        )


LOCAL = Principal(tenants=ALL_TENANTS, scopes=ALL_SCOPES, act_as=True)
"""Whoever asks a server that has no keys, from the same machine."""

Authenticator = Callable[[HTTPConnection], Awaitable[Principal | None]]
"""Return who sent a request, or None if it does not say so (401). May raise ApiError, best made by `unauthorized`."""


def unauthorized(message: str, *, hint: str | None = None, error: str | None = None) -> ApiError:
    """Return the 401. `error`: what was wrong with the credentials that were sent (RFC 6750), None if there were none."""
    challenge = f'Bearer realm="{REALM}"' + (f', error="{error}"' if error else "")
    return ApiError("UNAUTHORIZED", message, hint=hint, headers={"WWW-Authenticate": challenge})


def require_scope(principal: Principal, scopes: tuple[str, ...]) -> None:
    """Raise ApiError (403) unless the caller has one of the scopes, or admin, or none is asked for."""
    if scopes and not principal.has_scope(*scopes):
        named = " ".join(scopes)
        raise ApiError(
            "FORBIDDEN",
            f"This needs the scope {' or '.join(scopes)}.",
            details={"scopes": list(scopes)},
            headers={"WWW-Authenticate": f'Bearer realm="{REALM}", error="insufficient_scope", scope="{named}"'},
        )
