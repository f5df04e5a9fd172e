"""The lease: one thread beats for all jobs that the worker holds, another watches that the beats arrive.

    beating   --- no beat has succeeded for lease - margin -->  fenced:  fence(True), no claims, handlers are cancelled
    fenced    --- a beat succeeds                          -->  beating: fence(False)

Both are threads, so that a handler that keeps the event loop busy cannot starve them. The beat runs on a connection of
its own, which the other thread cuts when a beat takes too long: no time-out of the network or the server would notice a
peer that takes the data and never answers. A beat counts from the moment it was sent, because the lease that it earns
cannot begin earlier. The database's clock decides about leases; here only durations are measured.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from psycopg import Connection, Error
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from jobqueue.database.pool import connect
from jobqueue.worker.resilience import Backoff, Plug, elapsed_clock
from jobqueue.worker.stuck import NONE_STUCK, Stuck

INTERVAL = 5.0
LEASE = 30.0
BEAT_TIMEOUT = 5.0
"""Seconds that one beat, or one attempt to connect, may take."""

STUCK = "select jobqueue.note_stuck(%s, %s, %s::jsonb)"
HEARTBEAT = "select id::text, command from jobqueue.heartbeat(%s, %s::jsonb)"

HeldJob = tuple[Any, Any, bool]
Order = tuple[str | None, str]

logger = logging.getLogger(__name__)


class Lease:
    """Heartbeats of one worker.

    `held` lists `(job id, claim token, started)` of every job the worker holds; it is called in the thread and must
    return a copy. `deliver` gets the orders of a beat, `(job id | None, cancel | pause | lost | drain)`; a job that
    ended since it was listed may be among them as `lost`. `fence` gets True when the worker must stop working, False
    when it may go on. Both are called in a thread and must neither block nor raise.

    `interval`: seconds between beats (5). `lease`: the shortest lease of the held jobs in seconds (30; may be lowered
    while it runs). `margin`: how long before its end the worker is fenced (a third of the lease).
    `stuck`: handlers that outlived their attempts, and the time to which their times belong; told when they change.
    `pooler`: the DSN goes through a transaction pooler.
    """

    def __init__(
        self,
        dsn: str,
        worker_id: UUID | str,
        held: Callable[[], Sequence[HeldJob]],
        deliver: Callable[[list[Order]], None],
        fence: Callable[[bool], None],
        *,
        interval: float = INTERVAL,
        lease: float = LEASE,
        margin: float | None = None,
        beat_timeout: float = BEAT_TIMEOUT,
        stuck: Callable[[], tuple[Stuck, float]] | None = None,
        pooler: bool = False,
    ) -> None:
        self.lease = lease
        self._dsn = dsn
        self._worker_id = str(worker_id)
        self._held, self._deliver, self._fence = held, deliver, fence
        self._interval = interval
        self._margin = margin
        self._beat_timeout = beat_timeout
        self._stuck = stuck
        self._told: Stuck | None = NONE_STUCK
        self._pooler = pooler
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._ring = threading.Event()
        self._backoff = Backoff()
        self._connection: Connection[Any] | None = None
        self._plug: Plug | None = None
        self._last_good = 0.0
        self._beat_began: float | None = None
        self._fenced = False
        self._failing = False
        self._threads: list[threading.Thread] = []

    @property
    def fenced(self) -> bool:
        """Whether the worker must not work, because its leases may be over."""
        return self._fenced

    @property
    def silent_for(self) -> float:
        """Seconds since the last beat that succeeded was sent."""
        return elapsed_clock() - self._last_good

    def start(self) -> None:
        """Begin to beat, at once and then every `interval` seconds."""
        self._last_good = elapsed_clock()
        loops = {"beat": self._loop, "watch": self._watch}
        self._threads = [
            threading.Thread(target=target, name=f"jobqueue-{name}", daemon=True) for name, target in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    def beat_now(self) -> None:
        """Beat as soon as possible, instead of when it is due."""
        self._ring.set()

    def stop(self) -> None:
        """Stop beating. Returns when the threads have ended, at the latest after the time that one beat may take."""
        self._stopping.set()
        self._ring.set()
        self._cut()
        for thread in self._threads:
            thread.join(timeout=self._beat_timeout + 1)

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self._ring.clear()
                began = elapsed_clock()
                # From the beginning of a beat to that of the next: after one that took long the lease is half over already.
                pause = self._pause_since(began) if self._beat_safely() else self._backoff.next()
                self._ring.wait(pause)
        finally:
            self._disconnect()

    def _pause_since(self, began: float) -> float:
        return max(self._interval - (elapsed_clock() - began), self._interval / 10)

    def _beat_safely(self) -> bool:
        """Beat once and return whether it succeeded. Nothing that goes wrong may end the thread."""
        began = elapsed_clock()
        with self._lock:
            self._beat_began = began
        try:
            sent, orders = self._beat()
        except Exception as error:
            self._disconnect()
            self._note_failure(error)
            return False
        finally:
            with self._lock:
                self._beat_began = None
        self._note_success(sent)
        if orders and not self._stopping.is_set():
            self._tell(self._deliver, orders)
        return True

    def _beat(self) -> tuple[float, list[Order]]:
        connection = self._connection or self._connect()
        sent = elapsed_clock()
        jobs = [{"id": str(id), "token": str(token), "started": started} for id, token, started in self._held()]
        orders: list[Order] = connection.execute(HEARTBEAT, (self._worker_id, json.dumps(jobs))).fetchall()
        self._tell_stuck(connection)
        return sent, orders

    def _tell_stuck(self, connection: Connection[Any]) -> None:
        """Tell of handlers that outlived their attempts, when they have changed. The beat counts whatever comes of it."""
        if self._stuck is None:
            return
        stuck, now = self._stuck()
        if stuck == self._told:
            return
        jobs = [{"id": j.id, "job_type": j.job_type, "why": j.why, "seconds": now - j.since} for j in stuck.jobs]
        try:
            connection.execute(STUCK, (self._worker_id, stuck.slots, json.dumps(jobs)))
        except Error as error:
            logger.info("the worker could not say what is stuck: %s", " ".join(str(error).split()))
        else:
            self._told = stuck

    def _connect(self) -> Connection[Any]:
        seconds = max(2, round(self._beat_timeout))  # libpq takes 1 as 2
        given = conninfo_to_dict(self._dsn)
        dsn = self._dsn if "connect_timeout" in given else make_conninfo(self._dsn, connect_timeout=seconds)
        connection = connect(dsn, "jobqueue heartbeat", pooler=self._pooler)
        with self._lock:
            self._connection, self._plug = connection, Plug(connection)
        if self._stopping.is_set():
            self._cut()
        if not self._pooler:
            # The server would otherwise keep waiting for a row lock after this end has given up.
            connection.execute(f"set statement_timeout = {int(self._beat_timeout * 1000)}".encode())
        return connection

    def _disconnect(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            plug, self._plug = self._plug, None
        if plug is not None:
            plug.close()
        if connection is not None:
            connection.close()
        if self._told != NONE_STUCK:
            # A worker that was away for long may be a new row by now.
            self._told = None

    def _cut(self) -> None:
        with self._lock:
            if self._plug is not None:
                self._plug.pull()

    def _note_success(self, sent: float) -> None:
        self._backoff.reset()
        with self._lock:
            self._last_good = sent
        if self._failing:
            self._failing = False
            logger.info("heartbeats arrive again", extra={"event": "db.restored"})
        # A beat that came back too late has earned nothing that still holds; the watch decides.
        self._set_fence(self.silent_for >= self._fence_after())

    def _note_failure(self, error: Exception) -> None:
        if self._stopping.is_set():
            return
        level = logging.DEBUG if self._failing else logging.WARNING
        self._failing = True
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.log(level, "a heartbeat failed, trying again: %s", reason, extra={"event": "db.lost"})

    def _watch(self) -> None:
        while not self._stopping.wait(self._watch_pause()):
            with self._lock:
                began = self._beat_began
            if began is not None and elapsed_clock() - began > self._beat_timeout:
                self._cut()
            if self.silent_for >= self._fence_after():
                self._set_fence(True)

    def _watch_pause(self) -> float:
        return min(0.25, self._beat_timeout / 4, self._fence_after() / 10)

    def _fence_after(self) -> float:
        margin = self.lease / 3 if self._margin is None else self._margin
        return max(self.lease - margin, 0.0)

    def _set_fence(self, fenced: bool) -> None:
        with self._lock:
            if self._fenced == fenced or self._stopping.is_set():
                return
            self._fenced = fenced
            # Told under the lock: the two threads must not tell it in the wrong order.
            self._tell(self._fence, fenced)
        if fenced:
            logger.error("no heartbeat for %.1f s: this worker stops its handlers", self.silent_for)

    def _tell(self, listener: Callable[[Any], None], news: object) -> None:
        try:
            listener(news)
        except Exception:
            # The event loop may be closed already when the worker ends in disorder.
            logger.exception("the worker could not be told: %r", news)
