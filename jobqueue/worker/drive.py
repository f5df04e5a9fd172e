"""Driving a coroutine inside a task that it shares with others.

A worker calls many handlers, most of them short. A task for each costs more than such a handler itself; so one task runs
one handler after the other, each in a context of its own (its context variables do not leak into the next).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any


@types.coroutine
def drive(
    coroutine: Coroutine[Any, Any, Any], context: Context, suspended: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """Run a coroutine in a context, within the current task; `suspended` is called when it waits for the first time."""
    try:
        awaited = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    suspended()
    while True:
        try:
            value = yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            try:
                awaited = context.run(coroutine.throw, error)
            except StopIteration as stop:
                return stop.value
        else:
            try:
                awaited = context.run(coroutine.send, value)
            except StopIteration as stop:
                return stop.value
