"""Threads for handlers that are plain functions: one per call under way, kept for the next call.

They are daemons, and no `ThreadPoolExecutor`: the interpreter joins the threads of one when it exits, so a handler that
never ends would keep a worker that was told to stop from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Call = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Threads:
    """The threads of one event loop. `run` and `close` are for the loop's thread.

    `prefix`: of their names. There are as many as calls were ever under way at once: whoever calls bounds them.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._numbers = itertools.count()
        self._idle = self._alive = 0

    def run(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Call a function in a thread; the future has what it returns or raises. A cancelled future stops nothing."""
        called = self._loop.create_future()
        if self._idle:
            self._idle -= 1
        else:
            self._alive += 1
            name = f"{self._prefix}-{next(self._numbers)}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        self._calls.put((called, function, arguments))
        return called

    def close(self) -> None:
        """Let the threads end: those without work at once, the others after their call. Nothing is waited for."""
        for _ in range(self._alive):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            called, function, arguments = call
            result, error = None, None
            try:
                result = function(*arguments)
            except BaseException as raised:
                error = _fit_for_a_future(raised)
            # The loop may be closed before a handler ends: then nobody waits for it any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._done, called, result, error)
            # Nothing of a call may live on in a thread that waits for the next one.
            del call, called, function, arguments, result, error

    def _done(self, called: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._idle += 1
        if called.done():
            return
        if error is not None:
            called.set_exception(error)
        else:
            called.set_result(result)


def _fit_for_a_future(error: BaseException) -> BaseException:
    """A future refuses a StopIteration, and would never be done."""
    if not isinstance(error, StopIteration):
        return error
    replaced = RuntimeError("the handler raised StopIteration")
    replaced.__cause__ = error
    return replaced
