"""The job `process_document` as a user meets it: a real PDF, real workers, killed, paused and resumed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from examples.process_document.app import MERGING, ProcessDocument, app, process_document
from examples.process_document.sample import TITLE, make_pdf
from examples.process_document.store import TABLES
from jobqueue import App, Job, NullJob
from tests.examples.support import (
    BOUND,
    KILLS,
    Connection,
    Gate,
    completed,
    ended,
    get,
    kill_at_random_units,
    seeded,
    worker,
)
from tests.support.command import REPOSITORY, environment
from tests.support.databases import Databases
from tests.support.server import rows, value

PAGES = 40
PER_CHUNK = 10
OUTPUTS = {
    "page": "number, text, problem",
    "body": "text, page_starts",
    "passage": "number, first_page, last_page, text",
    "vector": "passage, vector",
    "names": "passage, names",
    "person": "name, aliases, passages",
    "document": "path, summary",
}
COUNTED = ("page", "vector", "names")
CYCLES = 10


@pytest.fixture(scope="module")
def dsn(databases: Databases) -> Iterator[str]:
    """One database for all tests here: they differ by their jobs."""
    with databases.lend() as conninfo:
        asyncio.run(create_tables(conninfo))
        yield conninfo


@pytest.fixture(scope="module")
def gate(dsn: str) -> Iterator[Gate]:
    """Stands before every write of a result."""
    with psycopg.connect(dsn, autocommit=True) as connection, psycopg.connect(dsn, autocommit=True) as keeper:
        yield Gate(connection, keeper, [f"documents.{table}" for table in OUTPUTS])


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pdf(tmp_path_factory.mktemp("documents") / f"{TITLE}.pdf", pages=PAGES, sentences=6)


async def create_tables(dsn: str) -> None:
    async with TABLES.open(dsn):
        pass


def send(connection: Connection, path: Path, **payload: Any) -> UUID:
    given = {"path": str(path), "pages_per_chunk": PER_CHUNK, **payload}
    sent = app.send_sync("process_document", given, connection=connection, created_by="ada")
    assert sent.id is not None
    return sent.id


def output(connection: Connection, job: UUID) -> dict[str, list[tuple[Any, ...]]]:
    """All that a job has written, whatever it took."""
    return {
        table: rows(connection, f"select {columns} from documents.{table} where job_id = %s order by 1", (job,))
        for table, columns in OUTPUTS.items()
    }


def repeated(connection: Connection, job: UUID) -> int:
    """How many pages and passages were processed again."""
    return sum(
        value(connection, f"select coalesce(sum(writes - 1), 0)::int from documents.{table} where job_id = %s", (job,))
        for table in COUNTED
    )


@dataclass(frozen=True, slots=True)
class Run:
    """A run that nobody disturbed: what the others are compared with."""

    job: UUID
    units: int


@pytest.fixture(scope="module")
def undisturbed(dsn: str, gate: Gate, document: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with psycopg.connect(dsn, autocommit=True) as connection:
        before, job = gate.units, send(connection, document)
        completed("process_document", connection, job, dsn, tmp_path_factory.mktemp("logs") / "log")
        return Run(job, gate.units - before)


def test_a_document_is_processed_in_seven_stages(connection: Connection, undisturbed: Run) -> None:
    job = undisturbed.job
    record = get(connection, job)
    assert record.display_name == "Processing: The Man Who Sold the World.pdf (Smart Mode)"
    assert (record.progress_pct, record.completed_stages, record.total_stages) == (100, 7, 7)
    stages = rows(connection, "select name, status from jobqueue.stages where job_id = %s order by position", (job,))
    names = ["text", MERGING, "chunking", "embedding", "entities", "aliases", "result"]
    assert stages == [(name, "completed") for name in names]
    assert (record.metadata or {})["chunk_processing"] == {
        "total_chunks": 4,
        "completed_chunks": 4,
        "failed_chunks": 0,
        "current_chunk_index": 3,
        "current_page_range": {"start": 31, "end": 40},
    }

    found = record.result or {}
    assert record.stats == found
    assert (found["pages"], found["unreadable_pages"]) == (PAGES, [])
    assert found["vectors"] == found["passages"] > 20
    people = rows(connection, "select name, aliases from documents.person where job_id = %s", (job,))
    assert ("Eleanor Marsh", ["Dr Marsh", "Eleanor"]) in people
    assert ("Henry Whitlock", ["Henry", "Mr Whitlock"]) in people
    body = value(connection, "select text from documents.body where job_id = %s", (job,))
    # No running head, no page number, and words that were divided are whole.
    assert TITLE not in body
    assert "- 7 -" not in body
    assert "entirely genuine" in body
    assert (
        value(
            connection, "select count(*) from documents.vector where job_id = %s and cardinality(vector) = 256", (job,)
        )
        > 20
    )


def test_a_job_whose_workers_were_killed_five_times_gives_the_same_and_repeats_little(
    dsn: str, connection: Connection, gate: Gate, undisturbed: Run, document: Path, tmp_path: Path
) -> None:
    job = send(connection, document)
    for kills in kill_at_random_units(
        "process_document", gate, connection, job, dsn, tmp_path / "log", units=undisturbed.units
    ):
        assert repeated(connection, job) <= kills * BOUND
    record = completed("process_document", connection, job, dsn, tmp_path / "log")

    assert output(connection, job) == output(connection, undisturbed.job)
    assert repeated(connection, job) <= KILLS * BOUND
    assert record.attempt == KILLS + 1
    assert record.result == get(connection, undisturbed.job).result
    history = rows(connection, "select outcome from jobqueue.attempts where job_id = %s order by attempt", (job,))
    assert [outcome for (outcome,) in history][:KILLS] == ["lost"] * KILLS


async def test_ten_pauses_change_nothing_in_the_output(
    dsn: str, connection: Connection, gate: Gate, undisturbed: Run, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = gate.units + undisturbed.units
    chance = seeded("process_document: pauses")

    monkeypatch.setattr(app, "_dsn", dsn)
    job = send(connection, document)
    async with watched_worker(dsn) as attempts:
        for left in range(CYCLES, 0, -1):
            # The first unit comes before the first checkpoint: a job cannot be paused before it.
            unit = gate.units + chance.randint(2 if left == CYCLES else 1, (last - gate.units) // left)
            with gate.closed_at(unit) as somebody_waits:
                if left < CYCLES:
                    connection.execute("select jobqueue.resume(%s, 'go on')", (job,))
                await until(somebody_waits, f"unit {unit} has been reached")
                connection.execute("select jobqueue.pause(%s, 'make room')", (job,))
                await until(lambda: attempts[-1].pause_requested, "the worker knows")
            await until(lambda: get(connection, job).status == "paused", f"paused after unit {unit}")
        connection.execute("select jobqueue.resume(%s, 'go on')", (job,))
        await until(lambda: get(connection, job).done, "the job has ended")

    record = get(connection, job)
    assert (record.status, record.resume_count, record.attempt) == ("completed", CYCLES, CYCLES + 1)
    assert output(connection, job) == output(connection, undisturbed.job)
    assert repeated(connection, job) == 0


async def test_it_does_the_same_without_a_job(
    dsn: str, connection: Connection, undisturbed: Run, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_dsn", dsn)
    await process_document(None, ProcessDocument(path=str(document)))
    assert output(connection, NullJob().id) == output(connection, undisturbed.job)


def test_a_page_that_cannot_be_read_is_named_with_its_chunk(dsn: str, connection: Connection, tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "case.pdf", pages=126, sentences=1)
    whole = path.read_bytes()
    path.write_bytes(damage_page(whole, 110))
    strict = send(connection, path, mode="strict", pages_per_chunk=25)
    smart = send(connection, path, mode="smart", pages_per_chunk=25)
    (tmp_path / "letter.pdf").write_text("no PDF")
    nothing = send(connection, tmp_path / "letter.pdf")
    with worker("process_document", dsn, tmp_path / "log"):
        ended(connection, smart)
        failed, refused = ended(connection, strict), ended(connection, nothing)
    assert (refused.status, refused.error_class, refused.attempt) == ("failed", "invalid", 1)
    assert "letter.pdf is not a PDF that can be read" in (refused.error_message or "")
    assert failed.display_name == "Processing: case.pdf (Strict Mode)"
    assert (failed.status, failed.error_class, failed.attempt) == ("failed", "invalid", 1)
    assert (failed.error_message or "").startswith("Chunk 5 (pages 101-125) failed: page 110 cannot be read")
    assert (failed.current_stage, failed.progress_message) == ("text", "Processing chunk 4/6")
    assert (failed.metadata or {})["chunk_processing"] == {
        "total_chunks": 6,
        "completed_chunks": 4,
        "failed_chunks": 1,
        "current_chunk_index": 4,
        "current_page_range": {"start": 101, "end": 125},
    }
    found = get(connection, smart)
    assert (found.status, (found.result or {})["unreadable_pages"]) == ("completed", [110])

    # Another attempt at the same file reads no page again; a repaired file is another file, and read from its first page.
    connection.execute("select jobqueue.retry(%s, 'once more')", (strict,))
    with worker("process_document", dsn, tmp_path / "log"):
        ended(connection, strict)
        assert (get(connection, strict).status, repeated(connection, strict)) == ("failed", 0)
        path.write_bytes(whole)
        connection.execute("select jobqueue.retry(%s, 'the file is repaired')", (strict,))
        assert ended(connection, strict).status == "completed"
    assert (get(connection, strict).result or {})["unreadable_pages"] == []
    assert repeated(connection, strict) == 0
    written = "select count(*) from documents.page where job_id = %s and text <> '' and problem is null"
    assert value(connection, written, (strict,)) == 126


def damage_page(content: bytes, number: int) -> bytes:
    """Name a compression for a page that does not exist."""
    parts = content.split(b"/FlateDecode")
    return b"/FlateDecode".join(parts[:number]) + b"/FlateDecodX" + b"/FlateDecode".join(parts[number:])


def test_the_command_makes_its_document_and_says_what_is_in_it(dsn: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.process_document"]
    settings = environment(dsn, TMPDIR=str(tmp_path))
    done = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50 pages, ")
    assert "Eleanor Marsh" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("100 %")


@asynccontextmanager
async def watched_worker(dsn: str) -> AsyncIterator[list[Job]]:
    """A worker in this process; yields the jobs that it has begun, the latest one last."""
    attempts: list[Job] = []
    local = App(dsn)

    @local.job("process_document", queue="documents")
    async def watched(job: Job, payload: ProcessDocument) -> Any:
        attempts.append(job)
        return await process_document(job, payload)

    task = asyncio.create_task(local.run_worker(["documents"]))
    try:
        yield attempts
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await local.close()


async def until(condition: Callable[[], object], what: str) -> None:
    """As `wait_until`, without holding up the worker in this process."""
    try:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"not within 60 s: {what}")
