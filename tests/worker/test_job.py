"""What a handler holds, call by call, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobqueue import client, loops
from jobqueue.classify import ChunkFailed
from jobqueue.errors import Cancelled, InvalidArgument, LeaseLost
from jobqueue.handlers import make_handler
from jobqueue.job import Job, Paused
from tests.support.channel import DirectChannel, direct_channel
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def channel(dsn: str) -> AsyncIterator[DirectChannel]:
    async with direct_channel(dsn) as opened:
        yield opened


@pytest.fixture
async def job(channel: DirectChannel, connection: Connection) -> Job:
    connection.execute("select jobqueue.send('work', '{\"pages\": 5}')")
    return await channel.claim("work")


def column(connection: Connection, job: Job, name: str) -> Any:
    return value(connection, f"select {name} from jobqueue.jobs where id = %s", (job.id,))


async def retried(channel: DirectChannel, connection: Connection, job: Job) -> Job:
    """End the attempt as failed, as the worker does, and claim the next one."""
    await job.flush()
    await channel.flush()
    error = '{"class": "transient", "code": "X", "message": "again"}'
    connection.execute("select jobqueue.fail(%s, %s, %s::jsonb, interval '0')", (job.id, job.token, error))
    return await channel.claim("work")


async def test_progress_fills_the_columns(job: Job, channel: DirectChannel, connection: Connection) -> None:
    await job.progress(5, 17, "Processing chunk 5/17", substage="ocr", metadata={"language": "de"})
    await channel.flush()
    found = rows(
        connection,
        "select progress_pct, progress_done, progress_total, progress_message, substage, metadata from jobqueue.jobs",
    )
    assert found == [(29, 5, 17, "Processing chunk 5/17", "ocr", {"language": "de"})]
    await job.progress(pct=130.5)
    await channel.flush()
    assert column(connection, job, "progress_pct") == 100


async def test_a_stage_is_skipped_in_a_later_attempt_only_if_its_output_was_saved(
    job: Job, channel: DirectChannel, connection: Connection
) -> None:
    async with job.stage("scan", of=3) as stage:
        await stage.save({"files": 120})
    async with job.stage("parse"):
        pass
    assert (column(connection, job, "total_stages"), column(connection, job, "completed_stages")) == (3, 2)
    second = await retried(channel, connection, job)
    async with second.stage("scan", of=3) as stage:
        assert (stage.done, stage.output) == (True, {"files": 120})
    async with second.stage("parse") as stage:
        assert not stage.done
        assert column(connection, job, "current_stage") == "parse"


async def test_a_failing_stage_says_why(job: Job, connection: Connection) -> None:
    with pytest.raises(ValueError, match="no text"):
        async with job.stage("ocr"):
            raise ValueError("no text")
    assert rows(connection, "select name, status, error from jobqueue.stages") == [("ocr", "failed", "no text")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: the handler's items take less than the times after which a loop saves and reports."""
    monkeypatch.setattr(loops, "SAVE_EVERY_SECONDS", 600.0)
    monkeypatch.setattr(loops, "REPORT_EVERY_SECONDS", 600.0)


@pytest.mark.usefixtures("quick")
async def test_what_is_done_is_not_done_again(job: Job, channel: DirectChannel, connection: Connection) -> None:
    async def work(job: Job, fail_at: int | None) -> list[int]:
        seen = []
        async for page in job.remaining(range(25), key=str, message="Page {number} of {total}"):
            if page == fail_at:
                break
            seen.append(page)
        return seen

    assert await work(job, fail_at=17) == list(range(17))
    second = await retried(channel, connection, job)
    assert await work(second, fail_at=None) == list(range(17, 25))
    # Ten keys at a time, and what is left at the end of each attempt.
    assert channel.calls.count("mark_done") == 3
    await channel.flush()
    assert column(connection, job, "progress_done") == 25


async def test_an_item_is_saved_while_the_next_one_takes_long(job: Job, channel: DirectChannel) -> None:
    loop = job.remaining(["a", "b"])
    assert await anext(loop) == "a"
    assert await anext(loop) == "b"
    async with asyncio.timeout(60):
        while await channel.keys(job) != {"a"}:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("key", ["", "x" * 1001, "a\0b"])
async def test_keys_that_cannot_be_stored_are_refused(job: Job, key: str) -> None:
    with pytest.raises(InvalidArgument, match="key"):
        await anext(job.remaining([key]))


async def test_a_checkpoint_is_found_by_the_next_attempt(
    job: Job, channel: DirectChannel, connection: Connection
) -> None:
    assert job.last_checkpoint is None
    await job.checkpoint("scanned", {"files": 120, "naïve": "ü"})
    second = await retried(channel, connection, job)

    async def handler(job: Job) -> Any:
        return job.last_checkpoint

    found = await make_handler(handler).invoke(second)
    assert (found.stage, found.data) == ("scanned", {"files": 120, "naïve": "ü"})
    assert found.hash == column(connection, job, "checkpoint_hash")


@pytest.mark.parametrize("damage", ["changed", "missing"])
async def test_a_damaged_checkpoint_file_is_not_used_and_the_job_says_so(
    damage: str, job: Job, channel: DirectChannel, connection: Connection, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    file.write_text("half of the pages")
    await job.checkpoint("ocr", reference=file)
    second = await retried(channel, connection, job)
    await second.prepare()
    assert second.last_checkpoint is not None
    assert second.last_checkpoint.reference == str(file)
    third = await retried(channel, connection, second)
    file.write_text("something else") if damage == "changed" else file.unlink()
    await third.prepare()
    await channel.flush()
    assert third.last_checkpoint is None
    assert column(connection, job, "metadata")["checkpoint_rejected"]["stage"] == "ocr"
    assert "Starting afresh" in column(connection, job, "progress_message")


async def test_damaged_inline_data_are_not_used(job: Job, channel: DirectChannel, connection: Connection) -> None:
    await job.checkpoint("scanned", {"files": 120})
    second = await retried(channel, connection, job)
    connection.execute("update jobqueue.checkpoint set data = '{\"files\": 121}'")
    await second.prepare()
    assert second.last_checkpoint is None


async def test_pause_takes_effect_at_the_next_pause_safe_checkpoint(job: Job, connection: Connection) -> None:
    await job.checkpoint("one", {"n": 1})
    connection.execute("select jobqueue.pause(%s, 'a test')", (job.id,))
    await job.checkpoint("two", {"n": 2}, pause_safe=False)
    async with job.stage("between"):
        pass
    with pytest.raises(Paused):
        await job.checkpoint("three", {"n": 3})
    assert column(connection, job, "checkpoint_stage") == "three"


async def test_a_cancel_is_heard_at_the_next_stage(job: Job, connection: Connection) -> None:
    connection.execute("select jobqueue.cancel(%s, 'a test')", (job.id,))
    with pytest.raises(Cancelled):
        async with job.stage("scan"):
            pytest.fail("the stage ran")
    assert job.cancel_requested


async def test_saved_items_stay_saved_when_a_loop_is_paused(job: Job, channel: DirectChannel) -> None:
    loop = job.remaining(["a", "b", "c"])
    assert [await anext(loop), await anext(loop)] == ["a", "b"]
    job.deliver("pause")
    with pytest.raises(Paused):
        await anext(loop)
    assert await channel.keys(job) == {"a", "b"}


async def test_a_transaction_completes_the_job_with_what_it_writes(job: Job, connection: Connection) -> None:
    connection.execute("create table output (n int)")
    job.stats["rows"] = 1
    async with job.transaction(result={"n": 1}) as mine:
        await mine.execute("insert into output values (1)")
        assert column(connection, job, "status") == "processing"
    assert job.settled
    found = rows(connection, "select status, result, stats, (select count(*) from output) from jobqueue.jobs")
    assert found == [("completed", {"n": 1}, {"rows": 1}, 1)]


async def test_a_transaction_of_a_lost_claim_leaves_nothing(job: Job, connection: Connection) -> None:
    connection.execute("create table output (n int)")
    connection.execute("select jobqueue.cancel(%s, 'a test', force => true)", (job.id,))
    with pytest.raises(LeaseLost):
        async with job.transaction() as mine:
            await mine.execute("insert into output values (1)")
    assert not job.settled
    assert value(connection, "select count(*) from output") == 0


async def test_chunks_read_as_people_expect(job: Job, channel: DirectChannel, connection: Connection) -> None:
    chunks = job.chunks(17)
    async for index in chunks:
        if index < 10:
            async with chunks.chunk(index, pages=(25 * index + 1, 25 * index + 25)):
                pass
        elif index == 10:
            async with chunks.chunk(index, pages=(251, 275), keep_going=True):
                raise TimeoutError("Document AI timeout")
        else:
            await chunks.start(index, (276, 300))
            break
    await channel.flush()
    assert column(connection, job, "progress_pct") == 58
    assert column(connection, job, "progress_message") == "Processing chunk 10/17"
    assert column(connection, job, "metadata")["chunk_processing"] == {
        "total_chunks": 17,
        "completed_chunks": 10,
        "failed_chunks": 1,
        "current_chunk_index": 11,
        "current_page_range": {"start": 276, "end": 300},
    }
    async with chunks.merging():
        assert column(connection, job, "current_stage") == "Merging OCR results"
    second = await retried(channel, connection, job)
    assert [index async for index in second.chunks(17)] == list(range(10, 17))
    with pytest.raises(ChunkFailed, match=r"^Chunk 5 \(pages 101-125\) failed: Document AI timeout$"):
        async with second.chunks(17).chunk(4, pages=(101, 125)):
            raise TimeoutError("Document AI timeout")


async def test_the_blocking_form_does_the_same_from_a_thread(
    job: Job, channel: DirectChannel, connection: Connection, tmp_path: Path
) -> None:
    def handler(job: Job) -> list[int]:
        with job.sync.stage("scan", of=2) as stage:
            seen = list(job.sync.remaining(range(3)))
            stage.save({"seen": len(seen)})
        job.sync.progress(1, 2, "half")
        job.sync.checkpoint("scanned", {"n": 3})
        job.sync.estimate(12)
        with job.sync.transaction(result={"n": 3}) as mine:
            client.blocking(client.fetch(mine, "select 1"))
        return seen

    assert await asyncio.to_thread(make_handler(handler).invoke, job) == [0, 1, 2]
    assert column(connection, job, "status") == "completed"
    assert column(connection, job, "checkpoint_stage") == "scanned"
    assert await channel.keys(job) == {"0", "1", "2"}


@pytest.mark.usefixtures("quick")
async def test_track_reports_without_counting_in_the_handler(
    job: Job, channel: DirectChannel, connection: Connection
) -> None:
    assert [page async for page in job.track("abc", message="Page {number} of {total}")] == ["a", "b", "c"]
    await channel.flush()
    assert column(connection, job, "progress_pct") == 100
    assert column(connection, job, "progress_message") == "Page 1 of 3"
