"""Running handlers: in the event loop, in threads and in child processes.

A runner is a task that takes one job after the other from the line of ready ones. There are as many runners as jobs that
wait for something: when a handler waits for the first time, the next runner is started, up to the concurrency. So a
thousand handlers that never wait share one task, and a thousand that do have one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from jobqueue.classify import Classifier, failure_of
from jobqueue.errors import Cancelled, LeaseLost, Snooze
from jobqueue.job import Job, Paused
from jobqueue.json_text import from_json
from jobqueue.worker.drive import drive
from jobqueue.worker.held import Held, Stop

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
        self.running: set[Held] = set()
        self.held_back = False
        self._settler, self._channel, self._changed = settler, channel, changed
        self._classify, self._processes, self._hooks = classify, processes, hooks
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: ThreadPoolExecutor | None = None
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
    def busy_slots(self) -> int:
        """Slots in use."""
        return len(self._tasks)

    async def close(self) -> None:
        """End all runners and threads; for handlers that do not end the process does not wait."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

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
            if held.settled:
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
            if not held.settled:
                jobs.append(held)
        return jobs

    def _begin(self, held: Held, interrupt: Callable[[], object]) -> Job:
        held.started = True
        held.started_at = held.life = self._loop.time()
        held.interrupt = interrupt
        job = held.job = Job(held.claim, self._channel)
        self.running.add(held)
        return job

    # -- async -----------------------------------------------------------------------------------------------------------

    async def _run_async(self, held: Held, task: asyncio.Task[None]) -> None:
        job = self._begin(held, task.cancel)
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
            self.running.discard(held)
            held.interrupt = None

    async def _run_batch(self, jobs: list[Held], task: asyncio.Task[None]) -> None:
        handler = jobs[0].handler
        # A batch is one call: it is stopped for all of its jobs or for none.
        batch = [self._begin(held, task.cancel) for held in jobs]
        context = copy_context()
        invoke = handler.invoke_batch if handler.executor == "async" else self._threaded(handler.invoke_batch)
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
        else:
            if any(held.stop is not None for held in jobs):
                await _absorb_cancel(task)
        finally:
            for held in jobs:
                self.running.discard(held)
                held.interrupt = None

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
        job = self._begin(held, task.cancel)
        self.spawn()
        calls: list[asyncio.Future[Any]] = []
        context = copy_context()
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
            for call in calls:
                if not call.done():
                    await self._outlive(held, call)
        else:
            if held.stop is not None:
                await _absorb_cancel(task)
        finally:
            self.running.discard(held)
            held.interrupt = None

    async def _hooked(self, handler: Handler, job: Job, context: Context, calls: list[asyncio.Future[Any]]) -> Any:
        """Run a handler in a thread or a process, with the hooks around it here; `calls` gets what cannot be stopped."""

        async def invoke(given: Job) -> Any:
            if handler.executor == "process":
                text = await self._in_process(handler, given)
                return None if text is None else from_json(text.encode())
            # What the hooks have put into the context goes with it into the thread.
            call = asyncio.ensure_future(self._in_thread(copy_context().run, handler.invoke, given))
            calls.append(call)
            return await asyncio.shield(call)

        if self._hooks is None:
            return await invoke(job)
        return await drive(context.run(self._hooks.around(handler, invoke), job), context, _nothing)

    async def _in_process(self, handler: Handler, job: Job) -> str | None:
        assert self._processes is not None
        return await self._processes.run(handler, job)

    def _threaded(self, function: Callable[..., Any]) -> Callable[[Any], Any]:
        async def call(argument: Any) -> Any:
            return await self._in_thread(copy_context().run, function, argument)

        return call

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="jobqueue-handler")
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    async def _outlive(self, held: Held, call: asyncio.Future[Any]) -> None:
        """A thread cannot be stopped: its job is settled already, and its slot stays taken until it ends."""
        logger.warning("job %s: its thread goes on after it was stopped; the slot stays taken", held.id)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await call

    # -- ends ------------------------------------------------------------------------------------------------------------

    async def _ended_badly(self, jobs: Sequence[Held], error: BaseException, task: asyncio.Task[None]) -> None:
        if isinstance(error, asyncio.CancelledError):
            stop = next((held.stop for held in jobs if held.stop is not None), None)
            if stop is None and task.cancelling() > 0:
                for held in jobs:
                    self._settler.release(held)
                raise error
            task.uncancel()
        elif isinstance(error, KeyboardInterrupt):
            raise error
        for held in jobs:
            await self._save_keys(held)
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

    def _give_up(self, held: Held) -> None:
        if held.stop is Stop.CANCEL and held.handler.executor != "async" and not held.abandoned:
            # Threads and processes are asked first; now a process is stopped and a thread is left to itself.
            held.abandoned = True
            if held.interrupt is not None:
                held.interrupt()
            return
        logger.warning("job %s does not stop; its attempt ends without it and its slot stays taken", held.id)
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
