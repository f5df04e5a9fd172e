"""What works behind one stock procrastinate worker: claims ahead, settles in fenced batches, beats, listens, keeps house.

    fetch_job ──► ready (claimed ahead) ──► the stock worker runs the task ──► finish_job, retry_job ──► settler
                    ▲ claim, some at a time                                                               │ one flush
                    └───────────────────── what was finished lately in 0.1 s ◄───────────────────────────┘ at a time

The stock worker awaits its queries one by one, each a transaction; here a query only takes from a list or adds to one.
Nothing it holds is lost: claims have leases that a thread keeps alive, and every end names its claim token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any, cast
from uuid import UUID

from procrastinate import connector as procrastinate_connector
from psycopg.types.json import Jsonb

from jobqueue.classify import failure_of
from jobqueue.database.migrations import check_schema_async
from jobqueue.database.pool import connect_async
from jobqueue.job import Claim, Job, set_current_job
from jobqueue.json_text import NotStorable, to_json_text
from jobqueue.procrastinate.fetcher import Fetcher
from jobqueue.procrastinate.listening import Doorbell
from jobqueue.procrastinate.rows import NOTHING, job_row, needs_start
from jobqueue.procrastinate.settler import EndsSettler
from jobqueue.procrastinate.statements import Row
from jobqueue.worker.channel import WorkerChannel
from jobqueue.worker.held import ClaimNote, Held
from jobqueue.worker.lease import Lease
from jobqueue.worker.maintain import Maintainer
from jobqueue.worker.orders import LONG_SECONDS, Orders
from jobqueue.worker.resilience import DATABASE_AWAY, Backoff
from jobqueue.worker.wake import Wake

PREFETCH_SECONDS = 0.1
"""As in our own worker: no more is claimed ahead than what was lately finished in this time."""
MOST_AHEAD = 500
MOST_UNWRITTEN = 2000
WAITED_TOO_LONG = 1.0
"""Seconds after which what was claimed ahead and has not started goes back."""
TICK_SECONDS = 0.25
AWAY_SECONDS = 10.0
"""How long a fetch waits for a database that is away before it tells the worker that there is no job."""
LAST_FLUSH_SECONDS = 30.0
LAST_WORD_SECONDS = 5.0
START = "select jobqueue.procrastinate_start(%s, %s)"

logger = logging.getLogger(__name__)


class Backstage:
    """The part of a worker that procrastinate's own worker does not have. Made by `register_worker`.

    `id`: of the worker. `loads`: decodes the arguments of tasks.
    """

    def __init__(self, dsn: str, id: UUID, loads: Callable[[Any], Any]) -> None:
        self.id = id
        self.held: dict[str, Held] = {}
        self._dsn, self._loads = dsn, loads
        self._ready: deque[Held] = deque()
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._notify: Callable[[str, int], Any] | None = None
        self._doorbell: Doorbell | None = None
        self._fetcher: Fetcher | None = None
        self._finished: deque[tuple[float, int]] = deque(maxlen=64)
        self._written = asyncio.Event()
        self._draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        name = str(id)
        self._settler = EndsSettler(dsn, name, self._flushed)
        self._channel = WorkerChannel(dsn, name, self.held, self._deliver)
        self._lease = Lease(
            dsn, name, self._list_held,
            lambda orders: self._threadsafe(self._deliver, orders),
            lambda fenced: self._threadsafe(self._fence, fenced),
        )  # fmt: skip
        self._maintainer = Maintainer(lambda: connect_async(dsn, "jobqueue maintenance"), name, None, self._ring)
        self._orders = Orders(dsn, self._long_running, self._lease.beat_now)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Register the worker and begin. Raises SchemaOutdated, SchemaTooNew, DatabaseUnavailable."""
        connection = await connect_async(self._dsn, "jobqueue procrastinate")
        async with connection:
            await check_schema_async(connection)
            info = {
                "name": f"{socket.gethostname()}:{os.getpid()}", "hostname": socket.gethostname(), "pid": os.getpid(),
                "version": f"procrastinate {version('procrastinate')}",
            }  # fmt: skip
            await connection.execute("select jobqueue.register_worker(%s, %s)", (self.id, Jsonb(info)))
        self._lease.start()
        self._settler.start()
        self._channel.start()
        self._maintainer.start()
        self._orders.start()
        self._spawn(self._tick())

    async def stop(self) -> None:
        """Give back what has not started, write all ends, and say goodbye."""
        self._draining = True
        self._give_back()
        for held in list(self.held.values()):
            if not held.settled:
                self._settler.release(held)
        await self._settler.stop(LAST_FLUSH_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._channel.stop()
        await self._maintainer.stop()
        await self._orders.stop()
        if self._doorbell is not None:
            await self._doorbell.wake.stop()
        if self._fetcher is not None:
            await self._fetcher.close()
        await asyncio.to_thread(self._lease.stop)
        await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(5.0), await connect_async(self._dsn, "jobqueue procrastinate") as connection:
                await connection.execute("select jobqueue.stop_worker(%s)", (self.id,))
        except Exception as error:
            logger.info("the worker could not say that it stopped: %s", " ".join(str(error).split()))

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- fetch ---------------------------------------------------------------------------------------------------------

    async def fetch(self, queues: Iterable[str] | None) -> Row:
        """Return the next job as procrastinate's row; all None if there is none."""
        if self._doorbell is not None:
            self._doorbell.fetching()
        held: Held | None = None
        try:
            held = await self._next(None if queues is None else list(queues))
        finally:
            if self._doorbell is not None:
                await self._doorbell.fetched(held is not None)
        return NOTHING if held is None else job_row(held.claim, self.id, self._loads)

    async def _next(self, queues: list[str] | None) -> Held | None:
        while not self._draining:
            if not self._ready:
                await self._refill(queues)
            if not self._ready:
                return None
            held = self._ready.popleft()
            if not held.settled and await self._begin(held):
                return held
        return None

    async def _refill(self, queues: list[str] | None) -> None:
        while len(self.held) > MOST_UNWRITTEN:
            self._written.clear()
            await self._written.wait()
        deadline, backoff = self._loop.time() + AWAY_SECONDS, Backoff()
        fetcher = await self._fetcher_of(queues)
        while True:
            try:
                self._written.clear()
                unwritten = any(held.settled for held in self.held.values())
                self.accept(await fetcher.take(self.wanted()))
                if self._ready or not unwritten:
                    return
                # A retry may be among them, and a worker that is not to wait ends when it hears that there is no job.
                async with asyncio.timeout_at(deadline):
                    await self._written.wait()
            except TimeoutError:
                return
            except DATABASE_AWAY as error:
                await fetcher.close()
                logger.warning("claiming failed: %s", " ".join(str(error).split()), extra={"event": "db.lost"})
                if self._loop.time() > deadline:
                    return
                await asyncio.sleep(backoff.next())

    async def _fetcher_of(self, queues: list[str] | None) -> Fetcher:
        if self._fetcher is None or self._fetcher.given != queues:
            if self._fetcher is not None:
                await self._fetcher.close()
            self._fetcher = Fetcher(self._dsn, str(self.id), queues, self)
        return self._fetcher

    async def _begin(self, held: Held) -> bool:
        if needs_start(held.claim):
            rows = await self._channel.rows(cast(Job, None), START, held.id, held.token)
            if not rows[0][0]:
                self._settler.forget(held)
                return False
        held.started = True
        held.started_at = held.life = self._loop.time()
        held.job = Job(held.claim, self._channel)
        # The worker makes the task's own task from this context: `jobqueue.current_job()` works inside of it.
        set_current_job(held.job)
        return True

    # -- room, as the claims ask for it ---------------------------------------------------------------------------------

    def wanted(self) -> int:
        """Jobs to claim at once: the one that is asked for, and what will be asked for in the next tenth of a second."""
        return 1 + min(MOST_AHEAD - 1, int(self._rate() * PREFETCH_SECONDS))

    def free_slots(self) -> int:
        """One job starts at once."""
        return 1

    def suspects_allowed(self) -> int:
        """A job that has lost a worker is claimed only while no other such job is here."""
        return 0 if any(held.claim.suspect for held in self.held.values() if not held.settled) else 1

    def accept(self, claims: Sequence[Claim]) -> None:
        """Take over claimed jobs; suspects first, they were not meant to wait."""
        now = self._loop.time()
        notes: dict[int, ClaimNote] = {}
        for claim in claims:
            note = notes.setdefault(claim.claim_id, ClaimNote(claim.claim_id, 0))
            note.left += 1
            held = Held(claim, cast(Any, None), note, now)
            self.held[held.id] = held
            if claim.suspect:
                self._ready.appendleft(held)
            else:
                self._ready.append(held)
            if claim.lease_until is not None and claim.started_at is not None:
                self._lease.lease = min(self._lease.lease, (claim.lease_until - claim.started_at).total_seconds())

    async def room(self) -> None:
        """Never waited for: claims are made when they are asked for."""

    def _rate(self) -> float:
        """Jobs finished per second, lately."""
        now = self._loop.time()
        recent = [(at, count) for at, count in self._finished if now - at <= 0.5]
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.02) if recent else 0.0

    # -- ends ----------------------------------------------------------------------------------------------------------

    def runs(self, id: str) -> bool:
        """Whether this worker runs a job now."""
        held = self.held.get(id)
        return held is not None and held.started and not held.settled

    async def end(self, id: str, end: dict[str, Any]) -> None:
        """Queue the end of a job that this worker runs: it is written with the next flush, and refused if it was lost."""
        held = self.held[id]
        await self._last_word(id)
        outcome = self._outcomes.pop(id, {})
        if end["to"] == "succeeded" and not end.get("delete"):
            self._settler.complete(held, outcome.get("text"), held.job.stats_text() if held.job else None)
        else:
            error = {"error": outcome["error"]} if "error" in outcome else {}
            self._settler.fail(held, {**end, **error}, None)
        if held.claim.singleton_key is not None:
            # The next job of its lock may come before others that wait: only once the lock is free is another one fetched.
            await self._until_written(held)

    async def _last_word(self, id: str) -> None:
        """The latest progress of a job is stored before its end is."""
        try:
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await self._channel.flush(id)
        except Exception as error:
            logger.warning("job %s: its last progress was not stored: %r", id, error)

    async def _until_written(self, held: Held) -> None:
        while self.held.get(held.id) is held:
            self._written.clear()
            await self._written.wait()

    def note_outcome(
        self, id: str, result: Any, error: BaseException | None, dumps: Callable[[Any], str] | None = None
    ) -> None:
        """Remember what a task returned or raised, until its end is queued."""
        if not self.runs(id):
            return
        if error is not None:
            self._outcomes[id] = {"error": failure_of(error).as_error()}
        elif result is not None:
            try:
                text = to_json_text(json.loads((dumps or json.dumps)(result)))
            except (NotStorable, TypeError, ValueError) as problem:
                logger.warning("the result of job %s cannot be stored: %s", id, problem)
            else:
                self._outcomes[id] = {"text": text}

    def _flushed(self, jobs: Sequence[Held], done: int) -> None:
        for held in jobs:
            if self.held.get(held.id) is held:
                del self.held[held.id]
        self._finished.append((self._loop.time(), len(jobs)))
        self._written.set()
        self._maintainer.ring()
        if any(held.claim.suspect for held in jobs):
            self._ring()

    # -- what comes from outside -----------------------------------------------------------------------------------------

    async def listen(
        self, on_notification: procrastinate_connector.Notify, channel: str, queues: list[str] | None
    ) -> None:
        """Tell the stock worker of jobs and of orders to abort, until cancelled."""

        async def notify(kind: str, id: int) -> None:
            await on_notification(channel=channel, payload=json.dumps({"type": kind, "job_id": id}))

        self._notify = notify
        self._doorbell = Doorbell(Wake(self._dsn, queues))
        try:
            await self._doorbell.watch(notify)
        finally:
            self._notify = None

    def _ring(self) -> None:
        if self._doorbell is not None:
            self._doorbell.wake.ring()

    def _list_held(self) -> list[tuple[str, str, bool]]:
        return [(held.id, held.token, held.started) for held in list(self.held.values())]

    def _long_running(self) -> list[str]:
        now = self._loop.time()
        running = [held for held in self.held.values() if held.started and not held.settled]
        return [held.id for held in running if now - held.started_at > LONG_SECONDS]

    def _threadsafe(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, orders: list[tuple[str | None, str]]) -> None:
        for id, command in orders:
            if id is None:
                self._draining = self._draining or command == "drain"
                continue
            held = self.held.get(id)
            if held is None or held.settled or command == "pause":
                continue
            if not held.started:
                self._settler.forget(held) if command == "lost" else self._settler.acknowledge(held)
            else:
                self._abort(held)

    def _abort(self, held: Held) -> None:
        if held.job is not None:
            held.job.deliver("cancel")
        if self._notify is not None:
            self._spawn(self._notify("abort_job_requested", UUID(held.id).int))

    def _fence(self, fenced: bool) -> None:
        """Without heartbeats the leases end and others take the jobs: stop before that happens."""
        if not fenced:
            logger.warning("heartbeats succeed again: working on")
            return
        logger.error("no heartbeat succeeds: aborting %d jobs before their leases end", len(self.held))
        for held in list(self.held.values()):
            if held.settled:
                continue
            if held.started:
                self._abort(held)
            else:
                self._settler.forget(held)
        self._ready.clear()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._ready and self._ready[0].arrived < self._loop.time() - WAITED_TOO_LONG:
                self._finished.clear()
                self._give_back()

    def _give_back(self) -> None:
        for held in self._ready:
            self._settler.release(held)
        self._ready.clear()
