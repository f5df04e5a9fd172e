"""How fast: the rate before a fault, during it and after it, and when the jobs of a killed worker run again."""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from chaos_lab.checker import Violation
from chaos_lab.history import Answer, History, Injection, Move

FULL = 0.8
RECOVERY_SECONDS = 10.0
RERUN_GRACE = 5.0
WINDOW = 2.0
STEP = 0.25
RAMP = 3.0
"""Seconds after the first end that are not counted: processes start one after the other."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Jobs per second. `recovery`: seconds from the end of the cause until the rate is full again; None: not measured,
    the jobs had run out before. `api`: seconds until the API answered 200."""

    injection: Injection
    before: float | None
    during: float | None
    recovery: float | None
    api: float | None
    rerun: float | None


class Rates:
    """Ends of attempts that completed, counted in windows."""

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = sorted(ends)

    @property
    def first(self) -> float:
        """When the first job ended; endless if none has."""
        return self._ends[0] if self._ends else float("inf")

    @property
    def last(self) -> float:
        """When the last job ended."""
        return self._ends[-1] if self._ends else 0.0

    def between(self, begin: float, end: float) -> float:
        """Jobs per second from begin to end."""
        count = bisect_left(self._ends, end) - bisect_left(self._ends, begin)
        return count / max(end - begin, 1e-9)

    def usual(self, begin: float, end: float) -> float | None:
        """The median of the windows in that time; None if there are fewer than three."""
        rates = [self.between(at, at + WINDOW) for at in _steps(begin, end - WINDOW)]
        return statistics.median(rates) if len(rates) >= 3 else None

    def full_from(self, begin: float, rate: float) -> float | None:
        """When the first window with that rate begins; None if the jobs ran out before that could be seen."""
        for at in _steps(begin, self.last - WINDOW):
            if self.between(at, at + WINDOW) >= rate:
                return at
        return None


def _steps(begin: float, end: float) -> list[float]:
    return [begin + n * STEP for n in range(int((end - begin) / STEP) + 1)] if end >= begin else []


def paces(history: History) -> list[Pace]:
    """Return one per injection. What is usual is what was before the first of them."""
    rates = Rates([move.at for move in history.moves if move.became == "completed"])
    begins = [injection.began for injection in history.injections]
    before = rates.usual(rates.first + RAMP, min(begins)) if begins else None
    return [_pace(history, rates, before, injection) for injection in history.injections]


def _pace(history: History, rates: Rates, before: float | None, injection: Injection) -> Pace:
    recovered = rates.full_from(injection.ended, before * FULL) if before is not None else None
    if recovered is None and before is not None and rates.last > injection.ended + RECOVERY_SECONDS + WINDOW:
        recovered = rates.last
    long = injection.ended - injection.began >= WINDOW
    return Pace(
        injection,
        before,
        rates.between(injection.began, injection.ended) if long else None,
        None if recovered is None else recovered - injection.ended,
        _api_back(history.answers, injection),
        max(_reruns(history.moves, injection), default=None),
    )


def _api_back(answers: Sequence[Answer], injection: Injection) -> float | None:
    after = [answer.at for answer in answers if answer.at >= injection.ended and answer.status == 200]
    return min(after) - injection.ended if after else None


def _reruns(moves: Sequence[Move], injection: Injection) -> list[float]:
    """Seconds from the death of a worker until the jobs that it had were claimed again; endless if they were not."""
    by_job: dict[str, list[Move]] = defaultdict(list)
    for move in moves:
        by_job[move.job].append(move)
    found: list[float] = []
    for own in by_job.values():
        n = bisect_right(own, injection.ended, key=lambda move: move.at) - 1
        if n >= 0 and own[n].became == "processing" and own[n].worker in injection.killed:
            again = [move.at for move in own[n + 1 :] if move.became == "processing"]
            # a job that was lost for the third time ends instead
            if again or own[-1].became == "processing":
                found.append(min(again, default=float("inf")) - injection.ended)
    return found


def judge(history: History, found: Sequence[Pace]) -> list[Violation]:
    """Bar R2: back at full rate within 10 s, a killed worker's jobs within its lease + 5 s, the API within 10 s."""
    violations = []
    for pace in found:
        what = pace.injection.what
        if pace.recovery is not None and pace.recovery > RECOVERY_SECONDS:
            text = f"{what}: full rate {pace.recovery:.1f} s after its end, not within {RECOVERY_SECONDS:g} s"
            violations.append(Violation("recovery", "", text))
        if pace.rerun is not None and pace.rerun > history.lease + RERUN_GRACE:
            text = f"{what}: a job of the killed worker ran again after {pace.rerun:.1f} s, not within the lease + 5 s"
            violations.append(Violation("rerun", "", text))
        asked_until = max((answer.at for answer in history.answers), default=0.0)
        was_asked = asked_until - pace.injection.ended > RECOVERY_SECONDS
        if (was_asked and pace.api is None) or (pace.api or 0.0) > RECOVERY_SECONDS:
            since = "never" if pace.api is None else f"after {pace.api:.1f} s"
            violations.append(Violation("api", "", f"{what}: the API answered 200 again {since}"))
    return violations
