"""When a worker may send the progress of its jobs: a bucket of tokens, one for each flush.

Each flush is a notifying commit, and those stand in line behind each other in the whole server. So a worker with many
reporting jobs gets few (their reports share a flush), and one with few jobs gets one for nearly every report:

    jobs that report      1    5   10   20   45 and more
    flushes a second      9   20   40   20    9
"""

from __future__ import annotations

LEAST_RATE = 9.0
"""Flushes a second that every worker may do. With the heartbeats that is under 10 commits, however many jobs report."""
RATE_PER_JOB = 4.0
MOST_RATE = 40.0
JOBS_AT_MOST_RATE = 10
BURST = 4.0
"""Flushes that may follow each other at once after a quiet time."""
ROUNDING = 1e-9
"""After a wait of exactly the time that was asked for, the token is there, whatever the last bits say."""


def rate_of(jobs: int) -> float:
    """Return the flushes a second for so many reporting jobs; from ten jobs on, they share what ten have."""
    shared = MOST_RATE * JOBS_AT_MOST_RATE / max(jobs, JOBS_AT_MOST_RATE)
    return max(LEAST_RATE, min(RATE_PER_JOB * jobs, shared))


class Bucket:
    """Tokens that come back with time. `now`: seconds of any clock that does not go back."""

    __slots__ = ("_at", "_tokens")

    def __init__(self, now: float) -> None:
        self._tokens = BURST
        self._at = now

    def wait(self, now: float, jobs: int) -> float:
        """Return the seconds until a flush is allowed: 0 if it is; `jobs`: how many report."""
        rate = rate_of(jobs)
        self._tokens = min(BURST, self._tokens + (now - self._at) * rate)
        self._at = now
        missing = 1.0 - self._tokens
        return missing / rate if missing > ROUNDING else 0.0

    def take(self) -> None:
        """A flush begins."""
        self._tokens -= 1.0
