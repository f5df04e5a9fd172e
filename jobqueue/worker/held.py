"""What a worker holds: one `Held` per claimed job, from the claim until its end is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobqueue.handlers import Handler
    from jobqueue.job import Claim, Job


class Stop(Enum):
    """Why a running handler is stopped before its end."""

    TIMEOUT = "timeout"
    CANCEL = "cancel"
    PAUSE = "pause"
    LOST = "lost"
    FENCED = "fenced"
    RELEASE = "release"


class ClaimNote:
    """One call of claim: how many of its jobs have not ended; at zero the database's note of it can go."""

    __slots__ = ("id", "left")

    def __init__(self, id: int, left: int) -> None:
        self.id = id
        self.left = left


class Held:
    """A claimed job in this process, compared by identity. Times are those of the event loop's clock, in seconds."""

    __slots__ = (
        "abandoned",
        "arrived",
        "claim",
        "error",
        "handler",
        "id",
        "interrupt",
        "job",
        "life",
        "note",
        "outlived_at",
        "settled",
        "slot",
        "started",
        "started_at",
        "stop",
        "stop_asked_at",
        "token",
    )

    def __init__(self, claim: Claim, handler: Handler, note: ClaimNote, arrived: float) -> None:
        self.id: str = claim[1]
        self.token: str = claim[2]
        self.claim = claim
        self.handler = handler
        self.note: ClaimNote | None = note
        self.arrived = arrived
        self.started = False
        self.started_at = 0.0
        self.life = 0.0
        self.job: Job | None = None
        self.stop: Stop | None = None
        self.stop_asked_at = 0.0
        self.interrupt: Callable[[], object] | None = None
        # what it runs in, while it runs; jobs of a batch share it
        self.slot: object = None
        self.settled = False
        # what the handler raised, for hooks
        self.error: BaseException | None = None
        self.abandoned = False
        # when the attempt was ended while the handler went on
        self.outlived_at: float | None = None

    def deadline(self) -> float | None:
        """When the handler has run long enough: `timeout` after its last sign of life, `max_runtime` after its start."""
        timeout, most = self.claim.timeout, self.claim.max_runtime
        ends = []
        if timeout is not None:
            ends.append(self.life + timeout)
        if most is not None:
            ends.append(self.started_at + most)
        return min(ends) if ends else None

    def ask_stop(self, reason: Stop, *, interrupt: bool = True) -> None:
        """Stop the handler, for one reason only: the first one counts, except that a lost claim overrules all.

        `interrupt`: False leaves it to the handler to notice; the runner's watch interrupts it later.
        """
        if self.stop is not None and reason is not Stop.LOST:
            return
        self.stop = reason
        self.stop_asked_at = asyncio.get_running_loop().time()
        if interrupt and self.interrupt is not None:
            self.interrupt()
