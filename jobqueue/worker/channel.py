"""The way of a running handler to the database: progress is coalesced, everything else is written before it returns.

A report goes out at once. While one is under way, and while the worker has sent its share of the second (`bucket.py`),
reports wait and are merged: the next flush takes those of all jobs in one statement, the latest of a job always. So ten
jobs are seen within milliseconds, and a thousand cost nine notifying commits a second. What is asked of a job comes
back with its report.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg import AsyncConnection, sql

from jobqueue.connections import Connections
from jobqueue.errors import JobqueueError, translate
from jobqueue.worker.bucket import Bucket
from jobqueue.worker.held import Held
from jobqueue.worker.resilience import DATABASE_AWAY, Backoff

if TYPE_CHECKING:
    from jobqueue.job import Claim, Job

T = TypeVar("T")

MOST_REST = 0.25
"""Between two flushes the server rests for as long as the last one took, at most so many seconds."""
POOL_SIZE = 4
REPORT = "select id::text, command from jobqueue.heartbeat(%s, %s::jsonb)"
DONE_KEYS = "select key from jobqueue.done_keys(%s) as k (key)"

logger = logging.getLogger(__name__)


class WorkerChannel:
    """What `Job` talks to inside a worker; see `jobqueue.job.Channel`."""

    def __init__(
        self,
        dsn: str,
        worker_id: str,
        held: Mapping[str, Held],
        deliver: Callable[[list[tuple[str | None, str]]], None],
        *,
        pooler: bool = False,
    ) -> None:
        self.connections = Connections(dsn, application_name="jobqueue handlers", pooler=pooler, max_size=POOL_SIZE)
        # Progress must not wait until handlers have ended their transactions.
        self._reporter = Connections(dsn, application_name="jobqueue progress", pooler=pooler, max_size=1)
        self._worker_id = worker_id
        self._pooler = pooler
        self._held = held
        self._deliver = deliver
        self._reports: dict[str, dict[str, Any]] = {}
        # held jobs that have ever reported: they share the worker's flushes
        self._reporting: set[str] = set()
        self._due = asyncio.Event()
        self._ending: set[str] = set()
        # Two reports of a job on two connections could arrive in the wrong order: the last word must be the last.
        self._one_at_a_time = asyncio.Lock()
        self._under_way: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._task: asyncio.Task[None] | None = None
        self.statements = 0
        self.backends: set[int] = set()
        """The server process that progress is sent through; none behind a pooler, where that changes."""

    def start(self) -> None:
        """Begin to send progress."""
        self._task = asyncio.create_task(self._report_loop(), name="jobqueue-progress")

    async def stop(self) -> None:
        """Send what is left of the progress, and close the connections."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.connections.close()
        await self._reporter.close()

    def cut(self) -> None:
        """Cut all connections, which may be dead: handlers that wait for an answer on one learn that it will not come."""
        self.connections.cut()
        self._reporter.cut()

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        """Remember the latest progress of a job; it is sent at once, or with the next flush. From any thread."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self._note, job.claim, pct, message, data)
        else:
            self._note(job.claim, pct, message, data)

    def _note(self, claim: Claim, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        held = self._held_by(claim)
        if held is None:
            return
        held.life = self._loop.time()
        id = held.id
        report = self._reports.get(id)
        if report is None or report["token"] != held.token:
            report = self._reports[id] = {"id": id, "token": held.token, "started": True}
        self._reporting.add(id)
        if pct is not None:
            report["pct"] = pct
        if message is not None:
            report["message"] = message
        if data:
            report["data"] = {**report.get("data", {}), **data}
        self._due.set()

    def _held_by(self, claim: Claim) -> Held | None:
        """The job as this claim holds it; None for a handler that has outlived its attempt, also if another has the job."""
        held = self._held.get(str(claim.id))
        return held if held is not None and held.token == claim.claim_token else None

    def sign_of_life(self, held: Held) -> None:
        """The handler did something that proves that it is not stuck."""
        held.life = self._loop.time()

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        """Call `jobqueue.<function>(id, token, …)` and return its value; errors are those of the library."""
        held = self._held_by(job.claim)
        if held is not None:
            self.sign_of_life(held)
        # Done keys are seen by nobody: what waits to be reported goes with the next flush of all jobs, and not in a
        # transaction of its own that would notify.
        if function != "mark_done":
            await self.flush(str(job.claim.id))
        names = [sql.SQL("{} => %s").format(sql.Identifier(name)) for name in arguments]
        query = sql.SQL("select jobqueue.{}({})").format(
            sql.Identifier(function), sql.SQL(", ").join([sql.SQL("%s::uuid"), sql.SQL("%s::uuid"), *names])
        )
        rows = await self._query(query, (str(job.claim.id), str(job.claim.claim_token), *arguments.values()))
        return rows[0][0] if rows else None

    async def keys(self, job: Job) -> set[str]:
        """Return what is done of a job already."""
        return {row[0] for row in await self._query(sql.SQL(DONE_KEYS), (str(job.claim.id),))}

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a query with this channel's connections."""
        return await self._query(query.encode(), parameters)

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """From a thread: run on the worker's loop, and wait."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()

    def has_report(self, id: str) -> bool:
        """Whether progress of this job waits to be sent, or is on its way: after the job's end it would be refused."""
        return id in self._reports or id in self._under_way

    async def flush(self, id: str | None = None) -> None:
        """Send the progress of one job, or of all, now. Raises what the database says of one job's progress."""
        if id is None:
            async with self._one_at_a_time:
                await self._flush_all()
        elif id in self._reports or id in self._under_way:
            async with self._one_at_a_time:
                report = self._reports.pop(id, None)
                if report is not None:
                    await self._send([report])

    async def _flush_all(self) -> None:
        reports = list(self._reports.values())
        self._reports.clear()
        reports = [report for report in reports if self._is_current(report)]
        try:
            await self._send(reports)
        except JobqueueError:
            # One of them was refused (metadata too large, …): the others must not suffer.
            for report in reports:
                await self._send_alone(report)

    def _is_current(self, report: dict[str, Any]) -> bool:
        """Whether the attempt still runs; the last word of one that has ended is written already."""
        held = self._held.get(report["id"])
        return held is not None and not held.settled and held.token == report["token"]

    async def finish(self, id: str) -> None:
        """Send the last progress of a job that ends: together with the others that end at the same time."""
        self._ending.add(id)
        async with self._one_at_a_time:
            if id not in self._ending:
                return
            ending, self._ending = self._ending, set()
            reports = [self._reports.pop(one) for one in sorted(ending) if one in self._reports]
            try:
                await self._send(reports)
            except JobqueueError:
                for report in reports:
                    await self._send_alone(report)

    async def _send(self, reports: list[dict[str, Any]]) -> None:
        if reports:
            self._under_way = {report["id"] for report in reports}
            try:
                parameters = (self._worker_id, json.dumps(reports))
                orders = await self._query(sql.SQL(REPORT), parameters, via=self._reporter)
            finally:
                self._under_way = set()
            if orders:
                # An order is about the attempt that has reported, not about one that may have followed meanwhile.
                current = {report["id"] for report in reports if self._is_current(report)}
                self._deliver([(id, command) for id, command in orders if id is None or id in current])

    async def _send_alone(self, report: dict[str, Any]) -> None:
        try:
            await self._send([report])
        except JobqueueError as error:
            logger.warning("progress of job %s was refused: %s", report["id"], error)

    async def _query(
        self, query: sql.SQL | sql.Composed | bytes, parameters: tuple[Any, ...], via: Connections | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement; a lost connection is tried again with another one, for about 20 seconds."""
        backoff = Backoff()
        for attempt in range(15):
            try:
                async with (via or self.connections).lend() as connection:
                    self.statements += 1
                    if via is self._reporter and not self._pooler:
                        await self._prepare_reporter(connection)
                    with translate():
                        return await (await connection.execute(query, parameters)).fetchall()
            except DATABASE_AWAY:
                if attempt == 14:
                    raise
                await asyncio.sleep(backoff.next())
        return []

    async def _prepare_reporter(self, connection: AsyncConnection[Any]) -> None:
        pid = connection.info.backend_pid
        if pid not in self.backends:
            # Nobody has to wait for the disk until a report is seen: after a crash of the server the next one says more.
            await connection.execute("set synchronous_commit = off")
            self.backends.clear()
            self.backends.add(pid)

    async def _report_loop(self) -> None:
        bucket = Bucket(self._loop.time())
        try:
            while True:
                await self._due.wait()
                while wait := bucket.wait(self._loop.time(), len(self._reporting)):
                    await asyncio.sleep(wait)
                bucket.take()
                self._due.clear()
                began = self._loop.time()
                await self._flush_safely()
                self._reporting.intersection_update(self._held)
                await asyncio.sleep(min(self._loop.time() - began, MOST_REST))
        except asyncio.CancelledError:
            await self._flush_safely()
            raise

    async def _flush_safely(self) -> None:
        try:
            await self.flush()
        except Exception as error:
            logger.warning("progress was not stored: %s", " ".join(str(error).split()))
