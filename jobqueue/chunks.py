"""Progress over the chunks of a document.

People read `Processing chunk 5/17`, dashboards read `metadata.chunk_processing`, and a failure says
`Chunk 5 (pages 101-125) failed: …`. Chunks count from 0 in data and from 1 in texts for people.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from jobqueue.classify import ChunkFailed
from jobqueue.errors import HandlerSignal, InvalidArgument, JobqueueError
from jobqueue.stages import StageBlock

if TYPE_CHECKING:
    from jobqueue.tracked import Tracked

MERGING = "Merging OCR results"
_KEY = "chunk:"


class Chunks:
    """The chunks of a job's document; those that an earlier attempt completed are not processed again.

    ```python
    chunks = job.chunks(17)
    async for index in chunks:
        async with chunks.chunk(index, pages=(25 * index + 1, 25 * index + 25)):
            ...
    async with chunks.merging():
        ...
    ```
    """

    def __init__(self, job: Tracked, total: int) -> None:
        if total < 0:
            raise InvalidArgument(f"total must be at least 0, not {total}")
        self.total = total
        self.completed = 0
        self.failed = 0
        self._job = job
        self._done: set[int] | None = None
        self._current: int | None = None
        self._pages: tuple[int, int] | None = None

    async def __aiter__(self) -> AsyncIterator[int]:
        """The indexes, from 0, that no earlier attempt has completed. Raises Cancelled, Paused between chunks."""
        done = await self._loaded()
        for index in range(self.total):
            if index not in done:
                self._job.obey()
                yield index

    @asynccontextmanager
    async def chunk(
        self, index: int, pages: tuple[int, int] | None = None, *, keep_going: bool = False
    ) -> AsyncIterator[None]:
        """Process one chunk: `async with chunks.chunk(4, pages=(101, 125)):`.

        `keep_going`: count a failure and go on, instead of raising it. Raises ChunkFailed, with the error as its cause
        and its class.
        """
        await self.start(index, pages)
        try:
            yield
        except (HandlerSignal, JobqueueError):
            raise
        except Exception as error:
            text = await self.fail(index, error, pages)
            if not keep_going:
                raise ChunkFailed(text) from error
        else:
            await self.complete(index)

    async def start(self, index: int, pages: tuple[int, int] | None = None) -> None:
        """Say that a chunk is being processed; `pages`: first and last, from 1. Raises Cancelled."""
        await self._loaded()
        self._current, self._pages = index, pages
        await self._report()

    async def complete(self, index: int) -> None:
        """Say that a chunk is done; it is not processed again in a later attempt. Raises Cancelled, LeaseLost."""
        done = await self._loaded()
        if index in done:
            return
        await self._job._call("mark_done", keys=[f"{_KEY}{index}"])
        done.add(index)
        self.completed += 1
        await self._report()

    async def fail(self, index: int, error: object, pages: tuple[int, int] | None = None) -> str:
        """Count a failed chunk and return the text about it for people."""
        await self._loaded()
        self.failed += 1
        await self._report()
        return failure_text(index, error, pages)

    def merging(self, name: str = MERGING) -> StageBlock:
        """The stage in which the chunks' results are put together."""
        return StageBlock(self._job, name, None, None, None)

    @property
    def message(self) -> str:
        """What people read."""
        return f"Processing chunk {self.completed}/{self.total}"

    def state(self) -> dict[str, Any]:
        """The object under `metadata.chunk_processing`."""
        pages = self._pages
        return {
            "total_chunks": self.total,
            "completed_chunks": self.completed,
            "failed_chunks": self.failed,
            "current_chunk_index": self._current,
            "current_page_range": None if pages is None else {"start": pages[0], "end": pages[1]},
        }

    async def _loaded(self) -> set[int]:
        if self._done is None:
            keys = await self._job._keys()
            found = {int(key[len(_KEY) :]) for key in keys if key.startswith(_KEY) and key[len(_KEY) :].isdigit()}
            self._done = {index for index in found if index < self.total}
            self.completed = len(self._done)
        return self._done

    async def _report(self) -> None:
        self._job._report(self.completed, self.total, self.message, None, {"chunk_processing": self.state()})
        self._job.raise_if_cancelled()


def failure_text(index: int, error: object, pages: tuple[int, int] | None = None) -> str:
    """`Chunk 5 (pages 101-125) failed: Document AI timeout` for index 4; without pages: `Chunk 5 failed: …`."""
    where = f" (pages {pages[0]}-{pages[1]})" if pages is not None else ""
    text = str(error) or type(error).__name__
    return f"Chunk {index + 1}{where} failed: {text}"
