"""What a handler holds: its job.

```
handler ── job.progress / stage / checkpoint / remaining ──► Job ──► Channel ──► the worker's connections
        ◄── Cancelled, Paused ◄── what the database or a heartbeat answered
```

Every call of a job raises `Cancelled` once the job was asked to stop, and `stage`, `checkpoint` and `remaining` raise
`Paused` once it was asked to pause: those are the places where nothing is lost. `LeaseLost` means that another worker
has the job: let it pass through.

Handlers that run in a thread or a process use the same methods without `await` on `job.sync`:
`job.sync.progress(5, 17)`, `with job.sync.stage("scan"):`, `for item in job.sync.remaining(items):`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import UUID

from jobqueue.blocking import BlockingJob
from jobqueue.checkpoints import Checkpoint, load_checkpoint, sha256_of_file
from jobqueue.chunks import Chunks
from jobqueue.errors import Cancelled, InvalidArgument, LeaseLost
from jobqueue.json_text import RAW, from_json
from jobqueue.loops import Remaining, TaskTimer, ThreadTimer, Timer, track
from jobqueue.stages import StageBlock
from jobqueue.tracked import Claim as Claim
from jobqueue.tracked import Finishing, json_argument

if TYPE_CHECKING:
    from os import PathLike

    from psycopg import AsyncConnection

    from jobqueue.connections import Connections

T = TypeVar("T")
STOPPED = ("cancel", "lost")
PARENT_RESULTS = "select coalesce(ref, id::text), result::text from jobqueue.parents(%s)"


class Paused(BaseException):
    """The job was asked to pause and has reached a place where it can; for the worker, not for handlers.

    Not an Exception: `except Exception` in a handler must not swallow it.
    """


class Channel(Protocol):
    """How a job reaches the database; the worker's, a child process's, or none (`NullJob`).

    JSON arguments of `call` are JSON text.
    """

    @property
    def connections(self) -> Connections:
        """Lends connections, for `job.transaction()`."""

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        """Note progress, to be sent soon; what is noted before it is sent is merged."""

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        """Return the scalar of `jobqueue.<function>(id, token, …)`."""

    async def keys(self, job: Job) -> set[str]:
        """Return the done keys."""

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """From a thread: run it where the channel lives, and wait."""


class Job:
    """The job that a handler works on. Made by the worker; `NullJob` stands in where there is none."""

    __slots__ = (
        "__weakref__",
        "_channel", "_checkpoint", "_command", "_loops", "_may_pause", "_payload", "_settled", "_stats", "_timers",
        "claim",
    )  # fmt: skip

    def __init__(self, claim: Claim, channel: Channel) -> None:
        self.claim = claim
        self._channel = channel
        self._command: str | None = None
        self._settled = False
        self._checkpoint: Checkpoint | None = None
        self._may_pause = True
        self._payload: Any = claim.payload
        self._stats: dict[str, Any] | None = None
        self._loops: list[Finishing] | None = None
        self._timers: list[ThreadTimer] | None = None

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> UUID:
        """The job's id."""
        return UUID(self.claim.id)

    @property
    def queue(self) -> str:
        """The queue it was sent to."""
        return self.claim.queue

    @property
    def job_type(self) -> str:
        """The name of the handler that runs it."""
        return self.claim.job_type

    @property
    def payload(self) -> Any:
        """The input as JSON gave it (a dict as a rule), whatever type the handler declares for its own argument."""
        if type(self._payload) in RAW:
            self._payload = from_json(self._payload)
        return self._payload

    @property
    def tenant(self) -> str:
        """The tenant it belongs to."""
        return self.claim.tenant

    @property
    def subject(self) -> str | None:
        """What it is about, for example `document:42`."""
        return self.claim.subject

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; every claim counts."""
        return self.claim.attempt

    @property
    def retry_count(self) -> int:
        """How many retries were spent before this attempt."""
        return self.claim.retry_count

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata at the time of the claim; `progress(metadata=…)` adds to what is stored."""
        return from_json(self.claim.metadata) or {}

    @property
    def stats(self) -> dict[str, Any]:
        """Figures about the work, `job.stats["files"] = 120`: stored with the completion."""
        if self._stats is None:
            self._stats = dict(from_json(self.claim.stats) or {})
        return self._stats

    @property
    def last_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, verified by its hash; None if there is none or it is damaged."""
        return self._checkpoint

    @property
    def cancel_requested(self) -> bool:
        """Whether the handler is to stop: somebody asked for the job to be cancelled, or this attempt is over."""
        return self._command in STOPPED

    @property
    def pause_requested(self) -> bool:
        """Whether somebody asked for the job to be paused; it happens at the next stage, checkpoint or saved item."""
        return self._command == "pause"

    @property
    def sync(self) -> BlockingJob:
        """The same methods for threads and processes, without `await`."""
        return BlockingJob(self, self._channel.blocking)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.claim.id} {self.claim.job_type} attempt {self.claim.attempt}>"

    # -- progress ------------------------------------------------------------------------------------------------------

    async def progress(
        self,
        done: int | None = None,
        total: int | None = None,
        message: str | None = None,
        *,
        pct: float | None = None,
        substage: str | None = None,
        failed: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Say how far the job is: `progress(5, 17, "Processing chunk 5/17")` or `progress(pct=40)`.

        `pct` (0 to 100, clamped) follows from done and total, rounded down, unless given; within a stage of a job whose
        number of stages is known, done and total are that stage's, and it counts by its weight. `failed`: how many of
        them went wrong, kept as `metadata.failed`. `metadata` is merged into the job's. Sent at once as a rule; of what
        comes faster than a worker sends (9 to 40 times a second, for all of its jobs) the latest wins, so it can be
        called for every item. A sign of life. Raises Cancelled if the job was asked to stop, LeaseLost if this attempt
        is over.
        """
        more = {**(metadata or {}), **({} if failed is None else {"failed": failed})}
        if substage is not None:
            more["substage"] = substage
        self._report(done, total, message, pct, more)
        self.raise_if_cancelled()

    def _report(
        self,
        done: int | None,
        total: int | None,
        message: str | None,
        pct: float | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        counts = {"done": done, "total": total}
        data = {**(more or {}), **{name: value for name, value in counts.items() if value is not None}}
        whole = None if pct is None else max(0, min(100, int(pct)))
        self._channel.report(self, whole, message, data or None)

    async def parent_results(self) -> dict[str, Any]:
        """Return the results of the jobs that this one depended on, by their ref in the flow, else by their id.

        None for a parent that was skipped, or failed where the edge says "run". Raises JobNotFound.
        """
        found = await self._channel.rows(self, PARENT_RESULTS, self.claim.id)
        return {name: None if text is None else json.loads(text) for name, text in found}

    def raise_if_cancelled(self) -> None:
        """Raise Cancelled if somebody asked for the job to be cancelled, LeaseLost if this attempt is over."""
        if self._command == "cancel":
            raise Cancelled("the job was cancelled")
        if self._command == "lost":
            raise LeaseLost("this attempt is over: its time was up, or the job was taken from it")

    async def estimate(self, units: float, *, stage: str | None = None) -> None:
        """Say how much work there is, in units of your own (pages, files), for the estimate of the time it takes.

        `stage`: the stage that the units belong to, also one that is still to come; None (default): the whole job. What
        a unit takes is learned from the jobs of this type. Written at once. Raises InvalidArgument below 0, LeaseLost.
        """
        if not 0 <= units < float("inf"):
            raise InvalidArgument(f"units must be a number from 0, not {units}")
        await self._channel.call(self, "estimate_units", units=float(units), stage=stage)

    def track(
        self, items: Iterable[T] | AsyncIterable[T], *, message: str | None = None, total: int | None = None
    ) -> AsyncIterator[T]:
        """Yield the items and report progress: `async for page in job.track(pages, message="Page {number}/{total}")`.

        `message` may name {number} (of this item, from 1), {done} and {total}. `total`: default the length, if it has
        one. Raises Cancelled before the next item if the job was asked to stop.
        """
        return track(self, items, message, total, self._make_timer())

    # -- what survives an attempt --------------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        of: int | None = None,
        weight: float | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> StageBlock:
        """A stage of the job: `async with job.stage("scan", of=3) as stage:`.

        `of`: how many stages the job has. `weight`: its share in the overall percentage (default 1). A stage whose
        result was kept with `stage.save(output)` is `stage.done` in later attempts, with `stage.output`; others run
        again. Raises Paused, Cancelled, LeaseLost.
        """
        return StageBlock(self, name, of, weight, metadata)

    def remaining(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        key: Callable[[T], object] = str,
        message: str | None = None,
        report: bool = True,
    ) -> AsyncIterator[T]:
        """Yield the items that no earlier attempt has finished: `async for page in job.remaining(pages)`.

        An item counts as done when the next one is asked for. Done keys are saved every 10 items or 2 seconds, and when
        the attempt ends, however it ends. Reports progress over all items if their number is known; `message` as of
        `track`; `report=False`: nothing, inside of a loop that reports. Keys are 1 to 1,000 characters and unique among
        the items. After `break` the last item counts as not done. Raises Paused, Cancelled, LeaseLost, InvalidArgument
        for a bad key.
        """
        return self._remaining(items, key, message, report, self._make_timer)

    def _remaining(
        self,
        items: Iterable[T] | AsyncIterable[T],
        key: Callable[[T], object],
        message: str | None,
        report: bool,
        make_timer: Callable[[], Timer],
    ) -> AsyncIterator[T]:
        return Remaining(self, make_timer).iterate(items, key, message, report)

    # -- for its parts -------------------------------------------------------------------------------------------------

    @property
    def _asked(self) -> str | None:
        return self._command

    async def _call(self, function: str, **arguments: Any) -> Any:
        return await self._channel.call(self, function, **arguments)

    async def _keys(self) -> set[str]:
        return await self._channel.keys(self)

    async def _rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return await self._channel.rows(self, query, self.claim.id, self.claim.claim_token, *parameters)

    def _begin_loop(self, loop: Finishing) -> None:
        if self._loops is None:
            self._loops = []
        self._loops.append(loop)

    def _end_loop(self, loop: Finishing) -> None:
        if self._loops is not None and loop in self._loops:
            self._loops.remove(loop)

    def _make_timer(self, run: Callable[[Coroutine[Any, Any, Any]], Any] | None = None) -> Timer:
        """What loops do a little later; `run`: in a thread or a process."""
        if run is None:
            return TaskTimer()
        timer = ThreadTimer(run)
        self._timers = [*(self._timers or ()), timer]
        return timer

    def chunks(self, total: int) -> Chunks:
        """Progress over the chunks of a document, in the form that people and dashboards expect; see `Chunks`."""
        return Chunks(self, total)

    async def checkpoint(
        self,
        stage: str,
        data: Any = None,
        *,
        reference: str | PathLike[str] | None = None,
        hash: str | None = None,
        pause_safe: bool = True,
    ) -> None:
        """Remember how far the job is; a later attempt finds it in `last_checkpoint`.

        `data`: inline state (JSON, at most 8 MB), or `reference`: a path where it lies; `hash`: SHA-256 of what lies
        there (default: computed from the file). `pause_safe`: the job may be paused here. A sign of life.
        Raises Paused or Cancelled if that was asked for, LeaseLost, TooLarge, InvalidArgument.
        """
        if reference is not None and hash is None:
            hash = await self._hash_of(str(reference))
        text = None if data is None else json_argument(data, "the checkpoint's data")
        where = None if reference is None else str(reference)
        command = await self._channel.call(
            self, "checkpoint", stage=stage, data=text, reference=where, hash=hash, pause_safe=pause_safe
        )
        self._may_pause = pause_safe
        self.obey(command)

    @contextlib.asynccontextmanager
    async def transaction(self, result: Any = None, *, connection: Any = None) -> AsyncIterator[AsyncConnection[Any]]:
        """Write and complete in one transaction: `async with job.transaction() as connection:`.

        What is written on the connection and the job's completion are committed together, or not at all; the value that
        the handler returns afterwards is ignored. `result`: the job's result, or a function that is called at the end
        of the block. `connection`: your own instead (psycopg, SQLAlchemy, asyncpg); the block begins and commits its
        transaction, and gets it back. Raises LeaseLost (and rolls back) if the job was given to another worker
        meanwhile, InvalidArgument if your connection is in a transaction already.
        """
        from jobqueue import client
        from jobqueue.integrations.adapters import borrow, whole_transaction

        async with borrow(self._channel.connections, connection) as lent:
            async with whole_transaction(lent):
                yield lent if connection is None else connection
                text, stats = self._final(result)
                await client.complete(lent, self.id, self.token, text, stats)
            self._settled = True

    # -- for the worker ------------------------------------------------------------------------------------------------

    @property
    def token(self) -> UUID:
        """The claim token: what the worker says about the job must name it."""
        return UUID(self.claim.claim_token)

    @property
    def settled(self) -> bool:
        """Whether a transaction of the handler has completed the job already."""
        return self._settled

    def deliver(self, command: str | None) -> None:
        """Note what was asked of the job (cancel, pause), or that the attempt is over (lost); then nothing replaces it."""
        if command is not None and self._command not in STOPPED:
            self._command = command

    def obey(self, command: str | None = None, *, at_safe_place: bool = True) -> None:
        """Note an order and raise what it means: Cancelled, or Paused where nothing is lost by stopping."""
        self.deliver(command)
        self.raise_if_cancelled()
        if self._command == "pause" and at_safe_place and self._may_pause:
            raise Paused("the job was paused")

    async def prepare(self) -> None:
        """Load and verify the last checkpoint; with a damaged one the job begins afresh, and its history says so."""
        if self.claim.checkpoint_id is None:
            return
        found, problem = await load_checkpoint(self)
        self._checkpoint = found
        if problem is not None:
            await self._channel.call(self, "reject_checkpoint", why=problem)

    async def flush(self) -> None:
        """Save done keys and send progress that loops hold back: at the end of every attempt that is not completed."""
        for loop in list(self._loops or ()):
            await loop.finish()

    def end_loops(self) -> None:
        """In a process: what loops would do later is not done any more; the next job must not be taken for this one."""
        for timer in self._timers or ():
            timer.close()

    def stats_text(self) -> str | None:
        """The figures as JSON text for the completion; None if the handler touched none. Raises InvalidArgument."""
        return json_argument(self._stats, "job.stats") if self._stats else None

    def _final(self, result: Any) -> tuple[str | None, str | None]:
        value = result() if callable(result) else result
        return (None if value is None else json_argument(value, "the result")), self.stats_text()

    async def _hash_of(self, path: str) -> str:
        try:
            return await asyncio.to_thread(sha256_of_file, path)
        except OSError as error:
            raise InvalidArgument(
                f"the checkpoint's reference cannot be read: {error}",
                hint="Give the path of a file that was written, or hash= if it lies elsewhere.",
            ) from error


_current: ContextVar[Job | None] = ContextVar("jobqueue_current_job", default=None)
set_current_job = _current.set
"""For the worker: make a job the current one of this context."""
reset_current_job = _current.reset


def current_job() -> Job | None:
    """Return the job whose handler runs in this task or thread, or None outside of handlers."""
    return _current.get()
