"""Driving handlers inside a shared task."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context

import pytest

from jobqueue.worker.drive import drive

variable: ContextVar[str] = ContextVar("variable", default="outside")


async def test_a_coroutine_runs_in_its_own_context_also_after_it_waited() -> None:
    async def handler() -> str:
        variable.set("inside")
        await asyncio.sleep(0)
        return variable.get()

    assert await drive(handler(), copy_context(), lambda: None) == "inside"
    assert variable.get() == "outside"


async def test_it_tells_once_that_it_waits_and_not_if_it_never_does() -> None:
    told: list[str] = []

    async def waits() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def never() -> int:
        return 1

    await drive(waits(), copy_context(), lambda: told.append("waits"))
    assert await drive(never(), copy_context(), lambda: told.append("never")) == 1
    assert told == ["waits"]


async def test_a_cancellation_reaches_the_coroutine_and_time_outs_inside_it_work() -> None:
    cleaned: list[str] = []

    async def handler() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(30)
        except TimeoutError:
            cleaned.append("timed out")
        await asyncio.sleep(30)
        return "never"

    task = asyncio.ensure_future(drive(handler(), copy_context(), lambda: None))
    while not cleaned:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_pass_through() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        await drive(fails(), copy_context(), lambda: None)
