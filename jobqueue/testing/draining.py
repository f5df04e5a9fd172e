"""Run what is ready, in this process, with a real worker."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from jobqueue.app import App
from jobqueue.durations import DurationLike
from jobqueue.errors import TimedOut
from jobqueue.hooks import FailedAttempt, HookRegistration
from jobqueue.job import Job
from jobqueue.testing.clock import travel

MOST_ROUNDS = 1_000
PROMOTE = "select promoted from jobqueue.promote(1000)"
MAINTAIN = (
    "select count(*) from jobqueue.maintain(null, array['rescue', 'expire', 'batches', 'admission', 'schedules'])"
)
DUE_IN = "select jobqueue.seconds_until(jobqueue.next_due())"


@dataclasses.dataclass(frozen=True, slots=True)
class Drained:
    """What `drain` did."""

    completed: int
    """Jobs that completed."""
    failures: tuple[tuple[Job, FailedAttempt], ...]
    """Every attempt that failed, in order; `failure.error` is what the handler raised, `failure.will_retry` what follows."""

    def raise_first(self) -> None:
        """Raise what the first failed handler raised, if one failed; for tests that expect none."""
        for job, failure in self.failures:
            raise failure.error or AssertionError(f"{job.job_type} failed: {failure.code}: {failure.message}")


async def drain(
    app: App,
    *,
    queues: Sequence[str] | None = None,
    delayed: bool = False,
    concurrency: int = 10,
    timeout: DurationLike = 60.0,
) -> Drained:
    """Run all jobs that are ready, and those that they send, until nothing is; then return what happened.

    `queues`: default all. `delayed`: also what waits for its time (delays, retries, snoozes), after a `travel` to that
    time; a clock that is `frozen` moves there.
    `concurrency`: handlers at a time (10; 1 runs them in order). `timeout`: seconds for all of it (60). First the
    maintenance is done that a worker would do now and then: rescue of lost jobs, expiry, ticks of schedules.

    A handler that raises fails its job and nothing else: see `Drained.failures`. Raises TimedOut with what still runs.
    """
    from jobqueue.durations import parse_duration

    seconds = parse_duration(timeout)
    failures: list[tuple[Job, FailedAttempt]] = []
    completed = 0
    hooks = HookRegistration()
    hooks.hooks = dataclasses.replace(app.hooks, on_failure=list(app.hooks.on_failure))
    hooks.on_failure(lambda job, failure: failures.append((job, failure)))
    for _ in range(MOST_ROUNDS):
        await _make_ready(app)
        completed += await _work(app, queues, concurrency, hooks.hooks, seconds)
        due_in = await _scalar(app, DUE_IN) if delayed else None
        if due_in is None:
            return Drained(completed, tuple(failures))
        await asyncio.to_thread(travel, app, max(due_in, 0.000_001))
    raise TimedOut(f"after {MOST_ROUNDS} rounds jobs are still put off", hint="A handler that snoozes for ever?")


def drain_sync(app: App, **options: Any) -> Drained:
    """The blocking form of `drain`, for tests without an event loop."""

    async def run() -> Drained:
        try:
            return await drain(app, **options)
        finally:
            await app.close()

    return asyncio.run(run())


async def _make_ready(app: App) -> None:
    while await _scalar(app, PROMOTE) == 1000:
        pass
    await _scalar(app, MAINTAIN)


async def _work(app: App, queues: Sequence[str] | None, concurrency: int, hooks: Any, seconds: float) -> int:
    worker = await app.make_worker(queues, concurrency, until_idle=True, hooks=hooks, drain_timeout=0.0)
    task = asyncio.create_task(worker.run())
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            await task
            return worker.status().done
        running = ", ".join(sorted({held.claim.job_type for held in worker.held.values()})) or "nothing"
        raise TimedOut(
            f"the queues were not empty after {seconds:g} s; running: {running}", hint="Give drain a longer timeout."
        )
    finally:
        worker.release_now()
        await asyncio.wait({task})


async def _scalar(app: App, query: str) -> Any:
    async with app._lend(None) as lent:
        row = await (await lent.execute(query.encode())).fetchone()
    assert row is not None
    return row[0]
