"""Maintenance: puts jobs into the line when their time comes, sends the jobs of schedules at their ticks, and runs the
steps that keep the tables in order.

Every worker does all of it; the database hands each piece to one of them. An idle worker spends 0.53 statements a
second here (0.2 for promotion, 0.33 for maintenance), so that with its heartbeats and polls it stays under one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection

from jobqueue.worker.resilience import Backoff, cut, elapsed_clock

POLL = 5.0
MAINTAIN_EVERY = 3.0
"""Seconds between two maintenance calls of one worker. Rescue is due every 2 s and must happen within 5."""
MAINTAIN_AGAIN = 0.1
LONG_CALL = 0.1
"""Seconds after which a maintenance call leaves the steps that are still due to the next one."""
LOCKED_AGAIN = 0.25
LOOK_BACK_EVERY = 60.0
"""Every so often promotion also looks at what was due long ago: jobs that somebody else had locked at the time."""
LOOK_EVERY = 60.0
"""Seconds between two looks for something to warn of."""
PORTION = 1000
STATEMENT_TIMEOUT = 60.0

PROMOTE = """
    select promoted, jobqueue.seconds_until(next_due)
    from jobqueue.promote(%s, case when %s then null else jobqueue.now_minus('1 min') end)
"""
# Schedules are left to their own tick below: it is met to a few milliseconds and never waits for another step.
MAINTAIN = """
    select (sum(done) filter (where step <> 'schedules'))::bigint,
        jobqueue.seconds_until(min(next_due) filter (where done > 0 and step <> 'schedules')),
        (sum(done) filter (where step = 'schedules'))::bigint,
        jobqueue.seconds_until(jobqueue.next_tick()), jobqueue.maintenance_is_due()
    from jobqueue.maintain(%s)
"""
TICK = """
    select sent, jobqueue.seconds_until(next_due) from jobqueue.run_schedules()
"""

logger = logging.getLogger(__name__)


class Maintainer:
    """Promotion, schedules and maintenance of one worker, on one connection.

    `connect` opens an autocommit connection. `queues` is only for the log. `promoted` is called, without arguments,
    after jobs have become ready. `poll`: the longest sleep in seconds (5), for jobs that others made wait. `look`: what
    to do with the connection every `look_every` seconds (60), for warnings.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[AsyncConnection[Any]]],
        worker_id: UUID | str,
        queues: Sequence[str] | None,
        promoted: Callable[[], None],
        *,
        poll: float = POLL,
        look: Callable[[AsyncConnection[Any]], Awaitable[None]] | None = None,
        look_every: float = LOOK_EVERY,
    ) -> None:
        self._connect = connect
        self._worker_id = str(worker_id)
        self._queues = queues
        self._promoted = promoted
        self._poll = poll
        self._look, self._look_every = look, look_every
        self._look_at = math.inf if look is None else elapsed_clock() + look_every
        self._ring = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: AsyncConnection[Any] | None = None
        self._promote_at = 0.0
        self._maintain_at = 0.0
        self._look_back_at = 0.0
        self._tick_at = math.inf

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.create_task(self._loop(), name="jobqueue-maintain")

    async def stop(self) -> None:
        """End, also in the middle of a statement; the database rolls it back and another worker takes over."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def ring(self) -> None:
        """Look again now: a job has been put off by this worker, and may be due before the one that is waited for."""
        self._ring.set()

    def cut(self) -> None:
        """Cut the connection, which may be dead; what is under way fails and is done again on another."""
        cut(self._connection)

    async def _loop(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with await self._connect() as connection:
                    self._connection = connection
                    while True:
                        await self._round(connection)
                        backoff.reset()
                        due = min(self._promote_at, self._maintain_at, self._tick_at, self._look_at)
                        await self._sleep(due - elapsed_clock())
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning("maintenance was interrupted, trying again: %s", reason)
                await asyncio.sleep(backoff.next())

    async def _round(self, connection: AsyncConnection[Any]) -> None:
        async with asyncio.timeout(STATEMENT_TIMEOUT):
            if self._ring.is_set() or elapsed_clock() >= self._promote_at:
                self._ring.clear()
                self._promote_at = elapsed_clock() + await self._promote(connection)
            if elapsed_clock() >= self._tick_at:
                await self._tick(connection)
            if elapsed_clock() >= self._maintain_at:
                await self._maintain(connection)
            if self._look is not None and elapsed_clock() >= self._look_at:
                self._look_at = elapsed_clock() + self._look_every
                await self._look(connection)

    async def _promote(self, connection: AsyncConnection[Any]) -> float:
        """Put the jobs that are due into the line and return the seconds until the next one is."""
        look_back = elapsed_clock() >= self._look_back_at
        promoted, due_in = await _row(connection, PROMOTE, (PORTION, look_back))
        if look_back and promoted < PORTION:
            self._look_back_at = elapsed_clock() + LOOK_BACK_EVERY
        if promoted:
            self._promoted()
        if promoted >= PORTION:
            return 0.0
        if due_in is None:
            return self._poll
        # Due, but not promoted: somebody else holds the row.
        return LOCKED_AGAIN if due_in <= 0 else min(float(due_in), self._poll)

    async def _maintain(self, connection: AsyncConnection[Any]) -> None:
        began = elapsed_clock()
        done, again_in, sent, tick_in, is_due = await _row(connection, MAINTAIN, (self._worker_id,))
        self._wait_for_tick(tick_in)
        if sent:
            self._promoted()
        pause = MAINTAIN_EVERY
        # Only after a long call of its own: what another worker is at is due as well.
        if is_due and elapsed_clock() - began > LONG_CALL:
            pause = MAINTAIN_AGAIN
        elif done:
            pause = min(max(again_in or 0.0, MAINTAIN_AGAIN), MAINTAIN_EVERY)
        self._maintain_at = elapsed_clock() + pause

    async def _tick(self, connection: AsyncConnection[Any]) -> None:
        """Send the jobs of the schedules that are due; each tick once, whichever worker comes first."""
        sent, tick_in = await _row(connection, TICK, ())
        self._wait_for_tick(tick_in)
        if sent:
            self._promoted()

    def _wait_for_tick(self, seconds: float | None) -> None:
        """Sleep until the earliest tick; a schedule that somebody makes earlier is seen with the next maintenance."""
        if seconds is None:
            self._tick_at = math.inf
        else:
            # Due, but not sent: another worker is at it, or more of them are due than one call sends.
            self._tick_at = elapsed_clock() + (seconds if seconds > 0 else LOCKED_AGAIN)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ring.wait()


async def _row(connection: AsyncConnection[Any], query: str, parameters: Sequence[Any]) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = await (await connection.execute(query.encode(), parameters)).fetchone()
    assert row is not None
    return row
