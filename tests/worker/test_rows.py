"""What the product promises about tracking, row by row (S1 to S8, S11 to S15), as a user of the product would try it.

Each test is an application with a worker of its own. S9 and S10 are shown by the examples.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import BaseModel

from jobqueue import App, InvalidTransition, Job, NullJob, PermanentError
from jobqueue.stages import Stage
from tests.support.application import has, rows, seen, work, working

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[App]:
    """An application with fast retries: its tests say when a retry comes."""
    opened = App(dsn)
    yield opened
    await opened.close()


async def test_s1_status_tracking_shows_stage_by_stage_how_a_document_gets_on(app: App, connection: Connection) -> None:
    at_embedding = asyncio.Event()
    stages = [Stage("ocr", weight=5), Stage("chunks"), Stage("embedding", weight=3), Stage("merge")]

    @app.job("process_document", stages=stages, max_retries=0)
    async def process_document(job: Job) -> None:
        async with job.stage("ocr", metadata={"engine": "tesseract"}):
            pass
        async with job.stage("chunks") as stage:
            await stage.skip("the document is short")
        async with job.stage("embedding"):
            await job.progress(1, 3, "Embedding chunk 1 of 3")
            await at_embedding.wait()
            raise PermanentError("the model is gone")

    sent = await app.send("process_document")
    assert (await app.get(sent.id)).total_stages == 4
    async with working(app):
        job = await seen(app, sent.id, lambda job: job.progress_done == 1)
        assert (job.status, job.current_stage, job.total_stages, job.completed_stages) == (
            "processing", "embedding", 4, 2,
        )  # fmt: skip
        # 5 and 1 of 10 are behind it, and a third of 3
        assert job.progress_pct == 70
        assert job.estimated_completion is not None
        at_embedding.set()
        await seen(app, sent.id, has("failed"))
    history = rows(
        connection,
        "select name, status, started_at is not null, completed_at is not null, error, metadata from jobqueue.stages "
        "where job_id = %s order by position",
        sent.id,
    )
    assert history == [
        ("ocr", "completed", True, True, None, {"engine": "tesseract"}),
        ("chunks", "skipped", True, True, None, {"reason": "the document is short"}),
        ("embedding", "failed", True, True, "the model is gone", None),
        ("merge", "pending", False, False, None, None),
    ]
    connection.execute("update jobqueue.job set completed_at = now() - interval '31 days'")
    connection.execute("select * from jobqueue.maintain(null, '{stage_history}')")
    assert rows(connection, "select count(*) from jobqueue.stages") == [(0,)]


async def test_s2_automatic_retry_keeps_the_reason_of_every_failed_attempt(app: App, connection: Connection) -> None:
    @app.job("flaky")
    async def flaky(job: Job) -> None:
        raise ConnectionError(f"no answer, try {job.attempt}")

    sent = await app.send("flaky")
    waits = []
    for _ in range(4):
        await work(app)
        ((wait,),) = rows(connection, "select extract(epoch from run_at - updated_at)::float8 from jobqueue.jobs")
        waits.append(wait)
        connection.execute("select jobqueue.run_now(id, 'do not wait') from jobqueue.jobs where status = 'pending'")
    job = await app.get(sent.id)
    assert (job.status, job.retry_count, job.max_retries, job.attempt) == ("failed", 3, 3, 4)
    for number, wait in enumerate(waits[:3]):
        assert 60 * 2**number <= wait <= 120 * 2**number
    attempts = rows(
        connection, "select attempt, outcome, error_class, error_code, error_message from jobqueue.attempts"
    )
    assert attempts == [
        (number, "failed", "transient", "ConnectionError", f"no answer, try {number}") for number in range(1, 5)
    ]


async def test_s3_partial_progress_survives_a_retry(app: App, connection: Connection) -> None:
    pages: list[int] = []

    @app.job("pages")
    async def read_pages(job: Job) -> None:
        async for page in job.remaining(range(25), message="Page {number} of {total}"):
            if page == 13 and job.attempt == 1:
                raise ConnectionError("no answer")
            pages.append(page)

    sent = await app.send("pages")
    await work(app)
    job = await app.get(sent.id)
    assert (job.status, job.progress_done, job.progress_total, job.progress_pct) == ("pending", 13, 25, 52)
    connection.execute("select jobqueue.run_now(id, 'do not wait') from jobqueue.jobs")
    await work(app)
    assert (await app.get(sent.id)).status == "completed"
    # Every page once; the retry began at what was left.
    assert pages == list(range(25))


async def test_s4_people_retry_restart_skip_cancel_and_prioritize(app: App, connection: Connection) -> None:
    done: list[list[str]] = []

    @app.job("work")
    async def do_work(job: Job) -> None:
        done.append([item async for item in job.remaining(["a", "b"])])
        raise PermanentError("broken")

    sent = [await app.send("work") for _ in range(3)]
    await work(app)
    first, second, third = (record.id for record in sent)
    assert await app.retry(first, "the cause is gone") == "pending"
    assert await app.retry(second, "from the start", from_start=True) == "pending"
    assert await app.skip(third, "not needed") == "skipped"
    with pytest.raises(InvalidTransition, match="skip is refused"):
        await app.skip(first, "only from failed")
    assert await app.prioritize(second, 9, "urgent") == "pending"
    done.clear()
    await work(app)
    assert done == [["a", "b"], []]
    counts = "select * from jobqueue.bulk(%s, %s::jsonb, 'a support case')"
    assert rows(connection, counts, "retry", '{"status": "failed"}')
    assert {(await app.get(job)).status for job in (first, second)} == {"pending"}
    assert rows(connection, counts, "cancel", '{"status": "pending"}')
    assert {(await app.get(job)).status for job in (first, second)} == {"cancelled"}
    said = rows(connection, "select action, reason from jobqueue.actions_taken where job_id = %s order by id", first)
    assert said[0] == ("retry", "the cause is gone")


async def test_s5_time_estimates_follow_history_units_and_the_place_in_the_line(
    app: App, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBQUEUE_ESTIMATE__BOOK__OCR_MS_PER_UNIT", "2000")
    monkeypatch.setenv("JOBQUEUE_ESTIMATE__BOOK__MERGE_MS", "5000")
    monkeypatch.setenv("JOBQUEUE_ESTIMATE__BOOK_MS", "60000")
    go_on = asyncio.Event()

    @app.job("book", stages=["ocr", "merge"])
    async def book(job: Job) -> None:
        await job.estimate(100, stage="ocr")
        async with job.stage("ocr"):
            await go_on.wait()

    def seconds(job: UUID | None) -> float:
        query = "select extract(epoch from estimated_completion - now())::float8 from jobqueue.jobs where id = %s"
        return float(rows(connection, query, job)[0][0])

    running = await app.send("book")
    async with working(app):
        await seen(app, running.id, lambda job: job.estimated_completion is not None)
        # 100 pages of 2 s, and 5 s to merge them
        assert 105 < seconds(running.id) <= 205  # less than the whole if the machine was busy meanwhile
        connection.execute("update jobqueue.queue set paused_at = now(), pause_reason = 'to look', paused_by = 'me'")
        waiting = [await app.send("book") for _ in range(21)]
        query = "select queue_position, wait_seconds, ends_at - starts_at from jobqueue.estimate(%s)"
        ((place, wait, takes),) = rows(connection, query, waiting[20].id)
        # 20 jobs ahead, of a minute each, for the ten slots of this worker
        assert (place, round(wait), takes.total_seconds()) == (21, 120, 60)
        go_on.set()
        await seen(app, running.id, has("completed"))
    connection.execute("select * from jobqueue.maintain(null, '{estimates}')")
    learned = rows(
        connection, "select stage, runs, unit_runs from jobqueue.estimate where job_type = 'book' order by stage"
    )
    assert learned == [("", 1, 0), ("ocr", 1, 1)]


async def test_s6_a_tenant_sees_its_own_jobs_only_and_metadata_end_at_a_megabyte(
    app: App, connection: Connection
) -> None:
    mine = await app.send("mail", {"n": 1}, queue="mail", tenant="acme")
    await app.send("mail", {"n": 2}, queue="mail", tenant="other")
    with connection.transaction():
        connection.execute("set local role jobqueue_api")
        assert rows(connection, "select id from jobqueue.jobs") == []
        connection.execute("select set_config('jobqueue.tenants', 'acme', true)")
        assert rows(connection, "select id from jobqueue.jobs") == [(mine.id,)]
    with pytest.raises(Exception, match="metadata is too large"):
        await app.send("mail", queue="mail", metadata={"text": "x" * 1_100_000})


async def test_s7_every_change_raises_the_version_and_tells_those_who_watch(app: App, connection: Connection) -> None:
    step = asyncio.Event()

    @app.job("live")
    async def live(job: Job) -> None:
        await job.progress(1, 4, "one of four")
        await step.wait()

    connection.execute("listen jobqueue_jobs")
    sent = await app.send("live")
    connection.execute("select jobqueue.watch('job:' || %s::text)", (sent.id,))
    waiting = await app.get(sent.id)
    async with working(app):
        running = await seen(app, sent.id, lambda job: job.progress_pct == 25)
        step.set()
        ended = await seen(app, sent.id, has("completed"))
    assert waiting.version < running.version < ended.version
    assert (running.progress_message, running.alive, ended.alive) == ("one of four", True, None)
    heard = [note.payload for note in connection.notifies(timeout=60, stop_after=2)]
    assert len(heard) >= 2
    # Ids and versions only: nothing of the tenant leaves the database by this way.
    assert all(payload.startswith(f'[["{sent.id}", ') for payload in heard)


async def test_s8_chunk_progress_reads_as_people_expect(app: App) -> None:
    at_eleven, go_on = asyncio.Event(), asyncio.Event()

    @app.job("ocr", max_retries=1)
    async def ocr(job: Job | None) -> str:
        job = job or NullJob()
        chunks = job.chunks(17)
        async for index in chunks:
            pages = (25 * index + 1, 25 * index + 25)
            async with chunks.chunk(index, pages, keep_going=index == 10):
                if index == 10 and job.attempt == 1:
                    raise TimeoutError("Document AI timeout")
                if index == 11 and job.attempt == 1 and job.id.int:
                    at_eleven.set()
                    await go_on.wait()
                    raise TimeoutError("Document AI timeout")
        async with chunks.merging():
            return "merged"

    sent = await app.send("ocr")
    async with working(app):
        await at_eleven.wait()
        job = await seen(
            app, sent.id, lambda job: (job.metadata or {}).get("chunk_processing", {}).get("failed_chunks") == 1
        )
        job = await seen(app, sent.id, lambda job: job.metadata["chunk_processing"]["current_chunk_index"] == 11)  # type: ignore[index]
        assert (job.progress_message, job.progress_pct, job.alive) == ("Processing chunk 10/17", 58, True)
        assert job.metadata == {
            "chunk_processing": {
                "total_chunks": 17,
                "completed_chunks": 10,
                "failed_chunks": 1,
                "current_chunk_index": 11,
                "current_page_range": {"start": 276, "end": 300},
            }
        }
        go_on.set()
        job = await seen(app, sent.id, lambda job: job.error_message is not None)
        assert job.error_message == "Chunk 12 (pages 276-300) failed: Document AI timeout"
        assert job.error_class == "transient"
        await app.run_now(job.id, "do not wait")
        job = await seen(app, sent.id, has("completed"))
    assert (job.current_stage, job.result, job.progress_pct) == ("Merging OCR results", "merged", 100)
    # The same handler, called by hand without a job.
    assert await ocr(None) == "merged"


async def test_s11_pause_and_resume_at_checkpoints_lose_nothing(
    app: App, connection: Connection, tmp_path: Path
) -> None:
    written: list[int] = []
    state = tmp_path / "state"
    may_go = asyncio.Semaphore(0)

    @app.job("index")
    async def index(job: Job) -> list[int]:
        first = int(Path(str(job.last_checkpoint.reference)).read_text()) if job.last_checkpoint else 0
        if first == 0:
            written.clear()
        for step in range(first, 12):
            await may_go.acquire()
            written.append(step)
            state.write_text(str(step + 1))
            await job.checkpoint(f"step {step}", reference=state)
        return list(written)

    sent = await app.send("index")
    async with working(app):
        await seen(app, sent.id, has("processing"))
        with pytest.raises(
            InvalidTransition, match="neither its job_type nor its last checkpoint says that it can be paused"
        ):
            await app.pause(sent.id, "too early")
        may_go.release()
        await seen(app, sent.id, lambda job: job.checkpoint_stage == "step 0")
        for cycle in range(1, 11):
            assert await app.pause(sent.id, f"pause {cycle}") == "processing"
            may_go.release()
            job = await seen(app, sent.id, has("paused"))
            assert (job.checkpoint_stage, job.pause_reason) == (f"step {cycle}", f"pause {cycle}")
            assert job.paused_at is not None
            await app.resume(sent.id, "go on")
            await seen(app, sent.id, has("processing"))
        may_go.release()
        job = await seen(app, sent.id, has("completed"))
    # Ten pauses have changed nothing in the output.
    assert job.result == list(range(12))
    assert (job.resume_count, job.retry_count) == (10, 0)
    assert job.resumed_at is not None
    # A second job whose checkpoint is damaged while it is paused begins afresh, and says so.
    sent = await app.send("index")
    async with working(app):
        may_go.release()
        await seen(app, sent.id, lambda job: job.checkpoint_stage == "step 0")
        await app.pause(sent.id, "lunch")
        may_go.release()
        await seen(app, sent.id, has("paused"))
        state.write_text("7, says somebody else")
        await app.resume(sent.id, "back")
        for _ in range(12):
            may_go.release()
        job = await seen(app, sent.id, has("completed"))
    assert job.result == list(range(12))
    reasons = rows(
        connection,
        "select reason from jobqueue.actions_taken where job_id = %s and action = 'reject_checkpoint'",
        sent.id,
    )
    assert reasons == [("its file does not match its hash; the job starts afresh",)]


async def test_s12_a_job_is_alive_and_says_what_it_does_without_counting_seconds(
    app: App, connection: Connection
) -> None:
    stuck, go_on = asyncio.Event(), asyncio.Event()

    @app.job("embed", stages=["embedding", "store"])
    async def embed(job: Job) -> None:
        async with job.stage("embedding") as stage:
            await stage.substage("loading the model")
            async for chunk in job.track(range(500), message="Embedding chunk {number} of {total}"):
                if chunk == 233:
                    stuck.set()
                    await go_on.wait()

    sent = await app.send("embed")
    async with working(app):
        await stuck.wait()
        # It came to 234 within milliseconds and stays there: that goes out although the handler says nothing more.
        job = await seen(app, sent.id, lambda job: job.progress_message == "Embedding chunk 234 of 500")
        assert (job.current_stage, job.substage, job.progress_done) == ("embedding", "loading the model", 233)
        # The heartbeat of the worker keeps it alive; nobody looks younger than the last beat.
        with connection.transaction():  # no beat comes in between
            connection.execute("update jobqueue.job set heartbeat_at = now() - interval '11 s'")
            assert rows(connection, "select alive from jobqueue.jobs where id = %s", job.id) == [(False,)]
        await seen(app, sent.id, lambda job: job.alive is True)
        go_on.set()
        await seen(app, sent.id, has("completed"))


class Document(BaseModel):
    """A document of a user."""

    title: str
    mode: str = "Smart"


async def test_s13_jobs_have_names_for_people(app: App, connection: Connection) -> None:
    @app.job("process", label="Processing: {payload.title}.pdf ({payload.mode} Mode)")
    async def process(payload: Document) -> None: ...

    @app.job("export", label=lambda payload, metadata: f"Export: {len(payload['ids'])} documents")
    async def export(payload: dict[str, Any]) -> None: ...

    book = await app.send("process", Document(title="The Man Who Sold the World"))
    batch = await app.send("export", {"ids": [1, 2, 3, 4, 5]})
    assert (await app.get(book.id)).display_name == "Processing: The Man Who Sold the World.pdf (Smart Mode)"
    assert (await app.get(batch.id)).display_name == "Export: 5 documents"
    await work(app)
    # The label is known in the database now: it holds for senders in SQL too.
    options = '{"job_type": "process"}'
    connection.execute("""select jobqueue.send('process', '{"title": "Low", "mode": "Fast"}', %s)""", (options,))
    names = rows(connection, "select display_name from jobqueue.jobs where status = 'pending'")
    assert names == [("Processing: Low.pdf (Fast Mode)",)]


class Refused(Exception):
    """As clients of the web raise it."""

    def __init__(self, status: int, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status
        self.headers = {"Retry-After": retry_after} if retry_after else {}


async def test_s14_errors_have_a_class_a_code_and_a_short_message(app: App, connection: Connection) -> None:
    errors = {
        "timed out": (TimeoutError("no answer in 30 s"), "pending", "transient", "TimeoutError"),
        "busy": (Refused(503, "busy", "120"), "pending", "transient", "Refused"),
        "too many": (Refused(429, "too many requests"), "pending", "transient", "Refused"),
        "out of credits": (Refused(429, "you have no credits left"), "failed", "quota", "Refused"),
        "malformed": (None, "failed", "invalid", "INVALID_PAYLOAD"),
        "house rule": (ValueError("E42: archived"), "failed", "permanent", "ValueError"),
    }

    def classify(error: BaseException) -> Any:
        return "permanent" if "E42" in str(error) else None

    @app.job("call", classify=classify)
    async def call(job: Job, payload: Document) -> None:
        error = errors[payload.title][0]
        assert error is not None
        raise error

    for title, (error, _, _, _) in errors.items():
        if error is not None:
            await app.send("call", Document(title=title), display_name=title)
    # From SQL nobody checks a payload before the handler does.
    options = '{"display_name": "malformed"}'
    connection.execute("""select jobqueue.send('call', '{"tilte": "mistyped"}', %s)""", (options,))
    await work(app)
    for title, (_, status, error_class, code) in errors.items():
        ((*found, wait, detail),) = rows(
            connection,
            "select status, j.error_class, j.error_code, j.error_message, extract(epoch from run_at - updated_at)::float8, "
            "error_detail from jobqueue.jobs j join jobqueue.attempts a on a.job_id = j.id where display_name = %s",
            title,
        )
        assert found[:3] == [status, error_class, code], title
        assert len(found[3]) < 200
        # What people read is one sentence; the developer finds the stack trace beside it.
        assert "Traceback" not in found[3]
        assert "Traceback" in detail
        if title == "busy":
            assert wait == pytest.approx(120)


async def test_s15_what_can_be_done_depends_on_the_status(app: App, connection: Connection) -> None:
    hold = asyncio.Event()

    @app.job("hold", pausable=True)
    async def hold_on() -> None:
        await hold.wait()

    def allowed(job: UUID | None) -> set[str]:
        return set(rows(connection, "select jobqueue.allowed_actions(%s)", job)[0][0])

    def refused(job: UUID | None, action: str) -> str:
        return str(rows(connection, "select reason from jobqueue.actions(%s) where action = %s", job, action)[0][0])

    later = await app.send("hold", delay=3600)
    assert allowed(later.id) == {"cancel", "pause", "prioritize", "run_now"}
    sent = await app.send("hold")
    assert allowed(sent.id) == {"cancel", "pause", "prioritize"}
    assert refused(sent.id, "run_now") == "it may run already"
    assert await app.pause(sent.id, "not yet") == "paused"
    assert allowed(sent.id) == {"resume", "cancel"}
    await app.resume(sent.id, "now")
    async with working(app):
        await seen(app, sent.id, has("processing"))
        assert allowed(sent.id) == {"cancel", "pause"}
        assert refused(sent.id, "delete") == "a job that is processing cannot be deleted"
        hold.set()
        await seen(app, sent.id, has("completed"))
    assert allowed(sent.id) == {"delete"}
    await app.cancel(later.id, "no longer needed")
    assert allowed(later.id) == {"resume", "delete"}
    failed = await app.send("unknown", queue="other")
    claim = "select id, claim_token from jobqueue.claim('{other}', gen_random_uuid(), 1)"
    ((_, token),) = rows(connection, claim)
    connection.execute("""select jobqueue.fail(%s, %s, '{"class": "permanent"}')""", (failed.id, token))
    assert allowed(failed.id) == {"retry", "restart", "skip", "delete"}
