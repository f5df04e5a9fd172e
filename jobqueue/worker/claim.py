"""Claims: ask for free slots plus a small prefetch, from the floors up; sweep below them once a second.

How much is prefetched follows from what jobs take: never more than the process finishes in `PREFETCH_SECONDS`, so that
no job waits behind a slow one while another worker is idle. The same default serves one-millisecond and one-hour jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import tuple_row

from jobqueue.database.pool import connect_async
from jobqueue.job import Claim
from jobqueue.worker.floors import HIGHEST_RANK, LOWEST_RANK, Floors
from jobqueue.worker.resilience import DATABASE_AWAY, AnswerWatch, Backoff, cut
from jobqueue.worker.rows import prepare_rows

if TYPE_CHECKING:
    from jobqueue.hooks import Timed
    from jobqueue.worker.wake import Wake

SWEEP_SECONDS = 1.0
FULL_SWEEP_SECONDS = 60.0
MOST_PER_CLAIM = 500
"""Jobs per statement: measured best of 50 to 2,000; more only delays the first of them."""

COLUMNS = ", ".join(Claim._fields)
CLAIM_ONE = (
    f"select {COLUMNS} from jobqueue.claim_queue(%s, %s, %s::int[], %s::bigint[], %s::int[], null, %s, %s, %s, %s)"  # noqa: S608
)
CLAIM_SEVERAL = (
    f"select {COLUMNS} from jobqueue.claim_ranges(%s, %s::text[], %s::int[], %s::bigint[], %s::int[], %s, %s, %s, %s)"  # noqa: S608
)
CLAIM_BELOW = (
    f"select {COLUMNS} from jobqueue.claim_queue(%s, %s, %s::int[], %s::bigint[], null, %s::bigint[], %s, %s, %s, %s)"  # noqa: S608
)

logger = logging.getLogger(__name__)


class Room(Protocol):
    """What the claimer has to know of the worker."""

    def wanted(self) -> int:
        """Jobs to ask for now; 0: none."""

    def free_slots(self) -> int:
        """Jobs that would start at once."""

    def suspects_allowed(self) -> int:
        """Jobs that have lost a worker and may be taken: 1, or 0 while one is here."""

    def accept(self, claims: Sequence[Claim]) -> None:
        """Take over claimed jobs."""

    async def room(self) -> None:
        """Wait until `wanted` may have risen."""


class Claimer:
    """The claim loop of a worker, on a connection of its own."""

    def __init__(
        self,
        dsn: str,
        worker_id: str,
        queues: Sequence[str] | None,
        job_types: Sequence[str] | None,
        room: Room,
        wake: Wake,
        *,
        pooler: bool = False,
        idle: Callable[[], bool] | None = None,
        beat: Callable[[], None] | None = None,
        timed: Timed | None = None,
    ) -> None:
        self._dsn, self._worker_id, self._pooler = dsn, worker_id, pooler
        self._given = list(queues) if queues is not None else None
        self._queues: list[str] = list(queues or ())
        self._job_types = list(job_types) if job_types is not None else None
        self._room, self._wake = room, wake
        self._idle, self._beat = idle, beat
        self._timed = timed
        self._floors: dict[str, Floors] = {}
        self._connection: AsyncConnection[Any] | None = None
        self._watch = AnswerWatch()
        self._next_sweep = 0.0
        self._next_full = 0.0
        self._names_at = 0.0
        self._stopping = False
        self._found = False
        self.statements = 0

    def stop(self) -> None:
        """Claim nothing any more; the loop ends after the claim under way."""
        self._stopping = True
        self._wake.ring()

    async def run(self) -> None:
        """Claim until stopped, or until there is nothing to do and `idle` says that this is the end."""
        backoff = Backoff()
        # nothing lies below floors that are not there yet
        self._next_sweep, self._next_full = self._now() + SWEEP_SECONDS, self._now() + FULL_SWEEP_SECONDS
        while not self._stopping:
            try:
                if await self._step():
                    return
                backoff.reset()
            except (psycopg.Error, *DATABASE_AWAY) as error:
                await self._disconnect()
                if not self._stopping:
                    logger.warning("claiming failed, trying again: %s", _one_line(error), extra={"event": "db.lost"})
                    await asyncio.sleep(backoff.next())
        await self._disconnect()

    def cut(self) -> None:
        """Cut the connection, which may be dead; a claim under way fails and is tried again on another."""
        cut(self._connection)

    async def close(self) -> None:
        """Close the connection."""
        await self._disconnect()

    async def _step(self) -> bool:
        """Claim once, or wait until that is worth trying. Returns whether the loop is over."""
        if self._beat is not None:
            self._beat()
        wanted = self._room.wanted()
        if wanted <= 0:
            await self._wake.busy()
            await self._room.room()
            return False
        wanted = min(wanted, MOST_PER_CLAIM)
        # While jobs keep coming a sweep goes first: after a claim, a line that never empties would leave it no room. Who was
        # idle claims first, so that a job that wakes it does not wait for a sweep.
        claims = await self._sweep_if_due(wanted) if self._found else []
        if not claims:
            claims = await self._claim(wanted)
            self._found = bool(claims)
        if not claims:
            claims = await self._sweep_if_due(wanted)
        if claims:
            self._room.accept(claims)
            return False
        if self._idle is not None and self._idle():
            # The last look of a worker that ends when nothing is left: below the floors too.
            self._next_sweep = self._next_full = self._names_at = 0.0
            claims = await self._sweep_if_due(wanted)
            if not claims:
                return True
            self._room.accept(claims)
            return False
        if not self._stopping:
            await self._wake.wait()
        return False

    async def _claim(self, wanted: int) -> list[Claim]:
        connection = await self._connect()
        measured = contextlib.nullcontext() if self._timed is None else self._timed("receive", self._queues)
        with self._watch.over(connection), measured:
            return await self._claim_on(connection, wanted)

    async def _claim_on(self, connection: AsyncConnection[Any], wanted: int) -> list[Claim]:
        queues = await self._current_queues(connection)
        if not queues:
            return []
        start, suspects = self._room.free_slots(), self._room.suspects_allowed()
        self.statements += 1
        if len(queues) == 1:
            ranges = self._floors_of(queues[0]).ranges()
            cursor = await connection.execute(
                CLAIM_ONE, (queues[0], self._worker_id, *ranges, wanted, start, suspects, self._job_types)
            )
        else:
            names: list[str] = []
            ranks: list[int] = []
            seqs: list[int] = []
            ends: list[int] = []
            for name in queues:
                part = self._floors_of(name).ranges()
                names += [name] * len(part.ranks)
                ranks += part.ranks
                seqs += part.seqs
                ends += part.ends
            cursor = await connection.execute(
                CLAIM_SEVERAL,
                (self._worker_id, names, ranks, seqs, ends, wanted, start, suspects, self._job_types),
            )
        claims = await cursor.fetchall()
        if len(queues) > 1:
            # queue by queue as they come; the line is one over all queues
            claims.sort(key=lambda claim: (-claim.priority, claim.ready_seq))
        self._note(queues, claims, len(claims) < wanted)
        return claims

    def _note(self, queues: Sequence[str], claims: Sequence[Claim], short: bool) -> None:
        now = self._now()
        if len(queues) == 1:
            keys = [(-claim.priority, claim.ready_seq) for claim in claims if not claim.suspect]
            self._floors_of(queues[0]).claimed(keys, short, now)
            return
        for name in queues:
            keys = [(-c.priority, c.ready_seq) for c in claims if c.queue == name and not c.suspect]
            if keys or short:
                self._floors_of(name).claimed(keys, short, now)

    async def _sweep_if_due(self, wanted: int) -> list[Claim]:
        """Look below the floors: at the latest a second after a late producer's commit its job is found here."""
        now = self._now()
        if now < self._next_sweep or wanted <= 0:
            return []
        full = now >= self._next_full
        self._next_sweep = now + SWEEP_SECONDS
        if full:
            self._next_full = now + FULL_SWEEP_SECONDS
        connection = await self._connect()
        with self._watch.over(connection):
            return await self._sweep_on(connection, wanted, full)

    async def _sweep_on(self, connection: AsyncConnection[Any], wanted: int, full: bool) -> list[Claim]:
        every = await self._current_queues(connection)
        queues = [name for name in every if self._floors_of(name).below().ranks]
        if full and queues:
            return await self._sweep_all(connection, every, wanted)
        found: list[Claim] = []
        for name in queues:
            found += await self._sweep(connection, name, wanted - len(found))
            if len(found) >= wanted:
                break
        return found

    async def _sweep(self, connection: AsyncConnection[Any], name: str, wanted: int) -> list[Claim]:
        floors = self._floors_of(name)
        xmin, xmax = await self._bounds(connection)
        cursor = await connection.execute(
            CLAIM_BELOW, (name, self._worker_id, *floors.below(), wanted, *self._allowances(), self._job_types)
        )
        claims: list[Claim] = await cursor.fetchall()
        self.statements += 2
        floors.swept(len(claims) < wanted, xmin, xmax)
        return claims

    async def _sweep_all(self, connection: AsyncConnection[Any], queues: Sequence[str], wanted: int) -> list[Claim]:
        """Read the whole lines of the queues: what is found there comes in the order of the line, as with every claim."""
        xmin, xmax = await self._bounds(connection)
        count = len(queues)
        spans = ([LOWEST_RANK] * count, [0] * count, [HIGHEST_RANK] * count)
        cursor = await connection.execute(
            CLAIM_SEVERAL, (self._worker_id, list(queues), *spans, wanted, *self._allowances(), self._job_types)
        )
        claims: list[Claim] = await cursor.fetchall()
        claims.sort(key=lambda claim: (-claim.priority, claim.ready_seq))
        self.statements += 2
        for name in queues:
            self._floors_of(name).swept(len(claims) < wanted, xmin, xmax)
        return claims

    async def _bounds(self, connection: AsyncConnection[Any]) -> tuple[int, int]:
        plain = connection.cursor(row_factory=tuple_row)
        bounds = await (await plain.execute("select xmin, xmax from jobqueue.snapshot_bounds()")).fetchone()
        assert bounds is not None
        return bounds

    def _allowances(self) -> tuple[int, int]:
        return self._room.free_slots(), self._room.suspects_allowed()

    async def _current_queues(self, connection: AsyncConnection[Any]) -> list[str]:
        if self._given is None and (not self._queues or self._now() >= self._names_at):
            self._names_at = self._now() + SWEEP_SECONDS
            plain = connection.cursor(row_factory=tuple_row)
            rows = await (await plain.execute("select name from jobqueue.queue_names()")).fetchall()
            self._queues = [row[0] for row in rows]
        return self._queues

    def _floors_of(self, name: str) -> Floors:
        floors = self._floors.get(name)
        if floors is None:
            floors = self._floors[name] = Floors()
        return floors

    async def _connect(self) -> AsyncConnection[Any]:
        if self._connection is None or self._connection.closed:
            connection = await connect_async(self._dsn, "jobqueue claims", pooler=self._pooler)
            prepare_rows(connection, Claim)
            if not self._pooler:
                # A claim that a crash of the server takes back is claimed again, with another token: nobody has to wait for
                # the disk here. Sends and results do.
                with self._watch.over(connection):
                    await connection.execute("set synchronous_commit = off")
            self._connection = connection
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
