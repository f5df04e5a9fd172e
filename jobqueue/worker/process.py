"""Child processes for handlers with `executor="process"`: they use another core, and can really be stopped.

    parent (event loop)                                child (main thread runs the handler)
    ProcessPool.call(attempt, target, …) -- run    -->  imports module:qualname once, calls it
                                         <-- call  --   what the handler asks of its job (progress, checkpoint …)
                                         -- reply  -->  the answer
                                         -- tell   -->  an order: cancel, pause
                                         <-- done  --   the result, or the exception

Frames are a length and a pickle on a socket pair. A child serves one job at a time and many one after another; it ends
when the socket closes, so it never outlives its parent, and on Linux the kernel kills it even in the middle of C code.
The child's side is `process_child.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobqueue.errors import HandlerError, Retry

if TYPE_CHECKING:
    from jobqueue.handlers import Handler
    from jobqueue.job import Claim, Job

HEADER = struct.Struct("!Q")
STOP_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
RECYCLE_AFTER = 1000
"""Jobs after which a child is replaced, so that what handlers leak does not add up."""

ORDER_EVERY = 0.1
"""Seconds between looks for an order to pass on to a child."""
RUN_JOB = "jobqueue.worker.process_job:run_job"

Call = Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[Any]]

around_child: ContextVar[tuple[str, Any] | None] = ContextVar("jobqueue_around_child", default=None)
"""What surrounds the handler in its child: a context manager, as `module:qualname`, and its argument."""


class ProcessDied(HandlerError):
    """The child ended in the middle of the job: a crash in C code, `os._exit`, the kernel's memory killer.

    Error class transient: it is tried again like any other error. `exit_code`: negative for a signal.
    """

    error_class = "transient"

    def __init__(self, exit_code: int) -> None:
        how = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        super().__init__(f"the handler's process died: {how}", code="PROCESS_DIED")
        self.exit_code = exit_code


class ProcessStopped(Exception):
    """The attempt was stopped by `ProcessPool.stop`."""


class RemoteTraceback(Exception):
    """The stack of an exception in the child; the cause of the exception that `call` raises."""


class RemoteError(Exception):
    """Stands for an exception of the child that cannot be pickled; `type_name` is its class's name."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name = type_name

    def __str__(self) -> str:
        return f"{self.type_name}: {self.args[1]}"


@dataclass(slots=True)
class _Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    jobs: int = 0
    stopping: bool = False
    killer: asyncio.Task[None] | None = field(default=None, repr=False)

    def send(self, frame: tuple[Any, ...]) -> None:
        body = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        self.writer.write(HEADER.pack(len(body)) + body)

    async def receive(self) -> tuple[Any, ...]:
        (length,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        frame: tuple[Any, ...] = pickle.loads(await self.reader.readexactly(length))  # noqa: S301 - our own child
        return frame


class ProcessPool:
    """At most `size` children, started when they are needed and used again.

    `recycle_after`: jobs a child runs before it is replaced (1,000; None: never). `stop_grace`: seconds a stopped
    handler has for its `finally` blocks (5). Bound to the event loop in which it is first used.
    """

    def __init__(self, size: int, *, recycle_after: int | None = RECYCLE_AFTER, stop_grace: float = STOP_GRACE) -> None:
        self._slots = asyncio.Semaphore(size)
        self._recycle_after = recycle_after
        self._stop_grace = stop_grace
        self._idle: list[_Child] = []
        self._running: dict[str, _Child | None] = {}
        self._stopped: set[str] = set()

    @property
    def pids(self) -> list[int]:
        """The process ids of all children."""
        running = [child for child in self._running.values() if child is not None]
        return [child.process.pid for child in (*self._idle, *running)]

    async def run(self, handler: Handler, job: Job) -> str | None:
        """Run a job's handler in a child and return its result as JSON text.

        What the handler asks of its job goes through the job's channel; its stats and whether it completed the job in a
        transaction of its own are put on `job`. Raises as `call`.
        """
        attempt, channel = str(job.claim.claim_token), job._channel
        forwarding = asyncio.create_task(self._forward_orders(attempt, job))

        async def answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name == "report":
                return channel.report(job, *args)
            return await getattr(channel, name)(job, *args, **kwargs)

        try:
            text, job._stats, job._settled = await self.call(
                attempt, RUN_JOB, handler.reference, _portable_claim(job.claim), channel.connections.dsn,
                around_child.get(), call=answer,
            )  # fmt: skip
        finally:
            forwarding.cancel()
        return text if text is None else str(text)

    async def _forward_orders(self, attempt: str, job: Job) -> None:
        told: str | None = None
        while True:
            order = "cancel" if job.cancel_requested else "pause" if job.pause_requested else None
            child = self._running.get(attempt)
            if order != told and order is not None and child is not None:
                child.send(("tell", order))
                told = order
            await asyncio.sleep(ORDER_EVERY)

    async def call(self, attempt: str, target: str, *arguments: Any, call: Call | None = None) -> Any:
        """Call `target` (`module:qualname`) with pickled arguments in a child and return its pickled result.

        `attempt` names it for `stop` and `tell`. `call(name, args, kwargs)` answers what the child asks meanwhile.
        Raises what the target raised (with its stack as the cause), ConfigurationError if the target cannot be
        imported, ProcessDied if the child died, ProcessStopped after `stop`. If the waiting task is cancelled, the
        child is stopped too.
        """
        self._running[attempt] = None
        try:
            async with self._slots:
                if attempt in self._stopped:
                    raise ProcessStopped(attempt)
                child = self._running[attempt] = await self._take()
                try:
                    child.send(("run", target, arguments))
                    return await self._converse(child, call)
                finally:
                    await self._give_back(child)
        finally:
            self._running.pop(attempt, None)
            self._stopped.discard(attempt)

    def tell(self, attempt: str, order: str) -> None:
        """Pass an order on to a running attempt; nothing happens if it has ended."""
        child = self._running.get(attempt)
        if child is not None:
            child.send(("tell", order))

    def stop(self, attempt: str) -> None:
        """Stop an attempt: SIGTERM to its child, SIGKILL after the grace. Its `call` raises ProcessStopped."""
        if attempt not in self._running:
            return
        self._stopped.add(attempt)
        child = self._running[attempt]
        if child is not None:
            self._terminate(child)

    async def close(self) -> None:
        """End all children; those that run a job are stopped."""
        for attempt in list(self._running):
            self.stop(attempt)
        children, self._idle = self._idle, []
        for child in children:
            child.writer.close()
        await asyncio.gather(*(child.process.wait() for child in children))

    async def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.process.returncode is None and not child.reader.at_eof():
                return child
            child.writer.close()
        return await _spawn()

    async def _converse(self, child: _Child, call: Call | None) -> Any:
        answers: set[asyncio.Task[None]] = set()
        try:
            while True:
                kind, *content = await child.receive()
                if kind == "done":
                    return content[0]
                if kind == "failed":
                    raise content[0] from RemoteTraceback(content[1])
                # Each in a task of its own: a slow answer must not keep the end of the job waiting.
                task = asyncio.create_task(_answer(child, call, *content))
                answers.add(task)
                task.add_done_callback(answers.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            exit_code = await child.process.wait()
            if child.stopping:
                raise ProcessStopped from None
            raise ProcessDied(exit_code) from None
        except asyncio.CancelledError:
            self._terminate(child)
            raise
        finally:
            for task in answers:
                task.cancel()

    async def _give_back(self, child: _Child) -> None:
        child.jobs += 1
        used_up = self._recycle_after is not None and child.jobs >= self._recycle_after
        if not child.stopping and not used_up and child.process.returncode is None:
            self._idle.append(child)
            return
        child.writer.close()
        # A slot is free when its process is gone: otherwise more than `size` would run at a time.
        await asyncio.shield(child.process.wait())
        if child.killer is not None:
            child.killer.cancel()

    def _terminate(self, child: _Child) -> None:
        if child.stopping:
            return
        child.stopping = True
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
        child.killer = asyncio.create_task(self._kill_later(child))

    async def _kill_later(self, child: _Child) -> None:
        await asyncio.sleep(self._stop_grace)
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()


async def _answer(child: _Child, call: Call | None, number: int, name: str, args: Any, kwargs: Any) -> None:
    try:
        if call is None:
            raise RuntimeError(f"nobody answers {name} here")
        reply: tuple[Any, ...] = ("reply", number, await call(name, args, kwargs), None)
    except Exception as error:
        reply = ("reply", number, None, portable(error))
    child.send(reply)


async def _spawn() -> _Child:
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "jobqueue.worker.process_child",
            str(theirs.fileno()),
            str(os.getpid()),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            # The child must find the same modules, also those that only this process's path leads to.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            # Ctrl-C in a terminal is for the worker, which lets its jobs finish.
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        raise Retry(f"no process could be started: {error}") from error
    finally:
        theirs.close()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    return _Child(process, reader, writer)


def _portable_claim(claim: Claim) -> Claim:
    """JSON that was not decoded yet is a view of the answer that it came in, which cannot be pickled."""
    return type(claim)._make(bytes(value) if isinstance(value, memoryview) else value for value in claim)


def portable(error: BaseException) -> BaseException:
    """Return an exception that survives pickling, and does not end the parent: itself, or a RemoteError for it."""
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit | asyncio.CancelledError):
        return RemoteError(type(error).__name__, str(error))
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made one line above
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RemoteError(type(error).__name__, str(error))
