"""Handlers that go on after their attempts have ended: what a worker says about them.

A thread cannot be stopped. It keeps its slot until it ends, so a worker can lose its slots one by one; that is said when
it begins, once per handler, and once when no slot is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobqueue.hooks import WorkerWarning
from jobqueue.worker.held import Held

STOP_IT = (
    "A thread cannot be stopped: give what it calls a time-out, report progress (then it stops there by itself), or use"
    ' executor="process".'
)
RESTART = "Restart the worker: its threads end with it. Then see the warnings about these jobs before."
NAMED = 3
MOST_TOLD = 20
"""Jobs that the database is told by name."""


@dataclass(frozen=True, slots=True)
class StuckJob:
    """A job whose handler outlived its attempt. `why`: what ended that. `since`: a time of the event loop."""

    id: str
    job_type: str
    why: str
    since: float


@dataclass(frozen=True, slots=True)
class Stuck:
    """What the database is told, for health(), explain() and the list of workers."""

    slots: int = 0
    jobs: tuple[StuckJob, ...] = ()


NONE_STUCK = Stuck()


class StuckHandlers:
    """What was said already. `slots`: the worker's concurrency. `now`: what there is, to be read from any thread."""

    def __init__(self, slots: int) -> None:
        self.now = NONE_STUCK
        self._slots = slots
        self._known: set[str] = set()
        self._full = False

    def look(self, stuck: Sequence[Held], slots_taken: int, now: float) -> list[WorkerWarning]:
        """Return what is new. `slots_taken`: by these handlers; a batch takes one. `now`: the loop's time."""
        warnings = [_one(held, now) for held in stuck if held.token not in self._known]
        self._known = {held.token for held in stuck}
        told = tuple(StuckJob(held.id, held.claim.job_type, _why(held), held.outlived_at or now) for held in stuck)
        self.now = Stuck(slots_taken, told[:MOST_TOLD])
        full = slots_taken >= self._slots
        if full and not self._full:
            warnings.append(_all(stuck, self._slots))
        self._full = full
        return warnings


def _why(held: Held) -> str:
    return held.stop.value if held.stop is not None else "its own end"


def _one(held: Held, now: float) -> WorkerWarning:
    text = (
        f"the handler of job {held.id} ({held.claim.job_type}) still runs {now - (held.outlived_at or now):.0f} s after its"
        f" attempt ended ({_why(held)}), {now - held.started_at:.0f} s after its start; its slot stays taken until it ends"
    )
    return WorkerWarning(f"stuck handler: {held.id}", "warn", text, STOP_IT)


def _all(stuck: Sequence[Held], slots: int) -> WorkerWarning:
    names = ", ".join(held.id for held in stuck[:NAMED]) + (", …" if len(stuck) > NAMED else "")
    text = f"all {slots} slots are held by handlers that do not end, so this worker takes no job any more: {names}"
    return WorkerWarning("no slot is left", "fail", text, RESTART)
