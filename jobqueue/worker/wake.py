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
from psycopg import AsyncConnection

from jobqueue.database.pool import connect_async
from jobqueue.worker.resilience import Backoff, Plug, elapsed_clock

POLL = 5.0
LADDER = (0.05, 0.25, 1.0)
"""Seconds after arming at which the worker looks again."""
WOKEN_RECENTLY = 0.020
REARM_DELAY = 0.010
CANARY_TIMEOUT = 10.0
PROBE_AGAIN = 60.0
"""Seconds until a connection that brought no notification is tried again."""
LEAVE_TIMEOUT = 1.0

CHANNEL = "jobqueue_ready"
CANARY = "jobqueue_canary"
"""One name for all canaries: a pooler keeps it on the sessions of the server."""
# The server is to notice a vanished worker as fast as the worker notices a vanished server: it may hold the door.
PREPARE = """
    set statement_timeout = 0; set lock_timeout = '900 ms'; set client_connection_check_interval = '10 s';
    set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3
"""
# A plain wait in pg_advisory_lock would hold a snapshot for as long as it lasts, and vacuum with it. So the wait is cut
# into transactions of 0.9 s: under deadlock_timeout, for no log_lock_waits line; errors that are caught are not logged.
WAIT_FOR_DOOR = """
do $$
begin
    loop
        begin
            perform pg_advisory_lock(27250, {key});
            return;
        exception
            when lock_not_available then null;
            when query_canceled then return;
        end;
        commit;
    end loop;
end
$$
"""
TRY_DOOR = "select hashtext(%s), pg_try_advisory_lock(27250, hashtext(%s))"
ARM = """
    select q.number, pg_advisory_lock_shared(27249, q.number)
    from jobqueue.queue_names() q where %(queues)s::text[] is null or q.name = any (%(queues)s) order by q.number
"""
DISARM = "select pg_advisory_unlock_shared(27249, n) from unnest(%s::int[]) n"
LISTEN = f"listen {CHANNEL}"
LEAVE = f"select pg_advisory_unlock_all(); unlisten {CHANNEL}"

State = Literal["out", "at the door", "inside", "armed", "claiming"]
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
        self._canary = ""
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
        if self._task is None:
            return
        await self.busy()
        task, self._task = self._task, None
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
        while self._state != "out":
            if self._state == "at the door" and self._connection is not None:
                await self._connection.cancel_safe(timeout=LEAVE_TIMEOUT)
            self._changed.clear()
            # Once more if nothing happens: the request may have come just before the statement that it was meant for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._changed.wait()

    def _fail(self, error: Exception) -> None:
        self._lost = error
        self._changed.set()
        if self._connection is not None and not self._connection.closed:
            plug = Plug(self._connection)
            plug.pull()
            plug.close()

    async def _loop(self, dsn: str) -> None:
        backoff = Backoff()
        while True:
            try:
                async with self._connected(dsn) as connection:
                    if await self._hears(dsn, connection):
                        self._set_status("listening")
                        backoff.reset()
                        await self._serve(connection)
                    self._set_status("polling")
            except Exception as error:
                self._set_status("connecting", error)
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

    def _set_status(self, status: Status, error: Exception | None = None) -> None:
        previous, self._status = self._status, status
        if status == previous:
            return
        if status == "listening":
            logger.info("notifications arrive", extra={"event": "notify.restored"})
        elif status == "polling":
            logger.warning(
                "no notification arrives (a transaction pooler?): polling every %g s; JOBQUEUE_LISTEN_DSN can name a "
                "direct connection",
                self._poll,
                extra={"event": "notify.gap"},
            )
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("not woken by notifications until reconnected: %s", reason, extra={"event": "notify.gap"})

    async def _hears(self, dsn: str, connection: AsyncConnection[Any]) -> bool:
        """Whether a notification sent by another connection arrives on this one."""
        self._canary = uuid4().hex
        await connection.execute(f"listen {CANARY}".encode())
        # From the same connection it would come back even through a pooler, in the answer to the command itself.
        async with await connect_async(dsn, "jobqueue wake") as sender:
            await sender.execute(f"notify {CANARY}, '{self._canary}'".encode())
        try:
            async with asyncio.timeout(CANARY_TIMEOUT):
                await self._until(connection, lambda: self._notified)
        except TimeoutError:
            return False
        self._notified = False
        await connection.execute(f"unlisten {CANARY}".encode())
        return True

    async def _serve(self, connection: AsyncConnection[Any]) -> None:
        await connection.execute(PREPARE.encode(), prepare=False)
        while True:
            await self._until(connection, lambda: self._idle)
            # busy() cancels the wait for the door; that may meet the statement after the one it was meant for.
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                await self._take_door(connection)
                await self._keep_door(connection)
            await self._free_door(connection)

    async def _take_door(self, connection: AsyncConnection[Any]) -> None:
        """Wait for the door, or until the worker goes to work."""
        name = ",".join(self._queues) if self._queues is not None else "*"
        while self._idle:
            key, mine = await _row(connection, TRY_DOOR, (name, name))
            if mine:
                return
            self._set_state("at the door")
            await connection.execute(WAIT_FOR_DOOR.format(key=key).encode(), prepare=False)
            self._set_state("inside")

    async def _keep_door(self, connection: AsyncConnection[Any]) -> None:
        """Be armed whenever the worker waits, until it goes to work."""
        woken = 0.0
        if self._idle:
            await connection.execute(LISTEN.encode())
        while self._idle:
            numbers = await self._arm(connection)
            await self._until(connection, lambda: self._notified or not self._idle)
            woken = elapsed_clock()
            self._asked = False
            self._set_state("claiming")
            if self._idle:
                self._bell.set()
                await connection.execute(DISARM.encode(), (numbers,))
                await self._until(connection, lambda: self._asked or not self._idle)
            if elapsed_clock() - woken < WOKEN_RECENTLY:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REARM_DELAY):
                        await self._until(connection, lambda: not self._idle)

    async def _arm(self, connection: AsyncConnection[Any]) -> list[int]:
        """Let senders notify this worker, have it claim once more, and return the numbers of its queues."""
        cursor = await connection.execute(ARM.encode(), {"queues": self._queues})
        numbers = [number for number, _ in await cursor.fetchall()]
        self._notified = False
        self._rung = 0
        self._set_state("armed")
        self._bell.set()
        return numbers

    async def _free_door(self, connection: AsyncConnection[Any]) -> None:
        while True:
            try:
                await connection.execute(LEAVE.encode(), prepare=False)
            except psycopg.errors.QueryCanceled:
                continue
            self._set_state("out")
            return

    def _set_state(self, state: State) -> None:
        self._state = state
        self._changed.set()

    def _hear(self, notification: psycopg.Notify) -> None:
        if notification.channel == CANARY and notification.payload != self._canary:
            return
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
            self._lost = error
            self._changed.set()


async def _row(connection: AsyncConnection[Any], query: str, parameters: Sequence[Any]) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = await (await connection.execute(query.encode(), parameters)).fetchone()
    assert row is not None
    return row
