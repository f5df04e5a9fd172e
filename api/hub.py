"""Waiting for a job to change, without holding a connection.

```
wait()  ─►  waiter, by job id  ─►  one task looks after all of them:
                                     says that they watch (jobqueue.watch), then reads their versions in one query:
                                     at once, after 0.25 s, after 1 s, then every 5 s
NOTIFY jobqueue_jobs [[id, version], …]  ─►  one LISTEN connection per process  ─►  wakes the waiters of those ids,
                                                                                and tells the streams of tenants (feed.py)
```

No wake-up is lost: a change before the watch is found by the first reading, one that was being committed meanwhile (its
sender saw nobody watching) by the second or third, and all others are notified. The readings every 5 s are the floor
that holds without LISTEN (behind a pooler, or while that connection is away); `alive`, which changes without any
statement, is only found there.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import logging
import random
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psycopg

from jobqueue.api.database import Database
from jobqueue.errors import JobqueueError

logger = logging.getLogger(__name__)

CHANNEL = "jobqueue_jobs"
CHECK_AFTER = (0.25, 1.0)
CHECK_EVERY = 5.0
"""Seconds between the readings of one waiter; the first comes at once."""
GATHER_SECONDS = 0.01
"""Waiters that come within this time share their statements."""
MANY = 50
"""From this many jobs on everything is watched: one row instead of one per job."""
WATCH_SECONDS = 60.0
RENEW_BEFORE = 35.0
"""A wait lasts at most 30 s; a watch that ends sooner than this is renewed."""
IDS_PER_QUERY = 1000
MOST_WAITERS = 20_000
"""More than these are answered at once, as if they had not asked to wait."""
READERS = 32
"""Woken requests that read at the same time: as many as fill the statements that they share (reads.py)."""
LONGEST_BACKOFF = 5.0

_WATCH = "select jobqueue.http_watch(%s, %s, %s * interval '1 s')"
_VERSIONS = "select id::text, version, alive from jobqueue.http_versions(%s, %s::uuid[])"

_open_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


def end_all_waits() -> None:
    """Let every waiting request of this process answer now. Safe to call from a signal handler."""
    for hub in list(_open_hubs):
        hub.end_waits_soon()


@dataclass(eq=False, slots=True)
class Waiter:
    """One waiting request: what it has seen of its job, and how often it was looked after."""

    job_id: str
    version: int
    alive: bool | None
    woken: asyncio.Future[None] = field(repr=False)
    readings: int = 0


class Hub:
    """The waiters of one process. `start` and `stop` belong to the event loop; `wait` starts it if need be."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: dict[str, set[Waiter]] = {}
        self._due: list[tuple[float, int, Waiter]] = []
        self._number = itertools.count()
        self._arrival = asyncio.Event()
        self._watched: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: list[Callable[[list[tuple[str, int]] | None], None]] = []
        self.waiting = 0
        """How many requests wait."""
        self.reading = asyncio.Semaphore(READERS)
        """Turns of those who were woken to read their jobs."""
        self.ending = False
        self.listening = False

    def follow(self, tell: Callable[[list[tuple[str, int]] | None], None]) -> None:
        """Call `tell` with every `(id, version)` that is heard, and with None when something may have been missed."""
        self._followers.append(tell)

    def start(self) -> None:
        """Begin to listen and to look after waiters; does nothing if it runs."""
        if self._tasks or self.ending:
            return
        self._loop = asyncio.get_running_loop()
        _open_hubs.add(self)
        self._tasks = [asyncio.create_task(self._look_after(), name="hub: look after")]
        if self._database.can_listen:
            self._tasks.append(asyncio.create_task(self._listen(), name="hub: listen"))

    async def stop(self) -> None:
        """End all waits and close the connection."""
        self.end_waits()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        _open_hubs.discard(self)

    def end_waits(self) -> None:
        """Wake everybody, and let nobody wait any more: the process is going down."""
        self.ending = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                _wake(waiter)
        self._tell(None)

    def end_waits_soon(self) -> None:
        """The same from a signal handler or another thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.end_waits)

    async def wait(self, job_id: str, version: int, alive: bool | None, seconds: float) -> bool:
        """Wait until the job's version or `alive` is another one, at most `seconds`.

        Returns False when the time is over, else True: also when the job is gone or the process is going down.
        """
        if self.ending:
            return True
        if self.waiting >= MOST_WAITERS:
            return False
        self.start()
        waiter = Waiter(job_id, version, alive, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(job_id, set()).add(waiter)
        self.waiting += 1
        self._look_at(waiter, after=0.0)
        self._arrival.set()
        try:
            async with asyncio.timeout(seconds):
                await waiter.woken
        except TimeoutError:
            return False
        finally:
            self._forget(waiter)
        return True

    async def watch(self, topics: Iterable[str]) -> bool:
        """Be told of changes of these topics (`tenant:<name>`, `all`) for at least 25 s; call again to go on.

        Returns whether one of them was not watched until now: then what was being committed meanwhile is not notified.
        """
        now = asyncio.get_running_loop().time()
        wanted = [topic for topic in topics if self._watched.get(topic, 0.0) < now + RENEW_BEFORE]
        is_new = any(self._watched.get(topic, 0.0) <= now for topic in wanted)
        if wanted:
            await self._database.rows(_WATCH, (self._database.role, wanted, WATCH_SECONDS))
            self._watched.update(dict.fromkeys(wanted, now + WATCH_SECONDS))
        return is_new

    def _forget(self, waiter: Waiter) -> None:
        self.waiting -= 1
        waiter.woken.cancel()
        waiters = self._waiters[waiter.job_id]
        waiters.discard(waiter)
        if not waiters:
            del self._waiters[waiter.job_id]

    # -- Looking after waiters ----------------------------------------------------------------------------------------

    def _look_at(self, waiter: Waiter, after: float) -> None:
        when = asyncio.get_running_loop().time() + after
        heapq.heappush(self._due, (when, next(self._number), waiter))

    async def _look_after(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_next()):
                    await self._arrival.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._arrival.clear()
            waiters = self._take_due()
            if not waiters:
                continue
            try:
                await self._watch(waiters)
                await self._compare(waiters)
            except (psycopg.Error, JobqueueError) as error:
                logger.warning("waiting requests cannot be looked after now: %s", " ".join(str(error).split()))
                self._watched.clear()
                for waiter in waiters:
                    self._look_at(waiter, after=CHECK_AFTER[-1])

    def _seconds_to_next(self) -> float | None:
        return max(self._due[0][0] - asyncio.get_running_loop().time(), 0.0) if self._due else None

    def _take_due(self) -> list[Waiter]:
        now = asyncio.get_running_loop().time()
        due = []
        while self._due and self._due[0][0] <= now:
            waiter = heapq.heappop(self._due)[2]
            if not waiter.woken.done():
                due.append(waiter)
        return due

    async def _watch(self, waiters: list[Waiter]) -> None:
        now = asyncio.get_running_loop().time()
        self._watched = {topic: until for topic, until in self._watched.items() if until > now}
        await self.watch({"all"} if len(self._waiters) >= MANY else {f"job:{waiter.job_id}" for waiter in waiters})

    async def _compare(self, waiters: list[Waiter]) -> None:
        """Read the jobs, wake those who have seen something else of theirs, and plan the next reading of the others."""
        ids = list({waiter.job_id for waiter in waiters})
        found: dict[str, tuple[int, bool | None]] = {}
        for start in range(0, len(ids), IDS_PER_QUERY):
            portion = ids[start : start + IDS_PER_QUERY]
            rows = await self._database.rows(_VERSIONS, (self._database.role, portion), read_only=True)
            found.update({job_id: (version, alive) for job_id, version, alive in rows})
        for waiter in waiters:
            if found.get(waiter.job_id) != (waiter.version, waiter.alive):
                _wake(waiter)
            elif not waiter.woken.done():
                delay = CHECK_AFTER[waiter.readings] if waiter.readings < len(CHECK_AFTER) else CHECK_EVERY
                waiter.readings += 1
                self._look_at(waiter, after=delay)

    # -- Listening ----------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        backoff = 0.1
        while True:
            try:
                async with await self._database.connect_listener() as connection:
                    await connection.execute(f"listen {CHANNEL}")
                    self.listening, backoff = True, 0.1
                    self._look_at_all()
                    async for notification in connection.notifies():
                        self._hear(notification.payload)
            except (psycopg.Error, JobqueueError) as error:
                logger.warning("not listening now: %s", " ".join(str(error).split()))
            finally:
                self.listening = False
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            backoff = min(backoff * 2, LONGEST_BACKOFF)

    def _look_at_all(self) -> None:
        """After a time without notifications all are looked at again; the watches may have been lost in a crash."""
        self._watched.clear()
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._look_at(waiter, after=0.0)
        self._arrival.set()
        self._tell(None)

    def _tell(self, changes: list[tuple[str, int]] | None) -> None:
        for tell in self._followers:
            tell(changes)

    def _hear(self, payload: str) -> None:
        try:
            changes = [(job_id, version) for job_id, version in json.loads(payload)]
            for job_id, version in changes:
                for waiter in self._waiters.get(job_id, ()):
                    if version > waiter.version:
                        _wake(waiter)
            self._tell([(job_id, version) for job_id, version in changes if isinstance(job_id, str)])
        except (ValueError, TypeError):
            # Anybody may notify on any channel.
            logger.warning("a notification on %s is not one of jobqueue's", CHANNEL)


def _wake(waiter: Waiter) -> None:
    if not waiter.woken.done():
        waiter.woken.set_result(None)
