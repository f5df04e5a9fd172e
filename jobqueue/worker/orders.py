"""Orders at once: while a handler runs for longer than a moment, listen for changes of its job.

What is asked of a job (cancel, pause) comes with the next heartbeat, within 5 s. A notification makes the heartbeat come
now. A worker whose jobs take milliseconds never listens, so that it costs the senders nothing; and without LISTEN
(PgBouncer) the heartbeat alone brings the orders.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Container, Iterable
from typing import Any

import psycopg
from psycopg import AsyncConnection, Notify

from jobqueue.database.pool import connect_async
from jobqueue.worker.resilience import Backoff

LONG_SECONDS = 0.5
"""A handler that runs longer than this is worth listening for."""
LOOK_SECONDS = 0.25
LISTEN_ON_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Orders:
    """The loop that listens. `long_running`: ids of jobs whose handlers have been running for long; `beat`: beat now.

    `own`: the server processes of this worker's connections that send progress. What it said itself is no order: with a
    beat for each, a watched job's report would cost two commits, and a thousand jobs' far more.
    """

    def __init__(
        self,
        dsn: str | None,
        long_running: Callable[[], Iterable[str]],
        beat: Callable[[], None],
        own: Container[int] = (),
    ) -> None:
        self._dsn = dsn
        self._own = own
        self._long_running = long_running
        self._beat = beat
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; without a direct connection there is nothing to do."""
        if self._dsn is not None:
            self._task = asyncio.create_task(self._loop(self._dsn), name="jobqueue-orders")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _loop(self, dsn: str) -> None:
        backoff = Backoff()
        while True:
            while not any(True for _ in self._long_running()):
                await asyncio.sleep(LOOK_SECONDS)
            try:
                async with await connect_async(dsn, "jobqueue orders") as connection:
                    await self._listen(connection)
                backoff.reset()
            except Exception as error:
                if not isinstance(error, psycopg.Error | OSError):
                    logger.warning("listening for orders failed: %s", error)
                await asyncio.sleep(backoff.next())

    async def _listen(self, connection: AsyncConnection[Any]) -> None:
        await connection.execute("listen jobqueue_jobs")
        # What was asked before we listened is found by one beat.
        self._beat()
        loop = asyncio.get_running_loop()
        needed = loop.time()
        while loop.time() - needed < LISTEN_ON_SECONDS:
            async for notification in connection.notifies(timeout=1.0):
                self._heard(notification)
            if any(True for _ in self._long_running()):
                needed = loop.time()

    def _heard(self, notification: Notify) -> None:
        if notification.pid in self._own:
            return
        try:
            changed = {entry[0] for entry in json.loads(notification.payload)}
        except (ValueError, TypeError, IndexError):
            return
        if not changed.isdisjoint(self._long_running()):
            self._beat()
