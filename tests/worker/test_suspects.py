"""Jobs that have lost a worker: they run soon again, also where there is always something else to do."""

from __future__ import annotations

import asyncio

from jobqueue import App
from tests.worker.test_worker import Query, app, eventually, query, running

__all__ = ["app", "query"]

CLAIM = "select id from jobqueue.claim('{unlucky}', gen_random_uuid(), 1)"
LOSE = "update jobqueue.job set lease_until = now() - interval '1 s' where id = %s returning id"
DUE = "update jobqueue.claim_batch set check_at = now() - interval '1 s' where %s = any (job_ids) returning id"
LEFT = "select count(*) filter (where job_type = 'busy' and status = 'pending') from jobqueue.job"


async def test_a_lost_job_does_not_wait_until_a_busy_worker_has_nothing_else_to_do(app: App, query: Query) -> None:
    """Its worker has all slots taken and others of its own in line, all the time."""
    left_when_it_ran: list[int] = []

    @app.job("busy")
    async def busy() -> None:
        await asyncio.sleep(0.005)

    @app.job("unlucky")
    async def unlucky() -> None:
        left_when_it_ran.append(query(LEFT))

    for queue in ("busy", "unlucky"):
        query("select 1 from jobqueue.create_queue(%s)", queue)
    lost = query("select id from jobqueue.send('unlucky')")
    assert query(CLAIM) == lost
    await app.send_many("busy", [None] * 4000)
    async with running(app, concurrency=2) as worker:
        await eventually(lambda: worker.status().state == "working")
        await eventually(lambda: worker._runner.ready and worker.free_slots() == 0 and worker.suspects_allowed())
        query(LOSE, lost)
        query(DUE, lost)
        query("select jobqueue.rescue(10)")
        await eventually(lambda: left_when_it_ran)
    assert left_when_it_ran[0] > 0


async def test_a_lost_job_is_not_taken_where_no_slot_becomes_free(app: App, query: Query) -> None:
    """It would wait for hours behind jobs that take hours, and be lost once more if that worker dies."""
    go_on = asyncio.Event()

    @app.job("slow")
    async def slow() -> None:
        await go_on.wait()

    await app.send_many("slow", [None] * 2)
    async with running(app, concurrency=2) as worker:
        await eventually(lambda: worker.status().state == "working")
        await eventually(lambda: worker.free_slots() == 0)
        assert worker.suspects_allowed() == 0
        go_on.set()
        await eventually(lambda: worker.status().done == 2)
        assert worker.suspects_allowed() == 1


async def test_after_a_lost_job_the_next_one_is_asked_for_at_once(app: App, query: Query) -> None:
    """They come one by one; and without waiting for the poll, which is far away here."""
    go_on = asyncio.Event()

    @app.job("unlucky")
    async def unlucky() -> None: ...

    @app.job("slow")
    async def slow() -> None:
        await go_on.wait()

    for queue in ("slow", "unlucky"):
        query("select 1 from jobqueue.create_queue(%s)", queue)
    lost = [query("select id from jobqueue.send('unlucky')") for _ in range(5)]
    assert query("select count(*) from jobqueue.claim('{unlucky}', gen_random_uuid(), 5)") == 5
    async with running(app, concurrency=3, poll=600) as worker:
        await eventually(lambda: worker.status().state == "working")
        await app.send_many("slow", [None] * 2)
        await eventually(lambda: worker.free_slots() == 1)
        for id in lost:
            query(LOSE, id)
            query(DUE, id)
        query("select jobqueue.rescue(10)")
        await eventually(lambda: worker.status().done == 5)
        assert worker.suspects_allowed() == 1
        go_on.set()
    assert query("select count(distinct started_at) from jobqueue.job where queue = 'unlucky'") == 5
