"""Tracking by the worker: what goes out when, from coroutines, threads and processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from jobqueue import App, Job, NullJob
from jobqueue.errors import ConfigurationError, InvalidArgument, LeaseLost
from jobqueue.estimates import estimate_defaults
from jobqueue.job import Claim
from jobqueue.loops import REPORT_EVERY_SECONDS
from jobqueue.stages import Stage
from jobqueue.worker.bucket import BURST, rate_of
from jobqueue.worker.channel import WorkerChannel
from jobqueue.worker.held import Held
from jobqueue.worker.orders import Orders
from tests.support.channel import CLAIM, WORKER, DirectChannel, direct_channel
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def channel(dsn: str) -> AsyncIterator[DirectChannel]:
    async with direct_channel(dsn) as opened:
        yield opened


@pytest.fixture
async def job(channel: DirectChannel, connection: Connection) -> Job:
    connection.execute("select jobqueue.send('work')")
    return await channel.claim("work")


async def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.01)


async def test_a_thousand_reporting_jobs_cost_one_notifying_commit_per_flush(dsn: str, connection: Connection) -> None:
    """And there are nine flushes a second (tests/unit/test_bucket.py): P9 allows ten."""
    connection.execute(
        "select jobqueue.send_many('work', (select jsonb_agg('{}'::jsonb) from generate_series(1, 1000)))"
    )
    query = CLAIM.as_string(connection).replace(" 1, 1, null, null)", " 1000, 1000, null, null)")
    claims = [Claim(*row) for row in connection.execute(query.encode(), ("work", WORKER)).fetchall()]
    handler: Any = None
    held = {claim.id: Held(claim, handler, None, 0.0) for claim in claims}  # type: ignore[arg-type]
    channel = WorkerChannel(dsn, WORKER, held, lambda orders: None)
    connection.execute("select jobqueue.watch('all')")
    connection.execute("listen jobqueue_jobs")
    jobs = [Job(claim, channel) for claim in claims]
    for done in range(3):
        for job in jobs:
            await job.progress(done, 10, f"item {done}")
    before = channel.statements
    await channel.flush()
    assert channel.statements == before + 1
    # Nothing but the latest word, and all of it from one transaction.
    assert rows(
        connection, "select count(*), count(distinct xmin::text), min(version), max(version) from jobqueue.job"
    ) == [(1000, 1, 3, 3)]
    heard = list(connection.notifies(timeout=60, stop_after=9))
    assert len({note.pid for note in heard}) == 1
    assert value(connection, "select count(*) from jobqueue.jobs where progress_message = 'item 2'") == 1000
    # Saving done keys sends no report of its own: it waits for the flush of all.
    await jobs[0].progress(5, 10)
    await channel.call(jobs[0], "mark_done", keys=["a"])
    assert channel.has_report(jobs[0].claim.id)
    # Jobs that end together send their last words together.
    for job in jobs:
        await job.progress(9, 10, "the end")
    before = channel.statements
    await asyncio.gather(*(channel.finish(job.claim.id) for job in jobs))
    assert channel.statements <= before + 2
    assert value(connection, "select count(*) from jobqueue.jobs where progress_message = 'the end'") == 1000
    assert 1 / REPORT_EVERY_SECONDS <= 4
    await channel.stop()


async def test_what_an_earlier_attempt_still_says_is_not_taken_for_the_next_ones(
    dsn: str, connection: Connection
) -> None:
    connection.execute("select jobqueue.send('work')")
    orders: list[Any] = []
    async with direct_channel(dsn) as direct:
        job = await direct.claim("work")
    earlier = Job(job.claim._replace(claim_token=str(uuid4())), job._channel)
    held = Held(job.claim, None, None, 0.0)  # type: ignore[arg-type]
    channel = WorkerChannel(dsn, WORKER, {held.id: held}, orders.extend)
    await Job(earlier.claim, channel).progress(message="too late")
    assert not channel.has_report(held.id)
    assert held.life == 0.0
    with pytest.raises(LeaseLost):
        await channel.call(earlier, "stage", stage="scan", status="in_progress")
    # And what was on its way when the next attempt came is dropped, with what the database says of it.
    channel._reports[held.id] = {"id": held.id, "token": earlier.claim.claim_token, "message": "too late"}
    await channel.flush()
    await channel._send([{"id": held.id, "token": earlier.claim.claim_token, "message": "too late"}])
    assert orders == []
    await Job(job.claim, channel).progress(message="in time")
    await channel.flush()
    assert value(connection, "select progress_message from jobqueue.jobs") == "in time"
    await channel.stop()


async def test_a_flood_of_reports_is_sent_as_often_as_the_bucket_allows_and_first_at_once(
    dsn: str, connection: Connection
) -> None:
    connection.execute("select jobqueue.send('work')")
    async with direct_channel(dsn) as direct:
        claim = (await direct.claim("work")).claim
    held = Held(claim, None, None, 0.0)  # type: ignore[arg-type]
    channel = WorkerChannel(dsn, WORKER, {held.id: held}, lambda orders: None)
    job, message = Job(claim, channel), "select progress_message from jobqueue.jobs"
    channel.start()
    await job.progress(message="the first")
    await eventually(lambda: value(connection, message) == "the first")
    before, began, said = channel.statements, time.monotonic(), 0
    while time.monotonic() - began < 1.0 or channel.statements < before + 2:
        assert time.monotonic() - began < 60, "the reports are not sent"
        said += 1
        await job.progress(message=f"number {said}")
        await asyncio.sleep(0.002)
    flushes, took = channel.statements - before, time.monotonic() - began
    assert flushes <= BURST + 1 + took * rate_of(1)
    await channel.stop()
    assert value(connection, message) == f"number {said}"


async def test_a_workers_own_reports_are_no_orders_for_it(dsn: str) -> None:
    beats: list[None] = []
    orders = Orders(dsn, lambda: ["a"], lambda: beats.append(None), own={7})
    orders._heard(psycopg.Notify("jobqueue_jobs", '[["a", 2], ["b", 1]]', 7))
    assert not beats
    orders._heard(psycopg.Notify("jobqueue_jobs", '[["a", 3]]', 8))
    assert len(beats) == 1


async def test_a_held_back_report_goes_out_while_the_next_item_takes_long(job: Job, channel: DirectChannel) -> None:
    for loop in (job.track("abc", message="{number} of {total}"), job.remaining("abc", message="{number} of {total}")):
        channel.messages.clear()
        assert [await anext(loop), await anext(loop)] == ["a", "b"]
        await eventually(lambda: "2 of 3" in channel.messages)


async def test_a_loop_inside_of_a_chunk_reports_nothing(
    job: Job, channel: DirectChannel, connection: Connection
) -> None:
    chunks = job.chunks(2)
    async for index in chunks:
        async with chunks.chunk(index, pages=(1, 25)):
            assert [page async for page in job.remaining("ab", key=lambda page: f"{index}{page}", report=False)] == [
                "a",
                "b",
            ]
    await channel.flush()
    assert rows(connection, "select progress_done, progress_total, progress_message from jobqueue.jobs") == [
        (2, 2, "Processing chunk 2/2")
    ]


async def test_what_went_wrong_is_counted_and_a_substage_ends(
    job: Job, channel: DirectChannel, connection: Connection
) -> None:
    await job.progress(7, 10, failed=2)
    async with job.stage("embedding") as stage:
        await stage.substage("Embedding chunk 234 of 500", 234, 500)
        await channel.flush()
        assert rows(connection, "select substage, progress_done, metadata from jobqueue.jobs") == [
            ("Embedding chunk 234 of 500", 234, {"failed": 2})
        ]
        await stage.substage(None)
        await channel.flush()
        assert value(connection, "select substage from jobqueue.jobs") is None


async def test_units_reach_the_estimate_of_the_stage_they_belong_to(job: Job, connection: Connection) -> None:
    await job.estimate(120, stage="ocr")
    await job.estimate(3)
    assert rows(connection, "select stage, units from jobqueue.pace order by stage") == [("", 3), ("ocr", 120)]
    with pytest.raises(InvalidArgument):
        await job.estimate(-1)


async def test_stages_are_declared_by_name_and_weight(dsn: str) -> None:
    app = App(dsn)

    @app.job("work", stages=[Stage("scan"), Stage("ocr", weight=5), "merge"])
    async def work() -> None: ...

    sent = await app.send("work")
    record = await app.get(sent.id)
    assert (record.total_stages, record.completed_stages) == (3, 0)
    await app.close()
    assert Stage("ocr", 5) == {"name": "ocr", "weight": 5}


async def test_loops_work_without_a_job() -> None:
    job = NullJob()
    assert [item async for item in job.remaining([1, 2], report=False)] == [1, 2]
    assert await asyncio.to_thread(lambda: list(job.sync.track([1, 2], message="{number}"))) == [1, 2]
    assert await asyncio.to_thread(lambda: list(job.sync.remaining([1, 2]))) == [1, 2]
    await job.estimate(5)


def test_estimates_come_from_the_environment() -> None:
    environment = {
        "JOBQUEUE_ESTIMATE__PROCESS_DOCUMENT__OCR_MS": "3000",
        "JOBQUEUE_ESTIMATE__PROCESS_DOCUMENT__OCR_MS_PER_UNIT": " 150.5 ",
        "JOBQUEUE_ESTIMATE__EXPORT_MS": "",
        "JOBQUEUE_DSN": "",
    }
    assert estimate_defaults(environment) == {
        "PROCESS_DOCUMENT__OCR_MS": 3000,
        "PROCESS_DOCUMENT__OCR_MS_PER_UNIT": 150.5,
    }
    for name, wrong in (("A__B", "1"), ("A_MS", "soon"), ("A_MS", "-1"), ("A_MS", "nan")):
        with pytest.raises(ConfigurationError, match=name):
            estimate_defaults({f"JOBQUEUE_ESTIMATE__{name}": wrong})


PROCESSES = App()


@PROCESSES.job("slow_pages", executor="process", max_retries=2)
def slow_pages(job: Job, payload: dict[str, str]) -> list[int]:
    """Nine items at once; the tenth takes for ever in the first attempt."""
    seen = []
    for page in job.sync.remaining(range(12), message="Page {number} of {total}"):
        if page == 9 and job.attempt == 1:
            with open(payload["pid"], "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        seen.append(page)
    return seen


async def test_a_process_that_is_killed_has_saved_what_it_had_done_two_seconds_before(
    dsn: str, connection: Connection, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine keys are fewer than ten: only the two seconds save them, while the handler does something else."""
    monkeypatch.setattr(PROCESSES, "_dsn", dsn)
    sys.modules.setdefault("tests.worker.test_tracking", sys.modules[__name__])
    note = tmp_path / f"pid{uuid4().hex}"
    sent = await PROCESSES.send("slow_pages", {"pid": str(note)}, retry_delay=0)
    task = asyncio.create_task(PROCESSES.run_worker(until_idle=True, concurrency=1))
    try:
        done = "select count(*) from jobqueue.done_key"
        await eventually(lambda: value(connection, done) == 9)
        # The held-back report is out too.
        shown = "select progress_message from jobqueue.jobs"
        await eventually(lambda: value(connection, shown) == "Page 10 of 12")
        await eventually(note.read_text)
        os.kill(int(note.read_text()), signal.SIGKILL)
        query = "select status, result, attempt from jobqueue.jobs where id = %s"
        await eventually(lambda: rows(connection, query, (sent.id,))[0][0] == "completed")
        assert rows(connection, query, (sent.id,)) == [("completed", [9, 10, 11], 2)]
    finally:
        async with asyncio.timeout(60):
            await task
        await PROCESSES.close()
