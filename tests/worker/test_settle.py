"""The ends that a worker writes: what is not written, or cannot be, must be found by rescue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from jobqueue import App, Job
from jobqueue.job import Claim
from jobqueue.worker.held import ClaimNote, Held
from jobqueue.worker.settle import Settler
from tests.sql.engine import PERMANENT, WORKER, Engine, Row
from tests.worker.test_worker import app, eventually, query, running

__all__ = ["app", "query"]

WAITING = "select exists (select from pg_locks where not granted and locktype in ('tuple', 'transactionid'))"


def held_of(rows: Sequence[Row]) -> list[Held]:
    """The jobs of one claim, as a worker holds them."""
    note, handler = ClaimNote(rows[0]["claim_id"], len(rows)), None
    claims = [Claim(**{**row, "id": str(row["id"]), "claim_token": str(row["claim_token"])}) for row in rows]
    return [Held(claim, handler, note, 0.0) for claim in claims]  # type: ignore[arg-type]


async def test_a_worker_that_dies_between_the_ends_of_a_flush_leaves_jobs_that_rescue_finds(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    engine = Engine(connection, dsn)
    for _ in range(4):
        engine.send()
    done, failed, asked, last = held_of(engine.prefetch(4, start=4))
    settler = Settler(dsn, str(WORKER), lambda jobs, done: None)
    with psycopg.connect(dsn) as somebody:
        somebody.execute("select from jobqueue.job where id = %s for update", [failed.id])
        settler.complete(done, None, None)
        settler.fail(failed, PERMANENT, None)
        settler.acknowledge(asked)
        settler.complete(last, None, None)
        settler.start()
        await eventually(lambda: engine.value(WAITING))
        await settler.stop(patience=0.0)  # as if it were killed here
    under_way = "select count(*) from jobqueue.job j where status = 'processing'"
    noted = " and exists (select from jobqueue.claim_batch b where j.id = any (b.job_ids))"
    assert engine.value(under_way) == engine.value(under_way + noted) > 0

    # Nothing was asked of the one, so that its attempt goes on without its worker; the claim's note has to stay.
    settler = Settler(dsn, str(WORKER), lambda jobs, done: None)
    for held in (done, failed, asked, last):
        held.settled = False
    settler.complete(done, None, None)
    settler.fail(failed, PERMANENT, None)
    settler.acknowledge(asked)
    settler.complete(last, None, None)
    settler.start()
    assert await settler.stop()
    statuses = [engine.job(held.id)["status"] for held in (done, failed, asked, last)]  # type: ignore[arg-type]
    assert statuses == ["completed", "failed", "processing", "completed"]
    assert engine.value(under_way + noted) == 1


async def test_a_job_that_a_fenced_worker_gives_up_is_rescued(
    app: App, connection: psycopg.Connection[Any], dsn: str
) -> None:
    engine, started = Engine(connection, dsn), asyncio.Event()

    @app.job("wait")
    async def wait(job: Job) -> None:
        started.set()
        await asyncio.sleep(60)

    sent = await app.send("wait")
    async with running(app) as worker, asyncio.timeout(60):
        await started.wait()
        worker.quiet()
        worker._fence(True)
        await eventually(lambda: not worker.held)
        worker._fence(False)
        assert engine.status(sent.id) == "processing"
        engine.lose_lease(sent.id)
        await eventually(lambda: engine.status(sent.id) == "pending")


@pytest.mark.parametrize("pooler", [False, True], ids=["direct", "as behind a pooler"])
async def test_a_job_that_somebody_holds_keeps_no_other_result_from_being_written(
    dsn: str, connection: psycopg.Connection[Any], pooler: bool
) -> None:
    engine = Engine(connection, dsn)
    for _ in range(6):
        engine.send()
    held = held_of(engine.prefetch(6, start=6))
    settler = Settler(dsn, str(WORKER), lambda jobs, done: None, pooler=pooler)
    status = "select array_agg(status order by created_at, id) from jobqueue.job"
    with psycopg.connect(dsn) as somebody:
        somebody.execute("select from jobqueue.job where id = any (%s) for update", [[held[1].id, held[4].id]])
        for job in held[:3]:
            settler.complete(job, '"done"', None)
        for job in held[3:]:
            settler.fail(job, PERMANENT, None)
        settler.start()
        try:
            written = ["completed", "processing", "completed", "failed", "processing", "failed"]
            await eventually(lambda: engine.value(status) == written)
            later = held_of(engine.prefetch(1, start=1)) if engine.send() else []
            settler.complete(later[0], None, None)
            await eventually(lambda: engine.job(later[0].id)["status"] == "completed")  # type: ignore[arg-type]
            assert engine.value(status)[:6] == written
            somebody.rollback()
            await eventually(lambda: engine.value(status)[:6] == ["completed"] * 3 + ["failed"] * 3)
            assert engine.job(held[1].id)["result"] == "done"  # type: ignore[arg-type]
        finally:
            assert await settler.stop()
