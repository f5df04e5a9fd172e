"""Claim loops of workers, each in a thread with connections of its own, all at once; they stand still when told to.

What claims is `jobqueue.worker.claim.Claimer`, as in a worker: its floors, its sweeps, its statements. Only the jobs are
ours: they end as soon as they are accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import psycopg

from jobqueue.job import Claim
from jobqueue.worker.claim import Claimer
from jobqueue.worker.floors import Floors
from jobqueue.worker.wake import Wake

QUEUE = "q"
SETTLE = "select * from jobqueue.settle(%s, %s::uuid[], %s::uuid[], null, null, null)"
POLL = 0.05
PATIENCE = 120.0
"""Seconds until the claimers must have done what they were let go for; a bound for failures, never waited out."""


class CountingClaimer(Claimer):
    """A worker's claimer that counts its sweeps."""

    sweeps = 0

    async def _sweep(self, *arguments: Any) -> list[Claim]:
        self.sweeps += 1
        return await super()._sweep(*arguments)

    @property
    def floors(self) -> Floors:
        """Where it looks for its next jobs."""
        return self._floors_of(QUEUE)


class Member(threading.Thread):
    """One claim loop, and the room that it claims for (`jobqueue.worker.claim.Room`)."""

    def __init__(self, group: Claimers, dsn: str) -> None:
        super().__init__(daemon=True)
        self._group, self._dsn = group, dsn
        self._worker = str(uuid4())
        self.claimer: CountingClaimer
        self.claimed: list[str] = []
        self.standing = False
        self.turns = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as self._connection:
                asyncio.run(self._claim())
        except BaseException as error:
            self.error = error
        with self._group.changed:
            self._group.changed.notify_all()

    async def _claim(self) -> None:
        wake = Wake(None, [QUEUE], poll=POLL)
        self.claimer = CountingClaimer(self._dsn, self._worker, [QUEUE], None, self, wake)
        await self.claimer.run()

    def wanted(self) -> int:
        with self._group.changed:
            if not self._group.moving and not self.turns:
                return 0
            self.turns = max(0, self.turns - 1)
            return self._group.portion

    def free_slots(self) -> int:
        return self._group.portion

    def suspects_allowed(self) -> int:
        return 1

    def accept(self, claims: Sequence[Claim]) -> None:
        ids, tokens = [claim.id for claim in claims], [claim.claim_token for claim in claims]
        refused = self._connection.execute(SETTLE, (self._worker, ids, tokens)).fetchall()
        assert refused == [], "a claim was not ours"
        with self._group.changed:
            self.claimed += ids
            self._group.count(ids)

    async def room(self) -> None:
        group = self._group
        # The thread itself waits: nothing else runs in its event loop.
        with group.changed:
            self.standing = True
            group.changed.notify_all()
            group.changed.wait_for(lambda: group.moving or self.turns or group.closed)
            self.standing = False
        if group.closed:
            self.claimer.stop()


class Claimers:
    """Several claim loops on one queue.

    Attributes:
        portion: jobs per claim.
        total: jobs claimed and completed so far.
    """

    def __init__(self, dsn: str, number: int) -> None:
        self.changed = threading.Condition()
        self.portion = 100
        self.total = 0
        self.moving = False
        self.closed = False
        self._found: set[str] = set()
        self._until: Callable[[], bool] = lambda: True
        self.members = [Member(self, dsn) for _ in range(number)]

    def count(self, ids: Sequence[str]) -> None:
        """Add completed jobs, and stand still if that is what was waited for. The lock is held."""
        self.total += len(ids)
        self._found.update(ids)
        if self._until():
            self.moving = False
        self.changed.notify_all()

    def has(self, job: object) -> bool:
        """Whether a job has been claimed and completed."""
        return str(job) in self._found

    def go(self, until: Callable[[], bool]) -> None:
        """Let all of them claim until the condition holds; returns at once."""
        with self.changed:
            self._until, self.moving = until, True
            self.changed.notify_all()

    def stand_still(self) -> None:
        """Wait until all have done what they were let go for."""
        self.wait(lambda: not self.moving and all(member.standing for member in self.members), "standing still")

    def each_claims_once(self) -> None:
        """One claim of each, one after the other, so that nobody's last claim lies further back than the others'."""
        for member in self.members:
            with self.changed:
                member.turns, member.standing = 1, False
                self.changed.notify_all()
            self.stand_still()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that the claimers do.

        Raises:
            AssertionError: one of them has died, or nothing came of it for two minutes.
        """
        with self.changed:
            self.changed.wait_for(lambda: condition() or self._errors(), timeout=PATIENCE)
            assert not self._errors(), self._errors()
            assert condition(), f"not within {PATIENCE:g} s: {what}"

    def _errors(self) -> list[BaseException]:
        return [member.error for member in self.members if member.error is not None]


@contextlib.contextmanager
def claimers(dsn: str, number: int) -> Iterator[Claimers]:
    """Claimers that stand still at first."""
    group = Claimers(dsn, number)
    for member in group.members:
        member.start()
    try:
        yield group
    finally:
        with group.changed:
            group.closed, group.moving = True, False
            group.changed.notify_all()
        for member in group.members:
            member.join(PATIENCE)
