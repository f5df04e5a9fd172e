"""How queues do over time: `await app.queue_stats("indexing", since=timedelta(hours=6), bucket=timedelta(minutes=5))`."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from jobqueue import client
from jobqueue.errors import InvalidArgument

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What happened in one bucket of time. Durations are in seconds; percentiles are within 4.9 %.

    The times are over the attempts that ended in the bucket, completed or failed; None if there were none. How many jobs
    stand where is sampled once a minute while a worker runs, and a bucket has the most of its minutes (the one that is
    now: what is now); None if nobody looked. Counts of standing jobs go no further than 100,000.
    """

    begins_at: datetime
    ends_at: datetime
    sent: int
    """Jobs that were sent and were still there a minute later, without those with an id of the sender's choice."""
    completed: int
    failed: int
    """Jobs that ended as failed."""
    failed_attempts: int
    """Attempts that failed, whether a retry followed or not."""
    retried: int
    throughput: float
    """Completed jobs per second."""
    wait_mean: float | None
    """From being due to the claim."""
    wait_p50: float | None
    wait_p95: float | None
    wait_p99: float | None
    run_mean: float | None
    """From the claim to the end."""
    run_p50: float | None
    run_p95: float | None
    run_p99: float | None
    ready: int | None
    """Jobs that are due and wait for a worker or a limit."""
    scheduled: int | None
    blocked: int | None
    processing: int | None
    paused: int | None
    failed_jobs: int | None
    """Jobs that have ended as failed and are kept."""
    oldest_ready_seconds: float | None


QUEUE_STATS = f"""
    select {", ".join(field.name for field in fields(QueueStats))}
    from jobqueue.queue_stats(
        %s::text,
        coalesce(%s::timestamptz, coalesce(%s::timestamptz, jobqueue.now_minus('0 s')) - %s::interval),
        %s::timestamptz, %s::interval)
"""  # noqa: S608 - names of the class above


class Statistics:
    """The part of `App` that reads statistics."""

    if TYPE_CHECKING:

        def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]: ...
        def _lend_blocking(self, connection: Any) -> AbstractContextManager[Connection[Any]]: ...

    async def queue_stats(
        self,
        queue: str | None = None,
        *,
        since: datetime | timedelta | None = None,
        until: datetime | None = None,
        bucket: timedelta | None = None,
    ) -> list[QueueStats]:
        """Return one record per bucket, oldest first.

        `queue`: None for all together. `since`: an aware time, or how long before `until` (default 1 hour). `until`:
        default now. `bucket`: whole minutes (default 1); at most 10,000 buckets. Minutes are kept for 7 days, then hours
        for 90. Raises QueueNotFound, InvalidArgument.
        """
        parameters = stats_parameters(queue, since, until, bucket)
        async with self._lend(None) as lent:
            return [QueueStats(*row) for row in await client.fetch(lent, QUEUE_STATS, parameters)]

    def queue_stats_sync(
        self,
        queue: str | None = None,
        *,
        since: datetime | timedelta | None = None,
        until: datetime | None = None,
        bucket: timedelta | None = None,
    ) -> list[QueueStats]:
        """The blocking form of `queue_stats`."""
        parameters = stats_parameters(queue, since, until, bucket)
        with self._lend_blocking(None) as lent:
            return [QueueStats(*row) for row in client.blocking(client.fetch(lent, QUEUE_STATS, parameters))]


def stats_parameters(
    queue: str | None, since: datetime | timedelta | None, until: datetime | None, bucket: timedelta | None
) -> tuple[Any, ...]:
    """Return what SQL `queue_stats` takes. Raises InvalidArgument for a time without an offset."""
    back = since if isinstance(since, timedelta) else None
    since = None if isinstance(since, timedelta) else since
    for name, value in (("since", since), ("until", until)):
        if value is not None and value.utcoffset() is None:
            raise InvalidArgument(
                f"{name} has no time zone: {value.isoformat()}",
                hint="Give an aware datetime, for example datetime.now(timezone.utc).",
            )
    return queue, since, until, back, until, bucket
