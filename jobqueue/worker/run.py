"""Running handlers: in the event loop, in threads and in child processes.

A runner is a task that takes one job after the other from the line of ready ones. There are as many runners as jobs that
wait for something: when a handler waits for the first time, the next runner is started, up to the concurrency. So a
thousand handlers that never wait share one task, and a thousand that do have one each.

An attempt may end before its handler does: a thread cannot be stopped. Its slot stays taken until it has ended, and no
other attempt of the same job is started beside it in this process. One that comes back while the handler is just about
to end (it settled its job itself, say) waits here for that moment; behind a stuck one it is left to other workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from jobqueue.classify import Classifier, failure_of
from jobqueue.errors import Cancelled, LeaseLost, Snooze
from jobqueue.job import Job, Paused
from jobqueue.json_text import from_json
from jobqueue.worker.drive import drive
from jobqueue.worker.held import Held, Stop
from jobqueue.worker.threads import Threads

if TYPE_CHECKING:
    from jobqueue.handlers import Handler
    from jobqueue.worker.channel import WorkerChannel
    from jobqueue.worker.hooks import JobHooks
    from jobqueue.worker.process import ProcessPool
    from jobqueue.worker.settle import Settler

YIELD_AFTER = 32
"""Jobs that one runner may run without waiting before the event loop gets its turn."""
GRACE_SECONDS = 5.0
"""How long a handler may take to stop when it is told to, before its attempt is ended without it."""
LEFT_SECONDS = (1.0, 30.0)
"""How long an attempt is left to other workers while an earlier handler of its job runs here: at least, and at most."""
LEFT_SHARE = 0.25
"""And in between: this much of the time since the earlier attempt ended, so that a thread that never ends costs little."""

logger = logging.getLogger(__name__)


class Runner:
    """The handlers of a worker under way. All its methods are for the event loop's thread."""

    def __init__(
        self,
        concurrency: int,
        settler: Settler,
        channel: WorkerChannel,
        changed: Callable[[], None],
        *,
        classify: Classifier | None = None,
        processes: ProcessPool | None = None,
        hooks: JobHooks | None = None,
    ) -> None:
        self.concurrency = concurrency
        self.ready: deque[Held] = deque()
        self.held_back = False
        self.stuck: list[Held] = []
        """Those whose attempts have ended, and that still run after a time of grace; as of the last `watch`."""
        self.stuck_slots = 0
        """The slots that they hold; a batch holds one."""
        # by job id: from the start of a handler until it has really ended
        self._at_work: dict[str, Held] = {}
        self.parked: dict[str, Held] = {}
        """By job id: those that start as soon as the handler of the attempt before has ended."""
        self._settler, self._channel, self._changed = settler, channel, changed
        self._classify, self._processes, self._hooks = classify, processes, hooks
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: Threads | None = None
        self._loop = asyncio.get_running_loop()

    def start(self, jobs: Sequence[Held]) -> None:
        """Put claimed jobs into the line; suspects first, they were not meant to wait here."""
        for held in jobs:
            if held.claim.suspect:
                self.ready.appendleft(held)
            else:
                self.ready.append(held)
        self.spawn()

    def spawn(self) -> None:
        """Start another runner if jobs are ready and a slot is free."""
        if self.ready and len(self._tasks) < self.concurrency and not self.held_back:
            task = asyncio.create_task(self._run_ready(), name="jobqueue-runner")
            self._tasks.add(task)
            task.add_done_callback(self._gone)

    @property
    def running(self) -> Collection[Held]:
        """Jobs whose handlers run, also those whose attempts have ended already."""
        return self._at_work.values()

    @property
    def busy_slots(self) -> int:
        """Slots in use; a handler that outlives its attempt keeps its own."""
        return len(self._tasks)

    async def close(self) -> None:
        """End all runners and threads; for handlers that do not end the process does not wait."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        if self._threads is not None:
            self._threads.close()

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a runner ended unexpectedly", exc_info=task.exception())
        self.spawn()
        self._changed()

    async def _run_ready(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        ran = 0
        while self.ready and not self.held_back:
            held = self.ready.popleft()
            if not self._may_start(held):
                continue
            if held.handler.takes_batch:
                await self._run_batch(self._gather(held), task)
            elif held.handler.executor == "async":
                await self._run_async(held, task)
            else:
                await self._run_elsewhere(held, task)
            ran += 1
            if ran % YIELD_AFTER == 0:
                self._changed()
                await asyncio.sleep(0)

    def _gather(self, first: Held) -> list[Held]:
        """Take more jobs of the same type from the front of the line, up to the size of a batch."""
        jobs, most = [first], first.handler.batch_size
        while self.ready and len(jobs) < most and self.ready[0].handler is first.handler:
            held = self.ready.popleft()
            if self._may_start(held):
                jobs.append(held)
        return jobs

    def _may_start(self, held: Held) -> bool:
        """Whether it is still ours, and no earlier handler of the same job is at work."""
        if held.settled:
            return False
        earlier = self._at_work.get(held.id)
        if earlier is None:
            return True
        if earlier.settled and earlier.stop is None and earlier.outlived_at is None:
            self.parked[held.id] = held
        else:
            self._leave(held, earlier)
        return False

    def _leave(self, held: Held, earlier: Held) -> None:
        """Give an attempt to other workers, without spending a retry: two handlers of a job would get in each other's way."""
        if not earlier.settled:
            # Whoever has claimed the job anew has taken it from the earlier attempt, also if that was this worker.
            earlier.ask_stop(Stop.LOST)
            if self._hooks is not None:
                self._hooks.lost(earlier)
        now = self._loop.time()
        least, most = LEFT_SECONDS
        seconds = min(most, max(least, (now - (earlier.outlived_at or earlier.stop_asked_at or now)) * LEFT_SHARE))
        text = "job %s: an earlier attempt's handler still runs here; left to other workers for %.0f s"
        logger.info(text, held.id, seconds, extra={"event": "job.left", "job_id": held.id})
        self._settler.snooze(held, seconds)

    def _begin(self, held: Held, task: asyncio.Task[None]) -> Job:
        held.started = True
        held.started_at = held.life = self._loop.time()
        held.slot, held.interrupt = task, task.cancel
        job = held.job = Job(held.claim, self._channel)
        self._at_work[held.id] = held
        return job

    def _ended(self, held: Held) -> None:
        del self._at_work[held.id]
        held.slot = held.interrupt = None
        parked = self.parked.pop(held.id, None)
        if parked is not None:
            self.ready.appendleft(parked)
            self.spawn()

    # -- async -----------------------------------------------------------------------------------------------------------

    async def _run_async(self, held: Held, task: asyncio.Task[None]) -> None:
        job = self._begin(held, task)
        handler = held.handler
        context = copy_context()
        invoke = handler.invoke if self._hooks is None else self._hooks.around(handler, handler.invoke)
        try:
            result = await drive(context.run(invoke, job), context, self.spawn)
            if self._channel.has_report(held.id):
                await self._last_word(held)
            if job.settled:
                self._settler.forget(held)
            else:
                self._settler.complete(held, handler.encode_result(result), job.stats_text())
            if self._hooks is not None:
                await self._after(held, result, context)
        except BaseException as error:
            await self._ended_badly([held], error, task)
        else:
            if held.stop is not None:
                await _absorb_cancel(task)
        finally:
            self._ended(held)

    async def _run_batch(self, jobs: list[Held], task: asyncio.Task[None]) -> None:
        handler = jobs[0].handler
        # A batch is one call: it is stopped for all of its jobs or for none.
        batch = [self._begin(held, task) for held in jobs]
        context, calls = copy_context(), list[asyncio.Future[Any]]()
        invoke = handler.invoke_batch if handler.executor == "async" else self._threaded(handler.invoke_batch, calls)
        if self._hooks is not None:
            invoke = self._hooks.around(handler, invoke)
        if handler.executor != "async":
            self.spawn()
        try:
            result = await drive(context.run(invoke, batch), context, self.spawn)
            for held in jobs:
                if self._channel.has_report(held.id):
                    await self._last_word(held)
            await self._settle_batch(handler, jobs, result, context)
        except BaseException as error:
            await self._ended_badly(jobs, error, task)
            await self._outlive(jobs, calls)
        else:
            if any(held.stop is not None for held in jobs):
                await _absorb_cancel(task)
            await self._outlive(jobs, calls)
        finally:
            for held in jobs:
                self._ended(held)

    async def _settle_batch(self, handler: Handler, jobs: list[Held], result: Any, context: Context) -> None:
        """A batch handler returns None (all are done) or one result per job; an exception among them fails that job."""
        results = [None] * len(jobs) if result is None else list(result)
        if len(results) != len(jobs):
            raise ValueError(f"the batch handler {handler.name} returned {len(results)} results for {len(jobs)} jobs")
        for held, value in zip(jobs, results, strict=True):
            job = held.job
            assert job is not None
            if job.settled:
                self._settler.forget(held)
            elif isinstance(value, BaseException):
                self._fail(held, value)
            else:
                self._settler.complete(held, handler.encode_result(value), job.stats_text())
        if self._hooks is not None:
            for held, value in zip(jobs, results, strict=True):
                if not isinstance(value, BaseException):
                    await self._after(held, value, context)

    async def _after(self, held: Held, result: Any, context: Context) -> None:
        assert self._hooks is not None
        if held.job is not None and self._hooks.has_after(held.handler):
            await drive(context.run(self._hooks.after, held.handler, held.job, result), context, self.spawn)

    # -- threads and processes -------------------------------------------------------------------------------------------

    async def _run_elsewhere(self, held: Held, task: asyncio.Task[None]) -> None:
        handler = held.handler
        job = self._begin(held, task)
        self.spawn()
        context, calls = copy_context(), list[asyncio.Future[Any]]()
        try:
            if self._hooks is None and handler.executor == "process":
                text = await self._in_process(handler, job)
            else:
                result = await self._hooked(handler, job, context, calls)
                text = handler.encode_result(result)
            if self._channel.has_report(held.id):
                await self._last_word(held)
            if job.settled:
                self._settler.forget(held)
            else:
                self._settler.complete(held, text, job.stats_text())
            if self._hooks is not None:
                await self._after(held, result, context)
        except BaseException as error:
            await self._ended_badly([held], error, task)
            await self._outlive([held], calls)
        else:
            if held.stop is not None:
                await _absorb_cancel(task)
            await self._outlive([held], calls)
        finally:
            self._ended(held)

    async def _hooked(self, handler: Handler, job: Job, context: Context, calls: list[asyncio.Future[Any]]) -> Any:
        """Run a handler in a thread or a process, with the hooks around it here; `calls` gets what cannot be stopped."""

        in_thread = self._threaded(handler.invoke, calls)

        async def in_process(given: Job) -> Any:
            text = await self._in_process(handler, given)
            return None if text is None else from_json(text.encode())

        invoke = in_process if handler.executor == "process" else in_thread
        if self._hooks is None:
            return await invoke(job)
        return await drive(context.run(self._hooks.around(handler, invoke), job), context, _nothing)

    async def _in_process(self, handler: Handler, job: Job) -> str | None:
        assert self._processes is not None
        return await self._processes.run(handler, job)

    def _threaded(
        self, function: Callable[..., Any], calls: list[asyncio.Future[Any]]
    ) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Return a function that runs `function` in a thread; `calls` gets what cannot be stopped."""

        async def call(argument: Any) -> Any:
            if self._threads is None:
                self._threads = Threads("jobqueue-handler")
            # What the hooks have put into the context goes with it into the thread.
            called = self._threads.run(copy_context().run, function, argument)
            calls.append(called)
            return await asyncio.shield(called)

        return call

    async def _outlive(self, jobs: Sequence[Held], calls: Sequence[asyncio.Future[Any]]) -> None:
        """Wait for threads that go on after their attempts have ended, so that their slot stays taken until they end."""
        late = [call for call in calls if not call.done()]
        if not late:
            return
        for held in jobs:
            held.outlived_at, held.interrupt = self._loop.time(), None
            if held.job is not None:
                # Then it stops by itself where it says next how far it is.
                held.job.deliver("lost")
            parked = self.parked.pop(held.id, None)
            if parked is not None and not parked.settled:
                self._leave(parked, held)
        await asyncio.wait(late)
        for held in self.stuck:
            if held in jobs:
                took = self._loop.time() - (held.outlived_at or 0.0)
                logger.info("job %s: its handler has ended, %.0f s after its attempt", held.id, took)

    # -- ends ------------------------------------------------------------------------------------------------------------

    async def _ended_badly(self, jobs: Sequence[Held], error: BaseException, task: asyncio.Task[None]) -> None:
        if isinstance(error, asyncio.CancelledError):
            stop = next((held.stop for held in jobs if held.stop is not None), None)
            if stop is None and task.cancelling() > 0:
                for held in jobs:
                    self._settler.release(held)
                raise error
            while task.cancelling():
                task.uncancel()
        elif isinstance(error, KeyboardInterrupt):
            raise error
        for held in jobs:
            # From here on nothing may interrupt: the ends would not be written.
            held.interrupt = None
        for held in jobs:
            await self._save_keys(held)
        for held in jobs:
            self.end(held, error)

    async def _save_keys(self, held: Held) -> None:
        """What a handler has done and said and not saved yet is saved before its attempt ends, unless that takes too long."""
        if held.job is None or held.stop in (Stop.LOST, Stop.FENCED):
            return
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await held.job.flush()
        except Exception as error:
            logger.warning("job %s: the last done keys were not saved: %s", held.id, error)
        await self._last_word(held)

    async def _last_word(self, held: Held) -> None:
        """The latest progress of a job is always sent, before its end is."""
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await self._channel.finish(held.id)
        except Exception as error:
            logger.warning("job %s: its last progress was not stored: %s", held.id, error)

    def end(self, held: Held, error: BaseException | None) -> None:
        """Settle an attempt that did not complete: by what stopped it, else by what its handler raised."""
        stop, job = held.stop, held.job
        if held.settled:
            return
        if (job is not None and job.settled) or stop in (Stop.LOST, Stop.FENCED) or isinstance(error, LeaseLost):
            self._settler.forget(held)
        elif stop is Stop.RELEASE:
            self._settler.release(held)
        elif stop in (Stop.CANCEL, Stop.PAUSE) or isinstance(error, Paused):
            self._settler.acknowledge(held)
        elif isinstance(error, Cancelled):
            if job is not None and job.cancel_requested:
                self._settler.acknowledge(held)
            else:
                self._settler.cancel(held, str(error))
        elif stop is Stop.TIMEOUT:
            self._settler.fail(held, timeout_error(held), None)
        elif isinstance(error, Snooze):
            self._settler.snooze(held, error.delay)
        else:
            self._fail(held, error or RuntimeError("the handler ended without a result"))

    def _fail(self, held: Held, error: BaseException) -> None:
        failure = failure_of(error, held.handler.classify or self._classify)
        held.error = error if self._hooks is not None else None
        self._settler.fail(held, failure.as_error(), failure.retry_in)

    def watch(self) -> None:
        """Look after the running handlers: stop those whose time is over, end the attempts of those that do not stop."""
        now = self._loop.time()
        for held in list(self.running):
            if held.stop is None:
                deadline = held.deadline()
                if deadline is not None and now >= deadline:
                    held.ask_stop(Stop.TIMEOUT)
            elif now - held.stop_asked_at > GRACE_SECONDS and not held.settled:
                self._give_up(held)
        late = [held for held in self.running if held.outlived_at is not None]
        self.stuck = [held for held in late if now - (held.outlived_at or now) >= GRACE_SECONDS]
        self.stuck_slots = len({held.slot for held in self.stuck})

    def _give_up(self, held: Held) -> None:
        if held.stop is Stop.CANCEL and held.handler.executor != "async" and not held.abandoned:
            # Threads and processes are asked first; now a process is stopped and a thread is left to itself.
            held.abandoned = True
            if held.interrupt is not None:
                held.interrupt()
            return
        held.outlived_at = held.stop_asked_at
        self.end(held, None)


def _nothing() -> None:
    """A handler elsewhere waits at once; its runner has made room for the next one already."""


async def _absorb_cancel(task: asyncio.Task[None]) -> None:
    """The handler finished although its task was cancelled: the cancellation must not hit the next one."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.cancelling():
        task.uncancel()


def timeout_error(held: Held) -> dict[str, Any]:
    """Return the error of an attempt that took too long."""
    claim = held.claim
    if claim.timeout is not None and held.life + claim.timeout <= held.stop_asked_at:
        text = f"No sign of life from the handler for {claim.timeout:g} s."
    else:
        text = f"The handler ran longer than {claim.max_runtime or 0:g} s."
    return {"class": "transient", "code": "TIMEOUT", "message": text, "detail": None}
