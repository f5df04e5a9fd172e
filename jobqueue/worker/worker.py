"""The worker: one asyncio loop that claims, runs and settles, and a thread that proves that it lives.

claim ──► line of ready jobs ──► runners ──► settle
  ▲             (prefetch)        │  ▲          │
  └── room ◄──────────────────────┘  └─ orders ─┴── heartbeat thread (leases, cancel, pause, lost, drain)

starting ──► working ──► draining ──► stopped          fenced: while no heartbeat succeeds, nothing is claimed
                ▲ └► quiet (SIGUSR1)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from jobqueue import estimates
from jobqueue.database.migrations import check_schema_async
from jobqueue.database.pool import connect_async, is_pooled
from jobqueue.hooks import Hooks, WorkerInfo
from jobqueue.worker.channel import WorkerChannel
from jobqueue.worker.claim import Claimer
from jobqueue.worker.held import ClaimNote, Held, Stop
from jobqueue.worker.hooks import insist, make_job_hooks, tell
from jobqueue.worker.lease import Lease
from jobqueue.worker.maintain import Maintainer
from jobqueue.worker.orders import LONG_SECONDS, Orders
from jobqueue.worker.run import GRACE_SECONDS, Runner
from jobqueue.worker.settle import Settler
from jobqueue.worker.stuck import StuckHandlers
from jobqueue.worker.wake import Wake
from jobqueue.worker.warn import Warnings

if TYPE_CHECKING:
    from jobqueue.classify import Classifier
    from jobqueue.handlers import Handler
    from jobqueue.job import Claim
    from jobqueue.worker.process import ProcessPool

PREFETCH_SECONDS = 0.1
"""No more is prefetched than what the process has lately finished in this time."""
MOST_PREFETCHED = 1000
WAITED_TOO_LONG = 1.0
"""Seconds after which a prefetched job that has not started goes back, so that an idle worker can have it."""
TICK_SECONDS = 0.25

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is doing. `state`: starting, working, quiet, fenced, draining or stopped."""

    state: str
    running: int
    prefetched: int
    done: int
    failed: int
    unwritten: int
    listening: str
    stuck: int = 0
    """Handlers that go on although their attempts have ended; not among those that run."""


class Worker:
    """Works on the jobs of some queues until it is stopped.

    `handlers`: by job_type; only these job_types are claimed. `queues`: names; None: all queues. `concurrency`: handlers
    that may wait at the same time (100). `drain_timeout`: seconds that running handlers get when it stops (60).
    `listen_dsn`: a direct connection for LISTEN, if `dsn` leads through a pooler (`pooler=True`). `start_timeout`: seconds
    to wait for the database at the start. `until_idle`: end when nothing is ready and nothing runs. `hooks`: of the app.
    """

    def __init__(
        self,
        dsn: str,
        handlers: Mapping[str, Handler],
        *,
        queues: Sequence[str] | None = None,
        concurrency: int = 100,
        until_idle: bool = False,
        drain_timeout: float = 60.0,
        start_timeout: float = 60.0,
        listen_dsn: str | None = None,
        pooler: bool = False,
        poll: float = 5.0,
        name: str | None = None,
        classify: Classifier | None = None,
        processes: ProcessPool | None = None,
        on_ready: Callable[[], None] | None = None,
        on_beat: Callable[[], None] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.id: UUID = uuid4()
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._dsn, self._pooler, self._poll = dsn, pooler, poll
        self._listen_dsn = listen_dsn or (None if pooler else dsn)
        self._handlers = handlers
        self._queues = list(queues) if queues is not None else None
        self._concurrency = concurrency
        self._until_idle = until_idle
        self._drain_timeout, self._start_timeout = drain_timeout, start_timeout
        self._classify, self._processes = classify, processes
        self._on_ready, self._on_beat = on_ready, on_beat
        self._hooks = hooks if hooks is not None else Hooks()
        self._info = WorkerInfo(self.id, self.name, tuple(queues) if queues is not None else None, concurrency)
        self.held: dict[str, Held] = {}
        self._listed: dict[str, str] = {}
        self._state = "starting"
        self._fenced = False
        self._quiet = self._more_suspects = False
        self._done = self._failed = 0
        self._rate = 0.0
        self._flushed_at = 0.0
        self._flush_log: deque[tuple[float, int]] = deque(maxlen=64)
        self._most_batch = max((handler.batch_size for handler in handlers.values()), default=1)
        self._stop_asked = asyncio.Event()
        self._release_asked = asyncio.Event()
        self._room = asyncio.Event()
        self._nothing_held = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `drain` is called, or, with `until_idle`, until there is nothing to do.

        Raises DatabaseUnavailable, ServerTooOld, SchemaOutdated or SchemaTooNew before anything is claimed.
        """
        self._loop = asyncio.get_running_loop()
        await self._register()
        await insist(self._hooks.of("on_worker_start"), self._info)
        self._build()
        self._start()
        self._state = "working"
        claiming = asyncio.create_task(self._claimer.run(), name="jobqueue-claim")
        ticking = asyncio.create_task(self._tick(), name="jobqueue-tick")
        asked = asyncio.create_task(self._stop_asked.wait())
        try:
            if self._on_ready is not None:
                self._on_ready()
            await asyncio.wait({claiming, asked, ticking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, ticking):
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception()  # type: ignore[misc]
        finally:
            await self._shut_down(claiming, ticking, asked)

    def drain(self) -> None:
        """Claim nothing any more, let running handlers finish, then end; after `drain_timeout` their jobs are released."""
        self._stop_asked.set()

    def release_now(self) -> None:
        """Do not wait for running handlers any longer: stop them and give their jobs back."""
        self._stop_asked.set()
        self._release_asked.set()

    def quiet(self) -> None:
        """Claim nothing any more, but stay."""
        self._quiet = True

    def status(self) -> WorkerStatus:
        """What it is doing now."""
        runner = self._runner if self._state != "starting" else None
        running = sum(not held.settled for held in runner.running) if runner is not None else 0
        unwritten = sum(held.settled for held in self.held.values())
        state = self._state
        if state == "working":
            state = "fenced" if self._fenced else "quiet" if self._quiet else state
        return WorkerStatus(
            state, running, max(0, len(self.held) - running - unwritten), self._done, self._failed, unwritten,
            self._wake.status if runner is not None else "connecting", len(runner.stuck) if runner is not None else 0,
        )  # fmt: skip

    async def _register(self) -> None:
        connection = await connect_async(self._dsn, "jobqueue worker", pooler=self._pooler, timeout=self._start_timeout)
        async with connection:
            self._pooler = is_pooled(connection)
            await check_schema_async(connection)
            info = {
                "name": self.name, "hostname": socket.gethostname(), "pid": os.getpid(), "version": _version(),
                "queues": self._queues, "job_types": sorted(self._handlers), "concurrency": self._concurrency,
            }  # fmt: skip
            await connection.execute("select jobqueue.register_worker(%s, %s)", (self.id, _json(info)))
            types = [handler.describe() for handler in self._handlers.values()]
            await connection.execute("select jobqueue.register_job_types(%s)", (_json(types),))
            if defaults := estimates.estimate_defaults(os.environ):
                await connection.execute(estimates.STORE, (_json(defaults),))

    def _build(self) -> None:
        id = str(self.id)
        self._wake = Wake(self._listen_dsn, self._queues, self._poll)
        self._job_hooks = hooks = make_job_hooks(self._hooks, self._handlers, self.held)
        failed, timed = hooks.failed if hooks is not None else None, self._hooks.timed
        self._settler = Settler(self._dsn, id, self._flushed, pooler=self._pooler, failed=failed, timed=timed)
        self._channel = WorkerChannel(self._dsn, id, self.held, self._deliver, pooler=self._pooler)
        self._runner = Runner(
            self._concurrency, self._settler, self._channel, self._changed,
            classify=self._classify, processes=self._processes, hooks=hooks,
        )  # fmt: skip
        self._claimer = Claimer(
            self._dsn, id, self._queues, sorted(self._handlers), self, self._wake, pooler=self._pooler,
            idle=self._is_over if self._until_idle else None, beat=self._on_beat, timed=timed,
        )  # fmt: skip
        self._lease = Lease(
            self._dsn, id, self._list_held,
            lambda orders: self._threadsafe(self._deliver, self._of_listed(orders)),
            lambda fenced: self._threadsafe(self._fence, fenced),
            stuck=lambda: (self._stuck.now, self._loop.time()), pooler=self._pooler,
        )  # fmt: skip
        self._warnings = Warnings(self._hooks)
        self._stuck = StuckHandlers(self._concurrency)
        self._maintainer = Maintainer(
            lambda: connect_async(self._dsn, "jobqueue maintenance", pooler=self._pooler),
            id, self._queues, self._wake.ring, poll=self._poll, look=self._warnings.look,
        )  # fmt: skip
        heard = self._listen_dsn if self._listen_dsn != self._dsn or not self._pooler else None
        self._orders = Orders(heard, self._long_running, self._lease.beat_now, self._channel.backends)

    def _start(self) -> None:
        self._lease.start()
        self._settler.start()
        self._channel.start()
        self._wake.start()
        self._maintainer.start()
        self._orders.start()

    async def _shut_down(self, claiming: asyncio.Task[None], *tasks: asyncio.Task[Any]) -> None:
        self._state = "draining"
        await tell(self._hooks.of("on_worker_stopping"), self._info)
        self._claimer.stop()
        self._room.set()
        for held in (*self._runner.ready, *self._runner.parked.values()):
            self._settler.release(held)
        self._runner.ready.clear()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.wait_for(claiming, timeout=10.0)
        await self._finish_running()
        for task in tasks:
            task.cancel()
        await self._settler.stop(max(5.0, self._drain_timeout / 4))
        await self._runner.close()
        if self._job_hooks is not None:
            await self._job_hooks.close(GRACE_SECONDS)
        await self._channel.stop()
        await self._maintainer.stop()
        await self._orders.stop()
        await self._wake.stop()
        if self._processes is not None:
            await self._processes.close()
        await asyncio.to_thread(self._lease.stop)
        await self._say_goodbye()
        await tell(self._hooks.of("on_worker_stopped"), self._info)
        self._state = "stopped"

    async def _finish_running(self) -> None:
        """Wait for the running handlers; then stop them and give their jobs back."""
        for held in list(self.held.values()):
            if not held.started:
                self._settler.release(held)
        released = asyncio.create_task(self._release_asked.wait())
        deadline = self._loop.time() + self._drain_timeout
        # Not for those that have outlived their attempts: what they still do is written nowhere.
        while self._has_work() and self._loop.time() < deadline and not released.done():
            await asyncio.wait({released}, timeout=0.05)
        released.cancel()
        for held in list(self._runner.running):
            held.ask_stop(Stop.RELEASE)
        grace = self._loop.time() + GRACE_SECONDS
        while any(not held.settled for held in self._runner.running) and self._loop.time() < grace:
            await asyncio.sleep(0.02)
        for held in list(self._runner.running):
            self._runner.end(held, None)

    def _has_work(self) -> bool:
        return any(held.outlived_at is None for held in self._runner.running)

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(5.0):
                connection = await connect_async(self._dsn, "jobqueue worker", pooler=self._pooler)
                async with connection:
                    await connection.execute("select jobqueue.stop_worker(%s)", (self.id,))
        except Exception as error:
            logger.info("the worker could not say that it stopped: %s", " ".join(str(error).split()))

    # -- room ------------------------------------------------------------------------------------------------------------

    def wanted(self) -> int:
        """Jobs to ask for now: free slots, and what can be prefetched; in portions, not one by one, if jobs are short."""
        if self._fenced or self._quiet or self._state != "working" or self._runner.stuck_slots >= self._concurrency:
            return 0
        unfinished = len(self._runner.ready) + len(self._runner.parked) + self._runner.busy_slots
        if len(self.held) - unfinished > 2 * MOST_PREFETCHED:
            return 0
        prefetch = max(min(MOST_PREFETCHED, int(self._rate * PREFETCH_SECONDS)), self._most_batch - 1)
        wanted = self._concurrency + prefetch - unfinished
        if prefetch and len(self._runner.ready) > prefetch // 2:
            wanted = 0
        # Those that have lost a worker come one by one: after one of them the next is asked for at once.
        return max(wanted, int(self._more_suspects and self.suspects_allowed() > 0))

    def free_slots(self) -> int:
        """Jobs that would start at once."""
        return max(0, self._concurrency - self._runner.busy_slots - len(self._runner.ready))

    def suspects_allowed(self) -> int:
        """A job that has lost a worker runs alone of its kind, and only where it starts at once: in a free slot, or in the
        next one of a process that finishes so many jobs that it will have one in no time. Else a line that never empties
        would keep it out for ever."""
        if any(held.claim.suspect for held in self.held.values() if not held.settled):
            return 0
        return int(self.free_slots() > 0 or self._rate * PREFETCH_SECONDS >= 1)

    def accept(self, claims: Sequence[Claim]) -> None:
        """Take over claimed jobs."""
        now = self._loop.time()
        if self.suspects_allowed() > 0:
            self._more_suspects = any(claim.suspect for claim in claims)
        notes: dict[int, ClaimNote] = {}
        taken: list[Held] = []
        for claim in claims:
            note = notes.get(claim.claim_id)
            if note is None:
                note = notes[claim.claim_id] = ClaimNote(claim.claim_id, 0)
            note.left += 1
            held = Held(claim, self._handlers[claim.job_type], note, now)
            self.held[held.id] = held
            taken.append(held)
        self._fit_lease(claims)
        if self._state != "working" or self._fenced:
            for held in taken:
                self._settler.release(held)
            return
        self._runner.start(taken)

    def _fit_lease(self, claims: Sequence[Claim]) -> None:
        """The fence must fall before the shortest lease ends; a claim's jobs share their queue's, unless they have options."""
        for claim in (claims[0], *(claim for claim in claims if claim.options is not None)):
            if claim.lease_until is not None and claim.started_at is not None:
                self._lease.lease = min(self._lease.lease, (claim.lease_until - claim.started_at).total_seconds())

    async def room(self) -> None:
        """Wait until `wanted` may have risen."""
        self._room.clear()
        if self.wanted() > 0:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll):
                await self._room.wait()

    def _changed(self) -> None:
        if not self._room.is_set() and self.wanted() > 0:
            self._room.set()

    def _is_over(self) -> bool:
        return not self.held

    def _flushed(self, jobs: Sequence[Held], done: int) -> None:
        now = self._loop.time()
        for held in jobs:
            if self.held.get(held.id) is held:
                del self.held[held.id]
        self._done += done
        self._failed += len(jobs) - done
        self._flush_log.append((now, len(jobs)))
        while len(self._flush_log) > 2 and now - self._flush_log[0][0] > 0.5:
            self._flush_log.popleft()
        span = max(now - self._flush_log[0][0], 0.02)
        self._rate = sum(count for at, count in self._flush_log if now - at <= 0.5) / span
        self._room.set()
        # The next job that has lost a worker waits for the end of this one; and the last one ends the worker.
        if any(held.claim.suspect for held in jobs) or (self._until_idle and not self.held):
            self._wake.ring()

    # -- orders ----------------------------------------------------------------------------------------------------------

    def _list_held(self) -> list[tuple[str, str, bool]]:
        listed = list(self.held.values())
        self._listed = {held.id: held.token for held in listed}
        return [(held.id, held.token, held.started) for held in listed]

    def _of_listed(self, orders: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
        """Without what is about attempts that have ended since the beat: the next one of the same job may be here already."""
        current = {id for id, token in self._listed.items() if (held := self.held.get(id)) and held.token == token}
        return [(id, command) for id, command in orders if id is None or id in current]

    def _long_running(self) -> Iterable[str]:
        now = self._loop.time()
        running = (held for held in self._runner.running if not held.settled)
        return [held.id for held in running if now - held.started_at > LONG_SECONDS]

    def _threadsafe(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, orders: list[tuple[str | None, str]]) -> None:
        for id, command in orders:
            if id is None:
                if command == "drain":
                    self.drain()
                continue
            held = self.held.get(id)
            if held is not None and not held.settled:
                self._order(held, command)

    def _order(self, held: Held, command: str) -> None:
        if command == "lost":
            if held.started:
                held.ask_stop(Stop.LOST)
                self._tell_lost(held)
            else:
                self._settler.forget(held)
        elif not held.started:
            self._settler.acknowledge(held)
        elif held.job is not None:
            held.job.deliver(command)
            if command == "cancel":
                held.ask_stop(Stop.CANCEL, interrupt=held.handler.executor == "async")

    def _fence(self, fenced: bool) -> None:
        """Without heartbeats the leases end and others take the jobs: stop before that happens."""
        if fenced == self._fenced:
            return
        self._fenced = fenced
        self._runner.held_back = fenced
        if fenced:
            logger.error("no heartbeat succeeds: stopping %d jobs before their leases end", len(self.held))
            for held in list(self.held.values()):
                if held.settled:
                    continue
                if held.started:
                    held.ask_stop(Stop.FENCED)
                    self._tell_lost(held)
                else:
                    self._settler.forget(held)
            self._runner.ready.clear()
            # The others lead to the same server, and some of them may be dead without knowing it, also afterwards.
            for user in (self._claimer, self._settler, self._channel, self._maintainer):
                user.cut()
        else:
            logger.warning("heartbeats succeed again: working on")
            self._room.set()

    def _tell_lost(self, held: Held) -> None:
        if self._job_hooks is not None:
            self._job_hooks.lost(held)

    async def _tick(self) -> None:
        while True:
            slept = self._loop.time()
            await asyncio.sleep(TICK_SECONDS)
            await self._warnings.blocked(self._loop.time() - slept - TICK_SECONDS)
            self._runner.watch()
            told = self._stuck.now
            for warning in self._stuck.look(self._runner.stuck, self._runner.stuck_slots, self._loop.time()):
                await self._warnings.warn(warning)
            if self._stuck.now != told:
                self._lease.beat_now()
            self._give_back_waiting()
            now = self._loop.time()
            if self._flush_log and now - self._flush_log[-1][0] > 0.5:
                self._rate *= 0.5
            self._changed()

    def _give_back_waiting(self) -> None:
        """Prefetched jobs behind slow ones go back, so that an idle worker can have them."""
        ready = self._runner.ready
        if not ready or self._runner.busy_slots < self._concurrency:
            return
        limit = self._loop.time() - WAITED_TOO_LONG
        if ready[0].arrived < limit:
            self._rate = 0.0
            for held in list(ready):
                self._settler.release(held)
            ready.clear()


def _json(value: Any) -> Jsonb:
    return Jsonb(value)


def _version() -> str:
    try:
        return version("jobqueue")
    except PackageNotFoundError:
        return "unknown"
