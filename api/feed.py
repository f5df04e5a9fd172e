"""What streams show, read once for all streams of a process.

```
job streams     ─►  job(id): asked for within 5 ms, read in one statement
tenant streams  ─►  subscribe(tenants): the hub hears that jobs changed ─► every 0.25 s one statement reads them ─► each
                    subscriber gets those of its tenants; one that does not keep up is told to read again (resync)
                    summary(tenants): computed once for all subscribers of the same tenants
```

No stream holds a database connection. Without LISTEN (behind a pooler) tenant streams say resync every 5 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from jobqueue.api.database import Database
from jobqueue.api.hub import CHECK_EVERY, Hub
from jobqueue.api.identity import ALL_TENANTS
from jobqueue.errors import JobqueueError

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.005
"""Streams whose jobs changed within this time share a statement."""
SIGNALS_EVERY = 0.25
SUMMARY_EVERY = 2.0
SUMMARY_SHARE = 20
"""A summary that takes long is computed again no sooner than after this many times its own duration."""
MOST_PENDING = 500
"""Signals that a stream may have waiting; with more it is told to read again."""
IDS_PER_QUERY = 500
WATCH_EVERY = 20.0

_SNAPSHOTS = "select id::text, version, status, alive, body from jobqueue.http_snapshots(%s, %s::uuid[])"
_SIGNALS = "select id::text, tenant, signal from jobqueue.http_signals(%s, %s::uuid[])"
_SUMMARY = "select jobqueue.http_summary(%s, %s)"


class Snapshot(NamedTuple):
    """A job as an event shows it; `body` is JSON text."""

    version: int
    status: str
    alive: bool | None
    body: str


@dataclass(eq=False, slots=True)
class Subscriber:
    """One tenant stream: what it has not sent yet."""

    tenants: str
    pending: dict[str, str] = field(default_factory=dict)
    resync: bool = False
    summary_is_old: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def sees(self, tenant: str) -> bool:
        """Return whether a tenant's jobs are shown."""
        return self.tenants == ALL_TENANTS or tenant in self.tenants.split(",")

    def add(self, job_id: str, signal: str) -> None:
        """A job changed; only its latest state counts."""
        if len(self.pending) >= MOST_PENDING and job_id not in self.pending:
            self.miss()
        elif not self.resync:
            self.pending[job_id] = signal
        self.summary_is_old = True
        self.woken.set()

    def miss(self) -> None:
        """Something is not known any more: the client has to read again."""
        self.pending.clear()
        self.resync = self.summary_is_old = True
        self.woken.set()


class Feed:
    """The feed of one process; its tasks run only while somebody needs them."""

    def __init__(self, database: Database, hub: Hub) -> None:
        self._database = database
        self._hub = hub
        self._wanted: dict[str, asyncio.Future[Snapshot | None]] = {}
        self._subscribers: set[Subscriber] = set()
        self._changed: dict[str, int] = {}
        self._change = asyncio.Event()
        self._summaries: dict[str, tuple[float, asyncio.Task[str]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self.streams = 0
        """How many streams are open; streams.py counts them."""
        self.streams_of: Counter[str] = Counter()
        """The same by key."""
        hub.follow(self._hear)

    async def job(self, job_id: str) -> Snapshot | None:
        """Return a job as it is now, or None if it was deleted. Raises as the database does."""
        asked = self._wanted.get(job_id)
        if asked is None:
            asked = self._wanted[job_id] = asyncio.get_running_loop().create_future()
            if len(self._wanted) == 1:
                self._start(self._read_wanted())
        return await asyncio.shield(asked)

    async def summary(self, tenants: str) -> str:
        """Return how all is going for these tenants, as JSON text, at most 2 s old. Raises as the database does."""
        now = asyncio.get_running_loop().time()
        expires, task = self._summaries.get(tenants, (0.0, None))
        if task is None or (now >= expires and task.done()):
            task = asyncio.create_task(self._compute_summary(tenants))
            self._summaries[tenants] = now + SUMMARY_EVERY, task
        return await asyncio.shield(task)

    @contextmanager
    def subscribe(self, tenants: str) -> Iterator[Subscriber]:
        """Collect what changes for these tenants while inside."""
        subscriber = Subscriber(tenants)
        self._subscribers.add(subscriber)
        if not self._loops:
            self._loops = [asyncio.create_task(self._keep_watching()), asyncio.create_task(self._deliver())]
        self._start(self._watch(subscriber))
        try:
            yield subscriber
        finally:
            self._subscribers.discard(subscriber)
            if not self._subscribers:
                for loop in self._loops:
                    loop.cancel()
                self._loops, self._summaries = [], {}
                self._changed.clear()

    # -- Jobs ---------------------------------------------------------------------------------------------------------

    async def _read_wanted(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        wanted, self._wanted = self._wanted, {}
        ids = list(wanted)
        for start in range(0, len(ids), IDS_PER_QUERY):
            portion = ids[start : start + IDS_PER_QUERY]
            try:
                rows = await self._database.rows(_SNAPSHOTS, (self._database.role, portion), read_only=True)
            except Exception as error:
                for job_id in portion:
                    _fail(wanted[job_id], error)
                continue
            found = {job_id: Snapshot(*rest) for job_id, *rest in rows}
            for job_id in portion:
                if not wanted[job_id].done():
                    wanted[job_id].set_result(found.get(job_id))

    # -- Tenants ------------------------------------------------------------------------------------------------------

    def _hear(self, changes: list[tuple[str, int]] | None) -> None:
        if not self._subscribers:
            return
        if changes is None:
            for subscriber in self._subscribers:
                subscriber.miss()
            return
        self._changed.update(changes)
        self._change.set()

    async def _watch(self, subscriber: Subscriber) -> None:
        """Watch its tenants. What was being committed when that began is told to nobody, so it reads again after a second."""
        with contextlib.suppress(psycopg.Error, JobqueueError):
            if await self._hub.watch(_topics(subscriber)):
                await asyncio.sleep(1.0)
                subscriber.miss()

    async def _keep_watching(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY if self._hub.listening else CHECK_EVERY)
            if not self._hub.listening:
                self._hear(None)
            try:
                topics = {topic for subscriber in self._subscribers for topic in _topics(subscriber)}
                await self._hub.watch({"all"} if "all" in topics else topics)
            except (psycopg.Error, JobqueueError) as error:
                logger.warning("tenant streams cannot be watched now: %s", " ".join(str(error).split()))
                self._hear(None)

    async def _deliver(self) -> None:
        while True:
            await self._change.wait()
            self._change.clear()
            changed, self._changed = list(self._changed), {}
            try:
                for start in range(0, len(changed), IDS_PER_QUERY):
                    portion = changed[start : start + IDS_PER_QUERY]
                    rows = await self._database.rows(_SIGNALS, (self._database.role, portion), read_only=True)
                    self._hand_out(rows, portion)
            except (psycopg.Error, JobqueueError) as error:
                logger.warning("tenant streams cannot be fed now: %s", " ".join(str(error).split()))
                self._hear(None)
            await asyncio.sleep(SIGNALS_EVERY)

    def _hand_out(self, rows: list[tuple[str, str, str]], asked: list[str]) -> None:
        for job_id, tenant, signal in rows:
            for subscriber in self._subscribers:
                if subscriber.sees(tenant):
                    subscriber.add(job_id, signal)
        if len(rows) < len(asked):
            # Some were deleted, and whose they were is not known any more; only the counts change.
            for subscriber in self._subscribers:
                subscriber.summary_is_old = True
                subscriber.woken.set()

    async def _compute_summary(self, tenants: str) -> str:
        loop = asyncio.get_running_loop()
        began = loop.time()
        ((text,),) = await self._database.rows(_SUMMARY, (self._database.role, tenants), read_only=True)
        _, task = self._summaries.get(tenants, (0.0, None))
        if task is asyncio.current_task() and task is not None:
            took = loop.time() - began
            self._summaries[tenants] = loop.time() + max(SUMMARY_EVERY, SUMMARY_SHARE * took), task
        return str(text)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _topics(subscriber: Subscriber) -> set[str]:
    if subscriber.tenants == ALL_TENANTS:
        return {"all"}
    return {f"tenant:{tenant}" for tenant in subscriber.tenants.split(",")}


def _fail(asked: asyncio.Future[Snapshot | None], error: Exception) -> None:
    if not asked.done():
        asked.set_exception(error)
