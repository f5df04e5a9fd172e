"""The loops of a job: `job.track(…)` reports each item, `job.remaining(…)` also remembers which ones are done.

A handler that loops counts neither items nor seconds. A report goes out at most four times a second; one that was held
back goes out a quarter of a second later, even if the next item takes an hour. Done keys go out likewise, every ten
items or two seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jobqueue.errors import InvalidArgument

if TYPE_CHECKING:
    from jobqueue.tracked import Tracked

T = TypeVar("T")
Action = Callable[[], Coroutine[Any, Any, None]]

SAVE_EVERY_KEYS = 10
SAVE_EVERY_SECONDS = 2.0
REPORT_EVERY_SECONDS = 0.25

logger = logging.getLogger(__name__)


class Timer(Protocol):
    """Does something a little later, once, while the handler is at its item."""

    def arm(self, seconds: float, action: Action) -> None:
        """Do it after so many seconds, unless something waits to be done already. What it raises is logged."""

    def cancel(self) -> None:
        """Not any more; what has begun is left to end."""


class TaskTimer:
    """In the event loop that the handler runs in."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def arm(self, seconds: float, action: Action) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._fire(seconds, action))

    def cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _fire(self, seconds: float, action: Action) -> None:
        await asyncio.sleep(seconds)
        # From here on cancel() must not stop the statement under way.
        self._task = None
        try:
            await action()
        except Exception as error:
            _note_failure(error)


class ThreadTimer:
    """In a thread: a handler in a process has no event loop that runs while it works. `run`: as `BlockingJob._run`."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._run = run
        self._timer: threading.Timer | None = None
        self._last: threading.Timer | None = None

    def arm(self, seconds: float, action: Action) -> None:
        if self._timer is None:
            self._timer = self._last = threading.Timer(seconds, self._fire, (action,))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Not any more, and what has begun has ended when this returns."""
        self.cancel()
        if self._last is not None and self._last is not threading.current_thread():
            self._last.join()

    def _fire(self, action: Action) -> None:
        self._timer = None
        try:
            self._run(action())
        except Exception as error:
            _note_failure(error)


class NoTimer:
    """For a job without a database: nothing is ever held back."""

    def arm(self, seconds: float, action: Action) -> None:
        return None

    def cancel(self) -> None:
        return None


class Reporter:
    """The progress of one loop: at most four reports a second, the latest always."""

    def __init__(self, job: Tracked, message: str | None, total: int | None, timer: Timer) -> None:
        self._job, self._message, self._total, self._timer = job, message, total, timer
        self._done = 0
        self._sent_at = 0.0
        self._held_back = False
        job._begin_loop(self)

    def begin(self, done: int) -> None:
        """The item after `done` others begins."""
        self._done = done
        since = time.monotonic() - self._sent_at
        if since >= REPORT_EVERY_SECONDS:
            self._timer.cancel()
            self._send()
        else:
            self._held_back = True
            self._timer.arm(REPORT_EVERY_SECONDS - since, self.finish)

    def end(self, done: int) -> None:
        """There is no further item."""
        self._timer.cancel()
        self._job._end_loop(self)
        self._job._report(done, self._total, None)

    async def finish(self) -> None:
        """Send what was held back, now and not later."""
        self._timer.cancel()
        if self._held_back:
            self._send()

    def _send(self) -> None:
        self._held_back = False
        self._sent_at = time.monotonic()
        self._job._report(self._done, self._total, _render(self._message, self._done, self._total))


async def track(
    job: Tracked, items: Iterable[T] | AsyncIterable[T], message: str | None, total: int | None, timer: Timer
) -> AsyncIterator[T]:
    """See `Job.track`."""
    reporter = Reporter(job, message, total if total is not None else _length(items), timer)
    done = 0
    try:
        async for item in _each(items):
            reporter.begin(done)
            job.raise_if_cancelled()
            yield item
            done += 1
        reporter.end(done)
        job.raise_if_cancelled()
    finally:
        timer.cancel()


class Remaining:
    """One loop over `job.remaining(…)`: which keys are done and not saved yet."""

    def __init__(self, job: Tracked, make_timer: Callable[[], Timer]) -> None:
        self._job = job
        self._make_timer = make_timer
        self._timer = make_timer()
        self._keys: list[str] = []
        self._saved_at = time.monotonic()
        self._saving = asyncio.Lock()
        job._begin_loop(self)

    async def iterate(
        self, items: Iterable[T] | AsyncIterable[T], key: Callable[[T], object], message: str | None, report: bool
    ) -> AsyncIterator[T]:
        job = self._job
        reporter = Reporter(job, message, _length(items), self._make_timer()) if report else None
        done_before = await job._keys()
        done = 0
        async for item in _each(items):
            name = _checked_key(key(item))
            if name not in done_before:
                if reporter is not None:
                    reporter.begin(done)
                job.raise_if_cancelled()
                yield item
                self._keys.append(name)
                await self._save_if_due()
            done += 1
        await self.finish()
        job._end_loop(self)
        if reporter is not None:
            reporter.end(done)
        job.obey()

    async def finish(self) -> None:
        """Save what is not saved; if that fails the keys are kept for the next time."""
        self._timer.cancel()
        # One at a time: whoever ends the attempt must wait for what is under way.
        async with self._saving:
            await self._save_now()

    async def _save_now(self) -> None:
        keys, self._keys = self._keys, []
        self._saved_at = time.monotonic()
        if not keys:
            return
        try:
            await self._job._call("mark_done", keys=keys)
        except BaseException:
            self._keys = keys + self._keys
            raise

    async def _save_if_due(self) -> None:
        job = self._job
        waited = time.monotonic() - self._saved_at
        if len(self._keys) >= SAVE_EVERY_KEYS or waited >= SAVE_EVERY_SECONDS or job._asked is not None:
            await self.finish()
            job.obey()
        else:
            # The next item may take an hour: what is done before it must not wait for its end.
            self._timer.arm(SAVE_EVERY_SECONDS - waited, self.finish)


def _note_failure(error: Exception) -> None:
    logger.warning("progress or done keys could not be saved yet: %s", " ".join(str(error).split()))


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
