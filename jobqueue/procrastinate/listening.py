"""How the stock worker hears of jobs: an idle worker sleeps at the door (worker/wake.py), a busy one costs senders nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from jobqueue.worker.wake import Wake

Notify = Callable[[str, int], Awaitable[None]]
"""Takes the kind of a notification (`job_inserted`, `abort_job_requested`) and a job's id (0: any)."""


async def listen(dsn: str, queues: Sequence[str] | None, notify: Notify) -> None:
    """Notify whenever a job may be ready, until cancelled; for programs that listen without being workers."""
    wake = Wake(dsn, queues)
    wake.start()
    try:
        while True:
            await wake.wait()
            await notify("job_inserted", 0)
    finally:
        await wake.stop()


class Doorbell:
    """Tells one stock worker that a fetch is worth trying; never while it is fetching.

    The stock worker forgets every notification that arrives before its fetch has returned (it clears its event
    afterwards). So one that comes meanwhile waits until the fetch is over and the worker has cleared its event.

        dry ── wake.wait(): armed, notified, rung ──► notify ──► the worker fetches ──► dry again, or busy
    """

    def __init__(self, wake: Wake) -> None:
        self.wake = wake
        self._dry = asyncio.Event()
        self._not_fetching = asyncio.Event()
        self._not_fetching.set()

    def fetching(self) -> None:
        """A fetch begins."""
        self._not_fetching.clear()

    async def fetched(self, found: bool) -> None:
        """A fetch ends."""
        if found:
            self._dry.clear()
            await self.wake.busy()
        elif not self._dry.is_set():
            self._dry.set()
            # A wait that began before the worker went to work is not armed: let it begin anew.
            self.wake.ring()
        # Only after the worker, which goes on as soon as this task returns, has cleared its event.
        asyncio.get_running_loop().call_soon(self._not_fetching.set)

    async def watch(self, notify: Notify) -> None:
        """Ring until cancelled."""
        self.wake.start()
        while True:
            await self._dry.wait()
            await self.wake.wait()
            await self._not_fetching.wait()
            await notify("job_inserted", 0)
