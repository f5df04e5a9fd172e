"""Waking: an idle worker sleeps until a job may be ready, and costs the senders next to nothing.

A NOTIFY takes a lock of the whole cluster, so senders notify only if somebody holds the lock (27249, queue number) in
shared mode. If every idle worker did, each send would wake them all. So those with the same queues wait at a door, and
only the one that holds it, the doorman, listens and is armed:

    out --wait()--> at the door --granted--> armed --notified--> claiming --wait() again--> armed …
     ^                   |                     |                    |
     +------ busy() -----+------- busy() ------+------ busy() ------+      (the next one gets the door)

With ten idle workers this keeps 92 to 96 % of the sends per second of a database without notifications; waking all ten
keeps 19 to 53 %. A doorman that was woken less than 20 ms ago waits 10 ms before it is armed again: under load that
saves half of the notifications, a quiet queue does not feel it.

What a notification could miss, the ladder finds: after arming the worker claims once more, then after 50 ms, 250 ms,
1 s, and at every poll. A send that commits between its look at the lock and the worker's claim is the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection, sql

from jobqueue.database.pool import connect_async
from jobqueue.worker.resilience import Backoff, Plug, elapsed_clock

POLL = 5.0
LADDER = (0.05, 0.25, 1.0)
"""Seconds after arming at which the worker looks again."""
WOKEN_RECENTLY = 0.020
REARM_DELAY = 0.010
CANARY_TIMEOUT = 2.0
PROBE_AGAIN = 60.0
"""Seconds until a connection that brought no notification is tried again."""
LEAVE_TIMEOUT = 1.0

CHANNEL = "jobqueue_ready"
PREPARE = "set lock_timeout = '60s'; set statement_timeout = 0"
DOOR = "select pg_advisory_lock(27250, hashtext(%s))"
ARM = """
    select q.number, pg_advisory_lock_shared(27249, q.number)
    from jobqueue.queue q where %(queues)s::text[] is null or q.name = any (%(queues)s) order by q.number
"""
DISARM = "select pg_advisory_unlock_shared(27249, n) from unnest(%s::int[]) n"

State = Literal["out", "at the door", "armed", "claiming"]
Status = Literal["connecting", "listening", "polling"]

logger = logging.getLogger(__name__)


class Wake:
    """Sleep and waking of one worker.

    `dsn`: a direct connection, for LISTEN and session locks; None: only polls. `queues`: those the worker claims from;
    None: all that exist when it is armed. `poll`: seconds between looks of an idle worker that nobody wakes (5).
    """

    def __init__(self, dsn: str | None, queues: Sequence[str] | None, poll: float = POLL) -> None:
        self._dsn = dsn
        self._queues = None if queues is None else sorted(set(queues))
        self._poll = poll
        self._bell = asyncio.Event()
        self._changed = asyncio.Event()
        self._idle = False
        self._asked = False
        self._notified = False
        self._state: State = "out"
        self._status: Status = "polling" if dsn is None else "connecting"
        self._rung = len(LADDER)
        self._lost: Exception | None = None
        self._connection: AsyncConnection[Any] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status:
        """`listening`: notifications arrive; `polling`: they do not, jobs are found within `poll` seconds."""
        return self._status

    @property
    def armed(self) -> bool:
        """Whether this worker is the doorman and senders notify it."""
        return self._state == "armed"

    def start(self) -> None:
        """Connect in the background; needs a running event loop."""
        if self._dsn is not None and self._task is None:
            self._task = asyncio.create_task(self._loop(self._dsn), name="jobqueue-wake")

    async def stop(self) -> None:
        """Leave the door and close the connection."""
        task, self._task = self._task, None
        if task is None:
            return
        # Closing frees all locks; asking first would take longer if the server does not answer.
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def wait(self) -> None:
        """Return when a claim is worth trying: rung, notified, armed just now, or time for another look."""
        self._idle = self._asked = True
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience()):
                await self._bell.wait()
        self._bell.clear()

    async def busy(self) -> None:
        """Going to work: hand the door to the next idle worker. Returns at once if it is not held or waited for."""
        if not self._idle:
            return
        self._idle = False
        self._changed.set()
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT):
                await self._leave()
        except (TimeoutError, psycopg.Error):
            # An answer is not worth waiting for: without a connection no lock is held.
            self._fail(TimeoutError("the server did not answer"))

    def ring(self) -> None:
        """Wake this worker: something in this process knows of work. Only from the event loop's thread."""
        self._bell.set()

    def _patience(self) -> float:
        if self._state in ("armed", "claiming") and self._rung < len(LADDER):
            self._rung += 1
            return LADDER[self._rung - 1]
        # Spread a little, so that workers that were started together do not look together.
        return self._poll * random.uniform(0.9, 1.0)

    async def _leave(self) -> None:
        # The door may be granted while the request is being cancelled: the loop frees it then.
        while self._state != "out" and not self._idle:
            if self._state == "at the door" and self._connection is not None:
                await self._connection.cancel_safe(timeout=LEAVE_TIMEOUT)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._changed.wait()

    def _fail(self, error: Exception) -> None:
        self._lost = error
        if self._connection is not None:
            plug = Plug(self._connection) if not self._connection.closed else None
            if plug is not None:
                plug.pull()
                plug.close()
        self._changed.set()

    async def _loop(self, dsn: str) -> None:
        backoff = Backoff()
        while True:
            try:
                async with self._connected(dsn) as connection:
                    if not await self._hears(dsn, connection):
                        await self._only_poll()
                    else:
                        self._listening()
                        backoff.reset()
                        await self._serve(connection)
            except Exception as error:
                self._disconnected(error)
            await asyncio.sleep(backoff.next() if self._status == "connecting" else PROBE_AGAIN)

    @contextlib.asynccontextmanager
    async def _connected(self, dsn: str) -> AsyncIterator[AsyncConnection[Any]]:
        connection = await connect_async(dsn, "jobqueue wake")
        try:
            self._lost = None
            self._notified = False
            self._connection = connection
            connection.add_notify_handler(self._hear)
            yield connection
        finally:
            self._connection = None
            self._set_state("out")
            await connection.close()

    def _listening(self) -> None:
        if self._status != "listening":
            logger.info("notifications arrive", extra={"event": "notify.restored"})
        self._status = "listening"

    async def _only_poll(self) -> None:
        self._status = "polling"
        logger.warning(
            "no notification arrives (a transaction pooler?): polling every %g s; JOBQUEUE_LISTEN_DSN can name a "
            "direct connection",
            self._poll,
            extra={"event": "notify.gap"},
        )

    def _disconnected(self, error: Exception) -> None:
        if self._status != "connecting":
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("not woken by notifications until reconnected: %s", reason, extra={"event": "notify.gap"})
        self._status = "connecting"

    async def _hears(self, dsn: str, connection: AsyncConnection[Any]) -> bool:
        """Whether a notification sent by another connection arrives on this one."""
        canary = f"jobqueue_canary_{uuid4().hex}"
        name = sql.Identifier(canary)
        await connection.execute(sql.SQL("listen {}").format(name))
        # From the same connection it would come back even through a pooler, in the answer to the command itself.
        async with await connect_async(dsn, "jobqueue wake") as sender:
            await sender.execute(sql.SQL("notify {}").format(name))
        try:
            async with asyncio.timeout(CANARY_TIMEOUT):
                await self._until(connection, lambda: self._notified)
        except TimeoutError:
            return False
        self._notified = False
        await connection.execute(sql.SQL("unlisten {}").format(name))
        return True

    async def _serve(self, connection: AsyncConnection[Any]) -> None:
        await connection.execute(PREPARE.encode())
        while True:
            await self._until(connection, lambda: self._idle)
            if await self._take_door(connection):
                await connection.execute(f"listen {CHANNEL}".encode())
                await self._keep_door(connection)
                await connection.execute(f"unlisten {CHANNEL}".encode())
            await connection.execute(b"select pg_advisory_unlock_all()")
            self._set_state("out")

    async def _take_door(self, connection: AsyncConnection[Any]) -> bool:
        """Wait for the door; False if the worker went to work in the meantime."""
        key = ",".join(self._queues) if self._queues is not None else "*"
        while self._idle:
            self._set_state("at the door")
            try:
                await connection.execute(DOOR.encode(), (key,))
            except psycopg.errors.LockNotAvailable:
                continue
            except psycopg.errors.QueryCanceled:
                continue
            return True
        return False

    async def _keep_door(self, connection: AsyncConnection[Any]) -> None:
        woken = 0.0
        while self._idle:
            if elapsed_clock() - woken < WOKEN_RECENTLY:
                await asyncio.sleep(REARM_DELAY)
            self._notified = False
            cursor = await connection.execute(ARM.encode(), {"queues": self._queues})
            numbers = [number for number, _ in await cursor.fetchall()]
            self._rung = 0
            self._set_state("armed")
            self._bell.set()
            await self._until(connection, lambda: self._notified or not self._idle)
            woken = elapsed_clock()
            self._asked = False
            self._set_state("claiming")
            if self._idle:
                self._bell.set()
                await connection.execute(DISARM.encode(), (numbers,))
                await self._until(connection, lambda: self._asked or not self._idle)

    def _set_state(self, state: State) -> None:
        self._state = state
        self._changed.set()

    def _hear(self, notification: psycopg.Notify) -> None:
        if notification.channel == CHANNEL and self._queues is not None and notification.payload not in self._queues:
            return
        self._notified = True
        self._changed.set()

    async def _until(self, connection: AsyncConnection[Any], condition: Callable[[], bool]) -> None:
        """Wait for a condition, reading notifications from the idle connection. Raises what the connection died of."""
        loop = asyncio.get_running_loop()
        descriptor = connection.fileno()
        # What came together with the last answer is read already and would not make the socket readable again.
        self._read(connection)
        loop.add_reader(descriptor, self._read, connection)
        try:
            while not condition():
                if self._lost is not None:
                    raise self._lost
                self._changed.clear()
                await self._changed.wait()
        finally:
            loop.remove_reader(descriptor)

    def _read(self, connection: AsyncConnection[Any]) -> None:
        try:
            connection.pgconn.consume_input()
            while (found := connection.pgconn.notifies()) is not None:
                self._hear(psycopg.Notify(found.relname.decode(), found.extra.decode(), found.be_pid))
        except psycopg.Error as error:
            asyncio.get_running_loop().remove_reader(connection.fileno()) if not connection.closed else None
            self._lost = error
            self._changed.set()
