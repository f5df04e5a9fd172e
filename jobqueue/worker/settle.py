"""Settling: the ends of attempts, written by one flush at a time.

A lone result is flushed at once; results that arrive while a flush is under way go with the next one. That is one round
trip of latency when idle and hundreds of jobs per statement when busy, with no timer to tune. Nothing is dropped while
the database is away: a flush is repeated until it succeeds, and repeating a completion is harmless (`already`).

The database's note of a claim goes with the very last of its ends, in the same transaction: a job that is under way
without one is found by nobody. So an attempt of which nothing is written keeps its note, until rescue has looked.

A person may hold a job in an open transaction, for as long as it takes to have lunch. Its end is put aside and tried
again every second; the others are written meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
from psycopg import AsyncConnection, AsyncCursor

from jobqueue.database.pool import connect_async
from jobqueue.worker.held import ClaimNote, Held
from jobqueue.worker.resilience import DATABASE_AWAY, AnswerWatch, Backoff, cut
from jobqueue.worker.rows import prepare_rows

if TYPE_CHECKING:
    from jobqueue.hooks import Timed

MOST_PER_FLUSH = 1000
LOCK_TIMEOUT = "500ms"
"""How long a flush waits for a job that somebody else has locked. Under deadlock_timeout (1 s): no line in the log."""
ASIDE_TIMEOUT = "20ms"
ASIDE_SECONDS = 1.0
"""Seconds between two tries of an end that was put aside."""

# One function in the from clause, its first argument with a type: `patiently` relies on that.
SETTLE = (
    "select id, token, outcome from "
    "jobqueue.settle(%s::uuid, %s::uuid[], %s::uuid[], %s::jsonb[], %s::jsonb[], %s::bigint[])"
)
FAIL = "select id, outcome, status from jobqueue.fail_many(%s::jsonb)"
RELEASE = "select from jobqueue.release_many(%s::uuid[], %s::uuid[])"
SNOOZE = "select from jobqueue.snooze(%s::uuid, %s, %s)"
CANCEL_OWN = "select from jobqueue.cancel_own(%s::uuid, %s, %s)"
ACKNOWLEDGE = "select from jobqueue.acknowledge(%s::uuid, %s)"

_CALL = re.compile(r"from (?P<function>jobqueue\.\w+)\(%s::(?P<type>[\w\[\]]+)")

TOO_LARGE = {"class": "permanent", "code": "RESULT_TOO_LARGE", "message": "The result is too large to be stored."}

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Batch:
    """What one flush writes."""

    done: list[tuple[Held, str | None, str | None]] = field(default_factory=list)
    failed: list[tuple[Held, dict[str, Any], float | None]] = field(default_factory=list)
    released: list[Held] = field(default_factory=list)
    snoozed: list[tuple[Held, float]] = field(default_factory=list)
    acknowledged: list[Held] = field(default_factory=list)
    cancelled: list[tuple[Held, str]] = field(default_factory=list)
    forgotten: list[Held] = field(default_factory=list)

    def __len__(self) -> int:
        return (
            len(self.done)
            + len(self.failed)
            + len(self.released)
            + len(self.snoozed)
            + len(self.acknowledged)
            + len(self.cancelled)
            + len(self.forgotten)
        )

    def singles(self) -> list[Batch]:
        """The same in batches of one job."""
        return [
            *(Batch(done=[entry]) for entry in self.done),
            *(Batch(failed=[entry]) for entry in self.failed),
            *(Batch(released=[entry]) for entry in self.released),
            *(Batch(snoozed=[entry]) for entry in self.snoozed),
            *(Batch(acknowledged=[entry]) for entry in self.acknowledged),
            *(Batch(cancelled=[entry]) for entry in self.cancelled),
            *(Batch(forgotten=[entry]) for entry in self.forgotten),
        ]

    def held(self) -> list[Held]:
        """Every job in it."""
        jobs = [*self.released, *self.acknowledged, *self.forgotten]
        jobs += [held for held, *_ in self.done]
        jobs += [held for held, *_ in self.failed]
        jobs += [held for held, _ in self.snoozed]
        jobs += [held for held, _ in self.cancelled]
        return jobs


class Settler:
    """Writes the ends of attempts. Its methods queue and return; `flushed` tells the worker what was written."""

    def __init__(
        self,
        dsn: str,
        worker_id: str,
        flushed: Callable[[Sequence[Held], int], None],
        *,
        pooler: bool = False,
        failed: Callable[[Held, dict[str, Any], str], None] | None = None,
        timed: Timed | None = None,
    ) -> None:
        self._dsn, self._worker_id, self._pooler = dsn, worker_id, pooler
        self._flushed, self._failed, self._timed = flushed, failed, timed
        self._next = Batch()
        self._aside: list[Batch] = []
        self._aside_at = 0.0
        self._work = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._patience = LOCK_TIMEOUT
        self._connection: AsyncConnection[Any] | None = None
        self._watch = AnswerWatch()
        self._task: asyncio.Task[None] | None = None
        self.statements = 0
        self.flushes = 0

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.create_task(self._loop(), name="jobqueue-settle")

    async def stop(self, patience: float = 5.0) -> bool:
        """Write what is queued, for at most `patience` seconds, and end. Returns whether all was written."""
        written = True
        try:
            async with asyncio.timeout(patience):
                await self._empty.wait()
        except TimeoutError:
            written = False
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._disconnect()
        return written

    def cut(self) -> None:
        """Cut the connection, which may be dead; a flush under way fails and is repeated on another."""
        cut(self._connection)

    def complete(self, held: Held, result: str | None, stats: str | None) -> None:
        """The job is done; result and stats as JSON text."""
        if held.settled:
            return
        held.settled = True
        self._next.done.append((held, result, stats))
        self._work.set()
        self._empty.clear()

    def fail(self, held: Held, error: dict[str, Any], retry_in: float | None) -> None:
        """The attempt failed."""
        self._queue(held, lambda: self._next.failed.append((held, error, retry_in)))

    def release(self, held: Held) -> None:
        """Give the job back without spending a retry."""
        self._queue(held, lambda: self._next.released.append(held))

    def snooze(self, held: Held, seconds: float) -> None:
        """Run the job again later without spending a retry."""
        self._queue(held, lambda: self._next.snoozed.append((held, seconds)))

    def cancel(self, held: Held, reason: str) -> None:
        """The handler gave the job up by itself."""
        self._queue(held, lambda: self._next.cancelled.append((held, reason)))

    def acknowledge(self, held: Held) -> None:
        """The handler stopped as it was asked."""
        self._queue(held, lambda: self._next.acknowledged.append(held))

    def forget(self, held: Held) -> None:
        """Nothing to write: the claim was lost or may be soon, or the handler settled the job in its own transaction."""
        self._queue(held, lambda: self._next.forgotten.append(held))

    def _queue(self, held: Held, append: Callable[[], None]) -> None:
        if held.settled:
            return
        held.settled = True
        append()
        self._work.set()
        self._empty.clear()

    async def _loop(self) -> None:
        backoff = Backoff()
        while True:
            await self._wait_for_work()
            batch, self._next = self._next, Batch()
            while batch:
                try:
                    await self._write(batch)
                    backoff.reset()
                    break
                except psycopg.errors.LockNotAvailable:
                    await self._write_around(batch)
                    break
                except DATABASE_AWAY as error:
                    await self._disconnect()
                    text = " ".join(str(error).split())
                    logger.warning("%d results wait: %s", len(batch), text, extra={"event": "db.lost"})
                    await asyncio.sleep(backoff.next())
                except psycopg.Error as error:
                    logger.warning("a flush was refused, writing its jobs one by one: %s", error)
                    batch = await self._spoiled(batch, error)
            await self._try_aside()
            if not self._work.is_set() and not self._aside:
                self._empty.set()

    async def _wait_for_work(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASIDE_SECONDS if self._aside else None):
                await self._work.wait()
        self._work.clear()

    async def _write_around(self, batch: Batch) -> None:
        """Somebody holds one of the jobs: write the others, and put that one aside."""
        for alone in batch.singles():
            await self._write_alone(alone)

    def _put_aside(self, alone: Batch) -> None:
        (held,) = alone.held()
        text = "job %s: somebody holds it in an open transaction; its end waits, the others do not"
        logger.warning(text, held.id, extra={"event": "job.held", "job_id": held.id})
        self._aside.append(alone)
        self._aside_at = asyncio.get_running_loop().time() + ASIDE_SECONDS

    async def _try_aside(self) -> None:
        """Write the ends that were put aside, if their jobs are free now."""
        if not self._aside or asyncio.get_running_loop().time() < self._aside_at:
            return
        aside, self._aside = self._aside, []
        for n, alone in enumerate(aside):
            try:
                await self._wait_for_locks(await self._connect(), ASIDE_TIMEOUT)
                await self._write(alone)
            except psycopg.errors.LockNotAvailable:
                self._aside.append(alone)
            except DATABASE_AWAY:
                await self._disconnect()
                self._aside += aside[n:]
                break
            except psycopg.Error as error:
                await self._write_alone(await self._spoiled(alone, error))
        if self._connection is not None:
            with contextlib.suppress(*DATABASE_AWAY):
                await self._wait_for_locks(self._connection, LOCK_TIMEOUT)
        self._aside_at = asyncio.get_running_loop().time() + ASIDE_SECONDS

    async def _write(self, batch: Batch) -> None:
        connection = await self._connect()
        if self._timed is None:
            await self._write_on(connection, batch)
            return
        with self._timed("settle", {held.claim.queue for held in batch.held()}):
            await self._write_on(connection, batch)

    async def _write_on(self, connection: AsyncConnection[Any], batch: Batch) -> None:
        self.flushes += 1
        if batch.failed:
            await self._fail(connection, batch.failed)
        if batch.released:
            ids = uuid_array(held.id for held in batch.released)
            await self._execute(connection, RELEASE, (ids, uuid_array(held.token for held in batch.released)))
        for held, seconds in batch.snoozed:
            await self._one(connection, SNOOZE, held, f"{seconds} seconds")
        for held, reason in batch.cancelled:
            await self._one(connection, CANCEL_OWN, held, reason)
        for held in batch.acknowledged:
            await self._one(connection, ACKNOWLEDGE, held)
        finished = _finished_claims(batch)
        for start in range(0, len(batch.done), MOST_PER_FLUSH):
            part = batch.done[start : start + MOST_PER_FLUSH]
            is_last = start + MOST_PER_FLUSH >= len(batch.done)
            await self._complete(connection, part, finished if is_last else None)
        if finished and not batch.done:
            await self._execute(connection, SETTLE, (self._worker_id, "{}", "{}", None, None, finished))
        jobs = batch.held()
        self._flushed(jobs, len(batch.done))

    async def _spoiled(self, batch: Batch, error: psycopg.Error) -> Batch:
        """One job's data made the statement fail: write the others alone, and end that one as failed. Nothing hangs."""
        if len(batch) > 1:
            for alone in batch.singles():
                await self._write_alone(alone)
            return Batch()
        spoiled = Batch()
        for held in batch.held():
            text = f"{type(error).__name__}: {error.diag.message_primary or error}"
            problem = {
                "class": "permanent",
                "code": "RESULT_INVALID",
                "message": text.encode("ascii", "replace").decode(),
            }
            if batch.failed and batch.failed[0][1].get("code") == "RESULT_INVALID":
                logger.error("the end of job %s cannot be written; its lease will run out: %s", held.id, text)
                spoiled.forgotten.append(held)
            else:
                spoiled.failed.append((held, problem, None))
        return spoiled

    async def _write_alone(self, alone: Batch) -> None:
        while alone:
            try:
                await self._write(alone)
                return
            except psycopg.errors.LockNotAvailable:
                self._put_aside(alone)
                return
            except DATABASE_AWAY:
                await self._disconnect()
                await asyncio.sleep(0.5)
            except psycopg.Error as error:
                alone = await self._spoiled(alone, error)

    async def _complete(
        self,
        connection: AsyncConnection[Any],
        part: Sequence[tuple[Held, str | None, str | None]],
        finished: list[int] | None,
    ) -> None:
        ids = uuid_array(held.id for held, _, _ in part)
        tokens = uuid_array(held.token for held, _, _ in part)
        results = [result for _, result, _ in part]
        stats = [stat for _, _, stat in part]
        parameters = (
            self._worker_id,
            ids,
            tokens,
            results if any(result is not None for result in results) else None,
            stats if any(stat is not None for stat in stats) else None,
            finished,
        )
        cursor = await self._execute(connection, SETTLE, parameters)
        for id, _token, outcome in await cursor.fetchall():
            if outcome != "already":
                logger.warning("job %s was not completed: %s", id, outcome, extra={"event": "job.lost", "job_id": id})
            if outcome == "failed" and self._failed is not None:
                self._failed(next(held for held, *_ in part if held.id == str(id)), TOO_LARGE, "failed")

    async def _fail(
        self, connection: AsyncConnection[Any], failed: Sequence[tuple[Held, dict[str, Any], float | None]]
    ) -> None:
        failures = [
            {"id": held.id, "token": held.token, "error": error, "retry_in": retry_in}
            for held, error, retry_in in failed
        ]
        cursor = await self._execute(connection, FAIL, (json.dumps(failures),))
        told = {} if self._failed is None else {held.id: (held, error) for held, error, _ in failed}
        for id, outcome, status in await cursor.fetchall():
            if outcome == "lost":
                logger.warning("job %s was lost before it failed", id, extra={"event": "job.lost", "job_id": id})
            elif self._failed is not None:
                self._failed(*told[str(id)], str(status))

    async def _one(self, connection: AsyncConnection[Any], query: LiteralString, held: Held, *more: str) -> None:
        try:
            await self._execute(connection, query, (held.id, held.token, *more))
        except psycopg.errors.DatabaseError as error:
            if not (error.sqlstate or "").startswith("JQ4"):
                raise
            # It may be ours still (nothing was asked of it): then its lease runs out.
            held.note = None
            logger.warning("job %s: %s", held.id, error.diag.message_primary, extra={"event": "job.lost"})

    async def _execute(
        self, connection: AsyncConnection[Any], query: LiteralString, parameters: Sequence[Any]
    ) -> AsyncCursor[Any]:
        self.statements += 1
        with self._watch.over(connection):
            return await connection.execute(patiently(query, self._patience) if self._pooler else query, parameters)

    async def _connect(self) -> AsyncConnection[Any]:
        if self._connection is None or self._connection.closed:
            connection = await connect_async(self._dsn, "jobqueue results", pooler=self._pooler)
            prepare_rows(connection)
            await self._wait_for_locks(connection, LOCK_TIMEOUT)
            self._connection = connection
        return self._connection

    async def _wait_for_locks(self, connection: AsyncConnection[Any], timeout: str) -> None:
        # Behind a pooler that mixes transactions it would stick to a session of somebody else: each statement brings it.
        self._patience = timeout
        if not self._pooler:
            with self._watch.over(connection):
                await connection.execute(f"set lock_timeout = '{timeout}'".encode())

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def uuid_array(uuids: Iterable[str]) -> str:
    """Return an array literal of uuids, which need no quotes: 0.02 us per element instead of 3 by the driver's list."""
    return "{" + ",".join(uuids) + "}"


@functools.cache
def patiently(query: LiteralString, timeout: str) -> bytes:
    """Return the statement with a lock_timeout for itself alone.

    Its function cannot begin before that is set, since its first argument comes from there.
    """
    limit = f"with limited as materialized (select set_config('lock_timeout', '{timeout}', true) <> '' as now) "
    call = r"from limited, lateral \g<function>(case when limited.now then %s::\g<type> end"
    return (limit + _CALL.sub(call, query, count=1)).encode()


def _finished_claims(batch: Batch) -> list[int] | None:
    """Count the jobs whose ends a batch writes off their claims, once, and return the claims of which none is left."""
    finished: list[int] = []
    for held in batch.forgotten:
        # it may be processing still, for all that is known here
        held.note = None
    for held in batch.held():
        note: ClaimNote | None = held.note
        if note is None:
            continue
        held.note = None
        note.left -= 1
        if note.left == 0:
            finished.append(note.id)
    return finished or None
