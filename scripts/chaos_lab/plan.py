"""What is sent: a mix that follows from a seed, so that the checker knows every job without asking the database."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

FINAL = frozenset({"completed", "failed", "cancelled", "skipped"})
GROUP_LIMIT = 2
QUEUE_LIMIT = 10
SECONDS = (0.04, 0.12)
"""How long a handler works, from and to. Its waiting, not the processor, bounds the rate: else every neighbour would."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of job; its handler has the same name. `share`: of a hundred jobs. `lanes`: so many keys or groups."""

    share: int
    queue: str = "work"
    lanes: int = 0
    http: bool = False


FORGIVING = {"max_retries": 60, "retry_delay": 0.5, "retry_backoff": False, "keep_completed": None}
"""Retries enough that no fault uses them up: whether a job ends must not depend on how long a fault lasts."""

QUEUES: Mapping[str, Mapping[str, Any]] = {
    "work": FORGIVING,
    "ordered": {**FORGIVING, "policy": "key_strict_fifo"},
    "grouped": {**FORGIVING, "group_concurrency": {"default": GROUP_LIMIT}},
    "limited": {**FORGIVING, "concurrency": QUEUE_LIMIT},
}

KINDS: Mapping[str, Kind] = {
    "plain": Kind(55),
    # settled by the handler's own transaction, with a row that says so
    "effect": Kind(10),
    "ordered": Kind(10, queue="ordered", lanes=80),
    "grouped": Kind(8, queue="grouped", lanes=40),
    "limited": Kind(4, queue="limited"),
    "flaky": Kind(4),
    "snoozed": Kind(3),
    # a singleton key in a queue without policy: who comes while another has not ended is refused
    "unique": Kind(4, lanes=200),
    "http": Kind(2, http=True),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One job. `number`: its place in the plan. `lane`: its key or group. `fails`: failures before it completes.
    `ends`: the status that it must end in."""

    number: int
    id: str
    kind: str
    lane: str | None
    fails: int
    ends: str
    seconds: float

    def payload(self) -> dict[str, Any]:
        """What its handler is told."""
        return {"fails": self.fails, "doomed": self.ends == "failed", "seconds": self.seconds}

    def options(self) -> dict[str, Any]:
        """The options that it is sent with."""
        options: dict[str, Any] = {"id": self.id, "job_type": self.kind}
        if self.kind in ("ordered", "unique"):
            options["singleton_key"] = self.lane
        elif self.kind == "grouped":
            options["group"] = self.lane
        return options


def make_plan(seed: int, jobs: int) -> list[Planned]:
    """Return the jobs of a seed; the same for the same arguments."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    shares = [kind.share for kind in KINDS.values()]
    return [_one(rng, number, rng.choices(kinds, shares)[0]) for number in range(jobs)]


def _one(rng: random.Random, number: int, kind: str) -> Planned:
    lanes = KINDS[kind].lanes
    lane = f"{kind}-{rng.randrange(lanes)}" if lanes else None
    fails, ends = 0, "completed"
    if kind == "flaky":
        fails = rng.choice((1, 1, 2))
        ends = "failed" if rng.random() < 0.2 else "completed"
    elif kind == "ordered":
        fails = int(rng.random() < 0.02)
    id = str(UUID(int=rng.getrandbits(128), version=4))
    return Planned(number, id, kind, lane, fails, ends, round(rng.uniform(*SECONDS), 3))
