"""Quotas: requests per hour, by key and bucket, right over all processes of an installation.

```
reserve()  ─►  one from the portion that this process holds  (none left: take_quota, up to 50 at a time)
answer     ─►  2xx: spent; 304 and every error: back into the portion
after 2 s  ─►  what is left of a portion goes back (give_quota), so that no process sits on what another one needs
```

The database is the truth (sql/functions/quotas.sql) and hands out a twentieth of what is left at most, so near the end
every request asks it. docs/decisions/0008-http-identity.md compares this with a statement per request.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, field

import psycopg
from starlette.responses import Response

from jobqueue.api.database import Database
from jobqueue.api.errors import ApiError
from jobqueue.api.identity import Principal
from jobqueue.errors import JobqueueError

logger = logging.getLogger(__name__)

PORTION = 50
HELD_SECONDS = 2.0
WINDOW_SECONDS = 3600
MOST_PORTIONS = 10_000

_TAKE = "select granted, remaining, ends, ends_in from jobqueue.take_quota(%s, %s, %s, %s)"
_GIVE = "select jobqueue.give_quota(%s::text[], %s::text[], %s::int[], %s::bigint[])"


@dataclass(eq=False, slots=True)
class _Portion:
    """What this process holds for one owner and bucket, until `over` (a time of the event loop)."""

    owner: str
    bucket: str
    free: int = 0
    elsewhere: int = 0
    ends: int = 0
    over: float = 0.0
    taken_at: float = 0.0
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(eq=False, slots=True)
class Charge:
    """One request that was let through; `settle` says what it came to."""

    quotas: Quotas
    portion: _Portion
    limit: int
    ends: int
    settled: bool = False

    def settle(self, response: Response | None) -> None:
        """Spend it if the answer is a success, else give it back; the answer gets the headers. None: no answer."""
        if self.settled:
            return
        self.settled = True
        if response is None or not 200 <= response.status_code < 300:
            self.quotas.put_back(self.portion, self.ends)
        if response is not None:
            # Nobody else sets these; set one by one, each would look through all the others.
            response.raw_headers.extend(
                (name.lower().encode(), value.encode()) for name, value in headers(self.portion, self.limit).items()
            )


class Quotas:
    """The portions of one process. `portion`: how many to take at a time (50); `held`: seconds they are kept (2)."""

    def __init__(self, database: Database, *, portion: int = PORTION, held: float = HELD_SECONDS) -> None:
        self._database = database
        self._size = portion
        self._held = held
        self._portions: dict[tuple[str, str], _Portion] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._giving: set[asyncio.Task[None]] = set()

    async def reserve(self, principal: Principal, bucket: str) -> Charge | None:
        """Let a request through; None if it has no quota. Raises ApiError: 429 if the hour's quota is used up."""
        limit = principal.quotas.get(bucket)
        if limit is None or principal.key is None:
            return None
        portion = self._portion(principal.key, bucket)
        now = asyncio.get_running_loop().time()
        if portion.free <= 0 or now >= portion.over:
            async with portion.taking:
                if portion.free <= 0 or now >= portion.over:
                    await self._take(portion, limit)
        portion.free -= 1
        return Charge(self, portion, limit, portion.ends)

    def put_back(self, portion: _Portion, ends: int) -> None:
        """One request came to nothing; it counts again unless its hour has ended."""
        if portion.ends == ends:
            portion.free += 1
            self._plan()

    async def stop(self) -> None:
        """Give everything back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._give([portion for portion in self._portions.values() if portion.free > 0])
        await asyncio.gather(*self._giving, return_exceptions=True)

    def _portion(self, owner: str, bucket: str) -> _Portion:
        portion = self._portions.get((owner, bucket))
        if portion is None:
            if len(self._portions) >= MOST_PORTIONS:
                idle = [name for name, held in self._portions.items() if held.free <= 0 and not held.taking.locked()]
                for name in idle:
                    del self._portions[name]
            portion = self._portions[owner, bucket] = _Portion(owner, bucket)
        return portion

    async def _take(self, portion: _Portion, limit: int) -> None:
        asked_at = asyncio.get_running_loop().time()
        ((granted, remaining, ends, ends_in),) = await self._database.rows(
            _TAKE, (portion.owner, portion.bucket, limit, self._size)
        )
        # What came back meanwhile of the same hour is kept; of an older one it is void.
        kept = portion.free if portion.ends == ends else 0
        portion.free, portion.elsewhere, portion.ends = kept + granted, remaining, ends
        portion.over, portion.taken_at = asked_at + ends_in, asked_at
        if portion.free <= 0:
            raise ApiError(
                "QUOTA_EXCEEDED",
                f"The quota of {limit} {portion.bucket} per hour is used up.",
                hint="Wait until X-RateLimit-Reset, or ask the operator for more.",
                details={"bucket": portion.bucket, "limit": limit},
                headers={"Retry-After": str(max(1, math.ceil(ends_in))), **headers(portion, limit)},
            )
        self._plan()

    def _plan(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._held, self._give_old)

    def _give_old(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        free = [portion for portion in self._portions.values() if portion.free > 0]
        old = [portion for portion in free if now - portion.taken_at >= self._held]
        if len(old) < len(free):
            self._plan()
        if old:
            task = asyncio.create_task(self._give(old))
            self._giving.add(task)
            task.add_done_callback(self._giving.discard)

    async def _give(self, portions: list[_Portion]) -> None:
        given = [(portion.owner, portion.bucket, portion.free, portion.ends) for portion in portions]
        for portion in portions:
            portion.elsewhere, portion.free = portion.elsewhere + portion.free, 0
        if not given:
            return
        try:
            await self._database.rows(_GIVE, [list(column) for column in zip(*given, strict=True)])
        except (psycopg.Error, JobqueueError, TimeoutError) as error:
            # Lost to its owner for this hour; the bound still holds.
            logger.warning("quotas could not be given back: %s", " ".join(str(error).split()))


def headers(portion: _Portion, limit: int) -> dict[str, str]:
    """Return the headers about a quota: the usual X-RateLimit ones, and those of the IETF's draft."""
    left = max(0, min(limit, portion.free + portion.elsewhere))
    ends_in = max(0, math.ceil(portion.over - asyncio.get_running_loop().time()))
    return {
        "X-RateLimit-Limit": str(limit),
        "X-RateLimit-Remaining": str(left),
        "X-RateLimit-Reset": str(portion.ends),
        "RateLimit-Policy": f'"{portion.bucket}";q={limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"{portion.bucket}";r={left};t={ends_in}',
    }
