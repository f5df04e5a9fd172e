"""Floors: where in the line a worker looks for its next jobs.

The front of the claim index holds the dead entries of the jobs that were consumed. They can only be cleaned up when no
old transaction is open, so a claim that starts at the front gets slower with every job consumed. A worker therefore
remembers, per rank (a rank is minus the priority), the smallest `ready_seq` of its last claim there, its *floor*, and
reads only the ranges between the holes that it knows:

    floors {r1: f1, r2: f2}  ->  (-inf, 0)..r1,  (r1, f1)..r2,  (r2, f2)..inf

A priority that it has never seen lies in one of the gaps and is found at once. What lies below a floor (a producer took
its number early and committed late; a peer's claim was rolled back) is found by the *sweep*, which reads only between
the sweep floor and the floor. The sweep floor rises to the floors of a checkpoint once every transaction that was under
way at the checkpoint has ended. Numbers and the alternatives tried: docs/decisions/0003-claims.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

LOWEST_RANK = -2147483647
HIGHEST_RANK = 2147483647
MOST_RANKS = 64
"""Priorities remembered per queue; the ones used least recently are forgotten and lie in a gap again."""
SETTLING_SECONDS = 1.0
"""Numbers younger than this may belong to transactions that have not committed yet; a floor never rises to them."""


class Ranges(NamedTuple):
    """Ranges of the line, as three arrays: from (rank, seq) up to, excluding, a rank."""

    ranks: list[int]
    seqs: list[int]
    ends: list[int]


class Below(NamedTuple):
    """Ranges below the floors, as three arrays: one rank, from a seq up to, excluding, another."""

    ranks: list[int]
    lows: list[int]
    highs: list[int]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Floors, and the id that the next transaction had when they were noted."""

    next_transaction: int
    floors: dict[int, int]


class Floors:
    """The floors of one worker in one queue. Not shared, not stored: a new worker begins with none."""

    def __init__(self) -> None:
        self._floors: dict[int, int] = {}
        self._sweep_floors: dict[int, int] = {}
        self._checkpoints: deque[Checkpoint] = deque(maxlen=120)
        self._highest = 0
        self._seen: deque[tuple[float, int]] = deque()

    def ranges(self) -> Ranges:
        """Return what a claim has to read, highest priority first."""
        ranks, seqs, ends = [LOWEST_RANK], [0], []
        for rank in sorted(self._floors):
            ends.append(rank)
            ranks.append(rank)
            seqs.append(self._floors[rank])
        ends.append(HIGHEST_RANK)
        return Ranges(ranks, seqs, ends)

    def claimed(self, keys: Iterable[tuple[int, int]], short: bool, now: float) -> None:
        """Note what a claim returned: (rank, ready_seq) of each job, and whether it got less than it asked for.

        `now`: seconds of any clock that does not go back.
        """
        lowest: dict[int, int] = {}
        highest = self._highest
        for rank, seq in keys:
            if seq < lowest.get(rank, HIGHEST_SEQ):
                lowest[rank] = seq
            if seq > highest:
                highest = seq
        for rank, seq in lowest.items():
            # popped and put back: the dict is in the order of use
            self._floors[rank] = max(self._floors.pop(rank, 0), seq)
        if short and self._floors:
            self._raise_empty_ranks(lowest, now)
        if highest > self._highest:
            self._highest = highest
            if not self._seen or now - self._seen[-1][0] >= SETTLING_SECONDS / 10:
                self._seen.append((now, highest))
        while len(self._floors) > MOST_RANKS:
            self._floors.pop(next(iter(self._floors)))

    def _raise_empty_ranks(self, found: dict[int, int], now: float) -> None:
        settled = 0
        while self._seen and now - self._seen[0][0] >= SETTLING_SECONDS:
            settled = self._seen.popleft()[1]
        if not settled:
            return
        for rank, floor in self._floors.items():
            if rank not in found and settled > floor:
                self._floors[rank] = settled

    def below(self) -> Below:
        """Return what a sweep has to read; empty if nothing can lie below the floors."""
        found = Below([], [], [])
        for rank in sorted(self._floors):
            low = self._sweep_floors.get(rank, 0)
            if low < self._floors[rank]:
                found.ranks.append(rank)
                found.lows.append(low)
                found.highs.append(self._floors[rank])
        return found

    def swept(self, short: bool, oldest_running: int, next_transaction: int) -> None:
        """Note a sweep: whether it came back short, and the bounds of the snapshot taken just before it."""
        if short:
            while self._checkpoints and self._checkpoints[0].next_transaction <= oldest_running:
                for rank, floor in self._checkpoints.popleft().floors.items():
                    if floor > self._sweep_floors.get(rank, 0):
                        self._sweep_floors[rank] = floor
        if len(self._sweep_floors) > 4 * MOST_RANKS:
            self._sweep_floors = {rank: low for rank, low in self._sweep_floors.items() if rank in self._floors}
        self._checkpoints.append(Checkpoint(next_transaction, dict(self._floors)))


HIGHEST_SEQ = 2**63 - 1
