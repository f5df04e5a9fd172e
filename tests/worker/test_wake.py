"""Waking: nothing is missed, one doorman at a time, and no session lock or LISTEN where they cannot work."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest

from jobqueue.worker import wake as module
from jobqueue.worker.wake import Wake
from tests.support.relay import relay
from tests.support.server import arows

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
BOUND = 60.0
NEVER = 600.0
"""A poll interval that no test waits for: what is found was found by being woken."""

ARMED = """
    select count(distinct pid) from pg_locks where locktype = 'advisory' and classid = 27249 and granted
        and database = (select oid from pg_database where datname = current_database())
"""
WAITING = """
    select count(distinct pid) from pg_locks where locktype = 'advisory' and classid = 27250 and not granted
        and database = (select oid from pg_database where datname = current_database())
"""


@pytest.fixture(autouse=True)
def patient_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no pooler: none of these wakes falls back to polling because its canary came late."""
    monkeypatch.setattr(module, "CANARY_TIMEOUT", BOUND)


@asynccontextmanager
async def waking(dsn: str | None, queues: list[str] | None, poll: float = NEVER) -> AsyncIterator[Wake]:
    wake = Wake(dsn, queues, poll)
    wake.start()
    try:
        yield wake
    finally:
        await wake.stop()


@pytest.fixture
async def queue(aconnection: Connection) -> str:
    await make_queue(aconnection, "letters")
    return "letters"


async def make_queue(connection: Connection, name: str) -> None:
    await connection.execute("select jobqueue.cancel(id, 'made the queue') from jobqueue.send(%s)", (name,))


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(BOUND):
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            await asyncio.sleep(0.01)
    raise AssertionError(what)


async def count(connection: Connection, query: str) -> int:
    ((number,),) = await arows(connection, query)
    assert isinstance(number, int)
    return number


async def send(connection: Connection, queue: str = "letters") -> None:
    await connection.execute("select from jobqueue.send(%s)", (queue,))


async def sleep_deep(wake: Wake) -> None:
    """Wait until the worker is armed and past its ladder: from here on only a bell or a notification wakes it."""
    async with asyncio.timeout(BOUND):
        while not (wake.armed and wake._rung >= len(module.LADDER)):
            await wake.wait()


async def test_an_idle_worker_is_asked_to_claim_once_right_after_arming(dsn: str, queue: str) -> None:
    async with waking(dsn, [queue]) as wake:
        async with asyncio.timeout(BOUND):
            await wake.wait()
        assert wake.armed
        assert wake.status == "listening"


async def test_after_arming_it_looks_again_at_growing_distances(dsn: str, queue: str) -> None:
    async with waking(dsn, [queue], poll=NEVER) as wake:
        await wake.wait()
        waits = []
        for _ in module.LADDER:
            began = time.monotonic()
            await wake.wait()
            waits.append(time.monotonic() - began)
        assert all(wait >= step * 0.99 for wait, step in zip(waits, module.LADDER, strict=True)), waits
        asleep = asyncio.create_task(wake.wait())
        done, _ = await asyncio.wait({asleep}, timeout=0.3)
        assert not done
        wake.ring()
        await asyncio.wait_for(asleep, BOUND)


async def test_a_send_wakes_it_and_only_of_its_own_queues(dsn: str, queue: str, aconnection: Connection) -> None:
    await make_queue(aconnection, "other")
    async with waking(dsn, [queue]) as wake:
        await sleep_deep(wake)
        asleep = asyncio.create_task(wake.wait())
        async with aconnection.transaction():  # in a transaction a notification is always sent
            await send(aconnection, "other")
        done, _ = await asyncio.wait({asleep}, timeout=0.3)
        assert not done
        await send(aconnection, queue)
        await asyncio.wait_for(asleep, BOUND)


async def test_none_means_every_queue_that_exists(dsn: str, queue: str, aconnection: Connection) -> None:
    async with waking(dsn, None) as wake:
        await sleep_deep(wake)
        asleep = asyncio.create_task(wake.wait())
        await send(aconnection, queue)
        await asyncio.wait_for(asleep, BOUND)


async def test_senders_do_not_notify_while_everybody_is_busy(dsn: str, queue: str, aconnection: Connection) -> None:
    async with waking(dsn, [queue]) as wake:
        await wake.wait()
        assert await count(aconnection, ARMED) == 1
        await wake.busy()
        assert await count(aconnection, ARMED) == 0
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as listener:
            await listener.execute("listen jobqueue_ready")
            quick = slow = 0
            while quick < 20:
                # With a parameter, as drivers send: the time of the statement is then later than that of the transaction.
                sent = "select statement_timestamp() > now() + interval '5 ms' from jobqueue.send(%s)"
                ((exceeds_margin,),) = await arows(aconnection, sent, ("letters",))
                # On a busy machine a call may exceed the margin, and then it notifies for nothing.
                slow, quick = slow + exceeds_margin, quick + (not exceeds_margin)
            await aconnection.execute("notify jobqueue_ready, 'the end'")
            heard = []
            async with asyncio.timeout(BOUND):
                async for notification in listener.notifies():
                    heard.append(notification.payload)
                    if heard[-1] == "the end":
                        break
            assert heard == ["letters"] * slow + ["the end"]


async def claim_until_empty(wake: Wake, connection: Connection, found: list[str]) -> None:
    """A claimer: claims whenever it is woken, and notes what it found."""
    worker = "00000000-0000-0000-0000-000000000001"
    while True:
        rows = await arows(connection, "select id::text from jobqueue.claim('{letters}', %s, 10)", (worker,))
        if rows:
            await wake.busy()
            found += [id for (id,) in rows]
        else:
            await wake.wait()


@pytest.mark.parametrize("in_transaction", [False, True], ids=["autocommit", "transaction"])
async def test_no_send_is_missed(dsn: str, queue: str, in_transaction: bool) -> None:
    found, sent = list[str](), list[str]()
    async with AsyncExitStack() as stack:
        sender, claimer = [
            await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True))
            for _ in range(2)
        ]
        wake = await stack.enter_async_context(waking(dsn, [queue]))
        work = asyncio.create_task(claim_until_empty(wake, claimer, found))
        for _ in range(300):
            if in_transaction:
                async with sender.transaction():
                    ((id,),) = await arows(sender, "select id::text from jobqueue.send('letters')")
                    await asyncio.sleep(random.uniform(0, 0.004))
            else:
                ((id,),) = await arows(sender, "select id::text from jobqueue.send('letters')")
            sent.append(id)
            await asyncio.sleep(random.choice([0, 0.001, 0.005, 0.015, 0.03]))
        # Nobody polls: what neither its notification nor the looks right after arming find is never found.
        await until(lambda: len(found) >= len(sent), "every job is found")
        work.cancel()
    assert sorted(found) == sorted(sent)


async def test_ten_idle_workers_have_one_doorman_and_the_next_takes_over(
    dsn: str, queue: str, aconnection: Connection
) -> None:
    async with AsyncExitStack() as stack:
        wakes = [await stack.enter_async_context(waking(dsn, [queue])) for _ in range(10)]
        sleepers = {wake: asyncio.create_task(sleep_deep(wake)) for wake in wakes}
        for _ in range(3):
            everybody = len(sleepers)
            await until(lambda: any(wake.armed for wake in sleepers), "one is armed")

            async def others_wait(expected: int = everybody - 1) -> bool:
                return await count(aconnection, WAITING) == expected

            await until(others_wait, "the others wait at the door")
            assert await count(aconnection, ARMED) == 1
            assert sum(wake.armed for wake in sleepers) == 1
            doorman = next(wake for wake in sleepers if wake.armed)
            sleepers.pop(doorman).cancel()
            await doorman.busy()
            assert not doorman.armed
        for task in sleepers.values():
            task.cancel()


async def test_going_to_work_from_the_queue_at_the_door(dsn: str, queue: str, aconnection: Connection) -> None:
    async with waking(dsn, [queue]) as first, waking(dsn, [queue]) as second:
        await first.wait()
        asleep = asyncio.create_task(second.wait())
        await until(lambda: second._state == "at the door", "the second waits at the door")
        second.ring()
        await asleep
        await second.busy()
        assert await count(aconnection, WAITING) == 0
        again = asyncio.create_task(second.wait())
        await until(lambda: second._state == "at the door", "the second waits again")
        await first.busy()
        await asyncio.wait_for(again, BOUND)
        assert second.armed


async def test_workers_of_other_queues_have_a_door_of_their_own(dsn: str, queue: str, aconnection: Connection) -> None:
    await make_queue(aconnection, "other")
    async with waking(dsn, [queue]) as first, waking(dsn, ["other"]) as second:
        await asyncio.wait_for(asyncio.gather(first.wait(), second.wait()), BOUND)
        assert first.armed
        assert second.armed


async def test_waiting_at_the_door_does_not_hold_back_vacuum(dsn: str, queue: str, aconnection: Connection) -> None:
    horizon = """
        select min(age(backend_xmin)) from pg_stat_activity
        where application_name = 'jobqueue wake' and backend_xmin is not null and datname = current_database()
    """
    async with waking(dsn, [queue]) as first, waking(dsn, [queue]) as second:
        await first.wait()
        asleep = asyncio.create_task(second.wait())
        await until(lambda: second._state == "at the door", "the second waits at the door")

        async def snapshot_is_new(than: int) -> bool:
            ages = await arows(aconnection, horizon)
            return ages[0][0] is None or ages[0][0] < than

        for _ in range(20):
            await aconnection.execute("select pg_current_xact_id()")
        await until(lambda: snapshot_is_new(20), "its snapshot moves on while it waits")
        assert second._state == "at the door"
        asleep.cancel()


async def test_it_recovers_when_its_backend_is_killed(dsn: str, queue: str, aconnection: Connection) -> None:
    async with waking(dsn, [queue]) as wake:
        await sleep_deep(wake)
        killed = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'jobqueue wake'"
        assert await arows(aconnection, killed) == [(True,)]
        await until(lambda: not wake.armed, "the loss is noticed")
        await sleep_deep(wake)
        asleep = asyncio.create_task(wake.wait())
        await send(aconnection, queue)
        await asyncio.wait_for(asleep, BOUND)


async def test_the_killed_doorman_is_replaced(dsn: str, queue: str, aconnection: Connection) -> None:
    async with waking(dsn, [queue]) as first, waking(dsn, [queue]) as second:
        await first.wait()
        next_one = asyncio.create_task(second.wait())
        await until(lambda: second._state == "at the door", "the second waits at the door")
        await aconnection.execute(
            "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and classid = 27249"
        )
        await asyncio.wait_for(next_one, BOUND)
        assert second.armed


async def test_without_notifications_it_only_polls_and_holds_no_lock(
    dsn: str, queue: str, aconnection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANARY_TIMEOUT", 0.3)
    with relay(dsn, drop_notifications=True) as pooler:
        async with waking(pooler.dsn, [queue], poll=0.2) as wake:
            asleep = asyncio.create_task(wake.wait())
            await until(lambda: wake.status == "polling", "it notices that nothing arrives")
            assert await count(aconnection, ARMED) == 0
            await asyncio.wait_for(asleep, BOUND)
            await asyncio.wait_for(wake.wait(), BOUND)
            await wake.busy()


async def test_without_a_direct_connection_it_only_polls() -> None:
    async with waking(None, ["letters"], poll=0.05) as wake:
        assert wake.status == "polling"
        await asyncio.wait_for(wake.wait(), BOUND)


async def test_a_silent_server_does_not_keep_a_worker_from_its_work(dsn: str, queue: str) -> None:
    with relay(dsn) as between:
        async with waking(between.dsn, [queue]) as wake:
            await wake.wait()
            between.flowing.clear()
            await asyncio.wait_for(wake.busy(), BOUND)
            between.flowing.set()
            await sleep_deep(wake)
