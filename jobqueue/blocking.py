"""The methods of a job for threads and processes: the same names and arguments, without `await`.

There is one implementation, the asynchronous one; here it is run through the channel, call by call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from jobqueue.chunks import MERGING
from jobqueue.loops import track

if TYPE_CHECKING:
    from os import PathLike

    from psycopg import Connection

    from jobqueue.chunks import Chunks
    from jobqueue.loops import Timer
    from jobqueue.stages import StageBlock
    from jobqueue.tracked import Awaited

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]


class BlockingJob:
    """`job.sync`: what `Job` offers, without `await`. Never for coroutines: they would wait for themselves."""

    __slots__ = ("_channel_run", "_job")

    def __init__(self, job: Awaited, run: Run) -> None:
        self._job = job
        self._channel_run = run

    def progress(
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
        """As `Job.progress`."""
        job = self._job
        self._run(job.progress(done, total, message, pct=pct, substage=substage, failed=failed, metadata=metadata))

    def parent_results(self) -> dict[str, Any]:
        """As `Job.parent_results`."""
        results: dict[str, Any] = self._run(self._job.parent_results())
        return results

    def raise_if_cancelled(self) -> None:
        """As `Job.raise_if_cancelled`."""
        self._job.raise_if_cancelled()

    def estimate(self, units: float, *, stage: str | None = None) -> None:
        """As `Job.estimate`."""
        self._run(self._job.estimate(units, stage=stage))

    def checkpoint(
        self,
        stage: str,
        data: Any = None,
        *,
        reference: str | PathLike[str] | None = None,
        hash: str | None = None,
        pause_safe: bool = True,
    ) -> None:
        """As `Job.checkpoint`."""
        self._run(self._job.checkpoint(stage, data, reference=reference, hash=hash, pause_safe=pause_safe))

    def track(
        self, items: Iterable[T] | AsyncIterable[T], *, message: str | None = None, total: int | None = None
    ) -> Iterator[T]:
        """As `Job.track`."""
        return self._each(track(self._job, items, message, total, self._make_timer()))

    def remaining(
        self, items: Iterable[T], *, key: Callable[[T], object] = str, message: str | None = None, report: bool = True
    ) -> Iterator[T]:
        """As `Job.remaining`."""
        return self._each(self._job._remaining(items, key, message, report, self._make_timer))

    @contextmanager
    def stage(
        self,
        name: str,
        of: int | None = None,
        weight: float | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> Iterator[BlockingStage]:
        """As `Job.stage`."""
        with self._block(self._job.stage(name, of, weight, metadata=metadata)) as stage:
            yield BlockingStage(stage, self._run)

    def chunks(self, total: int) -> BlockingChunks:
        """As `Job.chunks`."""
        return BlockingChunks(self._job.chunks(total), self)

    @contextmanager
    def transaction(
        self, result: Any | Callable[[], Any] = None, *, connection: Any = None
    ) -> Iterator[Connection[Any]]:
        """As `Job.transaction`, with a blocking connection: psycopg's, SQLAlchemy's or django.db.connection."""
        from jobqueue import client
        from jobqueue.integrations.adapters import borrow_blocking, whole_transaction_blocking

        job = self._job
        with borrow_blocking(job._channel.connections, connection) as lent:
            with whole_transaction_blocking(lent):
                yield lent if connection is None else connection
                text, stats = job._final(result)
                client.blocking(client.complete(lent, job.id, job.token, text, stats))
            job._settled = True

    def _make_timer(self) -> Timer:
        timer: Timer = self._job._make_timer(self._run)
        return timer

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if asyncio._get_running_loop() is not None:
            coroutine.close()
            raise RuntimeError("job.sync is for threads and processes; in a coroutine use `await job.…` instead")
        value: T = self._channel_run(coroutine)
        return value

    def _each(self, items: AsyncIterator[T]) -> Iterator[T]:
        while True:
            found, item = self._run(_next_of(items))
            if not found:
                return
            yield item

    @contextmanager
    def _block(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        value = self._run(_enter(manager))
        try:
            yield value
        except BaseException as error:
            if not self._run(_leave(manager, error)):
                raise
        else:
            self._run(_leave(manager, None))


class BlockingStage:
    """`with job.sync.stage("scan") as stage:`; see `StageBlock`."""

    __slots__ = ("_run", "_stage")

    def __init__(self, stage: StageBlock, run: Run) -> None:
        self._stage = stage
        self._run = run

    @property
    def done(self) -> bool:
        """Whether an earlier attempt has completed it, with its output saved."""
        return self._stage.done

    @property
    def output(self) -> Any:
        """What `save` kept."""
        return self._stage.output

    def save(self, output: Any) -> None:
        """As `StageBlock.save`."""
        self._run(self._stage.save(output))

    def substage(self, text: str | None, done: int | None = None, total: int | None = None) -> None:
        """As `StageBlock.substage`."""
        self._run(self._stage.substage(text, done, total))

    def skip(self, reason: str | None = None) -> None:
        """As `StageBlock.skip`."""
        self._run(self._stage.skip(reason))


class BlockingChunks:
    """`job.sync.chunks(17)`; see `Chunks`."""

    __slots__ = ("_chunks", "_job")

    def __init__(self, chunks: Chunks, job: BlockingJob) -> None:
        self._chunks = chunks
        self._job = job

    def __iter__(self) -> Iterator[int]:
        return self._job._each(self._chunks.__aiter__())

    @contextmanager
    def chunk(self, index: int, pages: tuple[int, int] | None = None, *, keep_going: bool = False) -> Iterator[None]:
        """As `Chunks.chunk`."""
        with self._job._block(self._chunks.chunk(index, pages, keep_going=keep_going)):
            yield

    def start(self, index: int, pages: tuple[int, int] | None = None) -> None:
        """As `Chunks.start`."""
        self._job._run(self._chunks.start(index, pages))

    def complete(self, index: int) -> None:
        """As `Chunks.complete`."""
        self._job._run(self._chunks.complete(index))

    def fail(self, index: int, error: object, pages: tuple[int, int] | None = None) -> str:
        """As `Chunks.fail`."""
        text: str = self._job._run(self._chunks.fail(index, error, pages))
        return text

    @contextmanager
    def merging(self, name: str = MERGING) -> Iterator[BlockingStage]:
        """As `Chunks.merging`."""
        with self._job._block(self._chunks.merging(name)) as stage:
            yield BlockingStage(stage, self._job._run)


async def _next_of(items: AsyncIterator[T]) -> tuple[bool, T | Any]:
    try:
        return True, await anext(items)
    except StopAsyncIteration:
        return False, None


async def _enter(manager: AbstractAsyncContextManager[T]) -> T:
    return await manager.__aenter__()


async def _leave(manager: AbstractAsyncContextManager[Any], error: BaseException | None) -> bool:
    if error is None:
        return bool(await manager.__aexit__(None, None, None))
    return bool(await manager.__aexit__(type(error), error, error.__traceback__))
