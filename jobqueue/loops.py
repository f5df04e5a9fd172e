"""The loops of a job: `job.track(…)` reports each item, `job.remaining(…)` also remembers which ones are done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from jobqueue.errors import InvalidArgument

if TYPE_CHECKING:
    from jobqueue.job import Job

T = TypeVar("T")

SAVE_EVERY_KEYS = 10
SAVE_EVERY_SECONDS = 2.0
REPORT_EVERY_SECONDS = 0.25

logger = logging.getLogger(__name__)


async def track(
    job: Job, items: Iterable[T] | AsyncIterable[T], message: str | None, total: int | None
) -> AsyncIterator[T]:
    """See `Job.track`."""
    total = total if total is not None else _length(items)
    done, reported = 0, 0.0
    async for item in _each(items):
        if (now := time.monotonic()) - reported >= REPORT_EVERY_SECONDS:
            await job.progress(done, total, _render(message, done, total))
            reported = now
        job.raise_if_cancelled()
        yield item
        done += 1
    await job.progress(done, total)


class Remaining:
    """One loop over `job.remaining(…)`: which keys are done and not saved yet."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._keys: list[str] = []
        self._saved_at = time.monotonic()
        self._timer: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()

    async def iterate(
        self, items: Iterable[T] | AsyncIterable[T], key: Callable[[T], object], message: str | None
    ) -> AsyncIterator[T]:
        job, total = self._job, _length(items)
        done_before = await job._channel.keys(job)
        done, reported = 0, 0.0
        async for item in _each(items):
            name = _checked_key(key(item))
            if name not in done_before:
                if (now := time.monotonic()) - reported >= REPORT_EVERY_SECONDS:
                    await job.progress(done, total, _render(message, done, total))
                    reported = now
                yield item
                self._keys.append(name)
                await self._save_if_due()
            done += 1
        await self.save()
        await job.progress(done, total)
        job.obey()

    async def save(self) -> None:
        """Save what is not saved; if that fails the keys are kept for the next time."""
        timer, self._timer = self._timer, None
        if timer is not None and timer is not asyncio.current_task():
            timer.cancel()
        # One at a time: whoever ends the attempt must wait for what is under way.
        async with self._saving:
            await self._save_now()

    async def _save_now(self) -> None:
        keys, self._keys = self._keys, []
        self._saved_at = time.monotonic()
        if not keys:
            return
        try:
            await self._job._channel.call(self._job, "mark_done", keys=keys)
        except BaseException:
            self._keys = keys + self._keys
            raise

    async def _save_if_due(self) -> None:
        job = self._job
        due = len(self._keys) >= SAVE_EVERY_KEYS or time.monotonic() - self._saved_at >= SAVE_EVERY_SECONDS
        if due or job._command is not None:
            await self.save()
            job.obey()
        elif self._timer is None:
            # The next item may take an hour: what is done before it must not wait for its end.
            self._timer = asyncio.get_running_loop().create_task(self._save_later())

    async def _save_later(self) -> None:
        await asyncio.sleep(max(0.0, self._saved_at + SAVE_EVERY_SECONDS - time.monotonic()))
        # From here on a save() of the loop must not cancel the statement under way.
        self._timer = None
        try:
            await self.save()
        except Exception:
            logger.warning("done keys of job %s could not be saved yet", self._job.claim.id, exc_info=True)


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _length(items: object) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _render(message: str | None, done: int, total: int | None) -> str | None:
    return message and message.format(done=done, number=done + 1, total=total)


def _checked_key(value: object) -> str:
    name = str(value)
    if not 1 <= len(name) <= 1000 or "\0" in name:
        raise InvalidArgument("a key must have 1 to 1,000 characters and no NUL", hint="Pass key= to job.remaining.")
    return name
