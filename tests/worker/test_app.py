"""The app: sending, reading and acting, asynchronously and blocking, against a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import BaseModel

from jobqueue import App, Job, JobNotFound, JobRecord
from jobqueue.errors import (
    InvalidArgument,
    InvalidTransition,
    QueueNotFound,
    SchemaOutdated,
    TooLarge,
    UnknownOption,
)
from jobqueue.options import OPTIONS
from jobqueue.records import COLUMNS
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


class IndexRepository(BaseModel):
    path: str


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[App]:
    app = App(dsn)

    @app.job("index_repository", queue="indexing", max_retries=5, label="Indexing: {payload.path}")
    async def index_repository(payload: IndexRepository) -> None: ...

    @app.job
    async def plain() -> None: ...

    async with app:
        yield app


def count(connection: Connection) -> int:
    found: int = value(connection, "select count(*) from jobqueue.job")
    return found


async def test_a_sent_job_is_what_was_asked_for(app: App) -> None:
    sent = await app.send("index_repository", IndexRepository(path="src"), priority=7, subject="repo:1")
    assert (sent.created, sent.reason) == (True, None)
    record = await app.get(sent.id)
    assert isinstance(record, JobRecord)
    assert (record.queue, record.job_type, record.status) == ("indexing", "index_repository", "pending")
    assert (record.payload, record.priority, record.subject) == ({"path": "src"}, 7, "repo:1")
    assert (record.display_name, record.max_retries, record.tenant) == ("Indexing: src", 5, "default")
    assert record.created_at.utcoffset() == timedelta(0)


async def test_a_bad_payload_is_refused_before_anything_is_stored(app: App, connection: Connection) -> None:
    bad: list[Any] = [{"path": 3}, {}, "text", {"path": "a\0b"}, {"path": "\ud800"}]
    for payload in bad:
        with pytest.raises(InvalidArgument):
            await app.send("index_repository", payload)
    for payload in ("a\0b", "\ud800", float("nan"), object()):
        with pytest.raises(InvalidArgument):
            await app.send("plain", {"value": payload})
    with pytest.raises(InvalidArgument):
        await app.send("plain", subject="a\0b")
    assert count(connection) == 0


async def test_a_payload_that_is_too_large_is_refused(app: App, connection: Connection) -> None:
    import random

    noise = random.Random(1).randbytes(4_500_000).hex()
    with pytest.raises(TooLarge):
        await app.send("plain", {"value": noise})
    assert count(connection) == 0


async def test_an_unknown_name_needs_a_queue(app: App) -> None:
    with pytest.raises(QueueNotFound) as caught:
        await app.send("index_repositry")
    assert "index_repository" in (caught.value.hint or "")
    record = await app.get((await app.send("elsewhere", queue="other")).id)
    assert (record.queue, record.job_type) == ("other", "elsewhere")


async def test_a_handler_can_be_named_by_its_function(app: App) -> None:
    function = app.registry["plain"].function
    assert (await app.get((await app.send(function)).id)).job_type == "plain"
    with pytest.raises(InvalidArgument, match="not a handler"):
        await app.send(print)


async def test_options_are_checked_and_translated(app: App) -> None:
    with pytest.raises(UnknownOption):
        await app.send("plain", priorty=3)
    with pytest.raises(InvalidArgument, match="time zone"):
        await app.send("plain", run_at=datetime(2030, 1, 1))
    later = datetime.now(UTC) + timedelta(hours=1)
    assert (await app.get((await app.send("plain", run_at=later)).id)).run_at == later
    delayed = await app.get((await app.send("plain", delay=timedelta(minutes=5))).id)
    assert timedelta(minutes=4) < delayed.run_at - delayed.created_at <= timedelta(minutes=5)


def test_the_known_options_are_those_of_the_database(connection: Connection) -> None:
    assert set(value(connection, "select jobqueue.job_options()")) == OPTIONS


def test_a_record_has_every_column_of_the_view(connection: Connection) -> None:
    found = rows(
        connection,
        "select column_name from information_schema.columns"
        " where table_schema = 'jobqueue' and table_name = 'jobs' order by ordinal_position",
    )
    assert [name for (name,) in found] == list(COLUMNS)


async def test_a_send_joins_the_callers_transaction(app: App, dsn: str, connection: Connection) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, row_factory=dict_row) as mine:
        await app.send("plain", connection=mine)
        assert count(connection) == 0
        await mine.rollback()
        await app.send("plain", connection=mine)
        await app.send_many("plain", [{}, {}], connection=mine)
        await mine.commit()
    assert count(connection) == 3


def test_the_blocking_forms(dsn: str, connection: Connection) -> None:
    app = App(dsn)
    app.job("plain")(lambda: None)
    try:
        sent = app.send_sync("plain", {"a": 1})
        assert app.get_sync(sent.id).payload == {"a": 1}
        assert len(app.send_many_sync("plain", [{"n": n} for n in range(3)])) == 3
        assert app.act_sync("cancel", sent.id, "a test") == "cancelled"
        with psycopg.connect(dsn) as mine:
            app.send_sync("plain", connection=mine)
            mine.rollback()
    finally:
        app.close_sync()
    assert count(connection) == 4


def test_an_app_may_be_used_from_one_event_loop_after_another(dsn: str) -> None:
    app = App(dsn)
    app.job("plain")(lambda: None)
    assert asyncio.run(app.send("plain")).created

    async def again() -> bool:
        async with app:
            return (await app.send("plain")).created

    assert asyncio.run(again())


async def test_many_jobs_are_all_or_none(app: App, connection: Connection) -> None:
    sent = await app.send_many("index_repository", [IndexRepository(path=str(n)) for n in range(5)], priority=2)
    assert [job.created for job in sent] == [True] * 5
    stored = rows(connection, "select id, payload ->> 'path', priority, display_name from jobqueue.job")
    assert {row[0]: row[1:] for row in stored} == {job.id: (str(n), 2, f"Indexing: {n}") for n, job in enumerate(sent)}
    with pytest.raises(InvalidArgument) as caught:
        await app.send_many("index_repository", [{"path": "a"}, {"path": 1}])
    assert caught.value.details["index"] == 1
    assert await app.send_many("plain", []) == []
    assert count(connection) == 5


async def test_more_jobs_than_one_statement_takes_are_one_transaction(
    app: App, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobqueue.app.BULK_SIZE", 2)
    assert len({job.id for job in await app.send_many("plain", [{}] * 5)}) == 5
    huge = {"value": list(range(2_000_000))}
    with pytest.raises(TooLarge):
        await app.send_many("plain", [{}, {}, huge])
    assert count(connection) == 5


async def test_actions_return_the_status_and_refuse_with_what_is_allowed(app: App) -> None:
    sent = await app.send("plain", delay=3600)
    assert await app.prioritize(sent.id, 5, "urgent") == "pending"
    assert await app.run_now(sent.id, "now") == "pending"
    assert await app.pause(sent.id, "hold") == "paused"
    assert await app.resume(sent.id, "go") == "pending"
    with pytest.raises(InvalidTransition) as caught:
        await app.skip(sent.id, "no")
    assert "cancel" in caught.value.details["allowed"]
    assert await app.cancel(sent.id, "enough") == "cancelled"
    with pytest.raises(InvalidArgument):
        await app.delete(sent.id, "  ")
    assert await app.delete(sent.id, "clean up") == "cancelled"
    with pytest.raises(JobNotFound):
        await app.get(sent.id)
    with pytest.raises(JobNotFound):
        await app.get("no-uuid")


async def test_jobs_are_found_newest_first(app: App) -> None:
    first = await app.send("plain")
    second = await app.send("plain", tenant="acme")
    assert [job.id for job in await app.find(queue="plain", status="pending")] == [second.id, first.id]
    assert [job.id for job in await app.find(tenant="acme", status=["pending", "failed"])] == [second.id]
    assert await app.find(status="failed") == []
    assert len(await app.find(limit=1)) == 1


async def test_the_example_of_the_contract(dsn: str) -> None:
    app = App(dsn)

    @app.job("index_repository", queue="indexing", max_retries=3, label="Indexing: {payload.path}")
    async def index_repository(job: Job, payload: IndexRepository) -> dict[str, int]:
        async with job.stage("scan", of=3):
            pass
        await job.progress(5, 17, "Processing chunk 5/17")
        await job.checkpoint("scanned", {"files": 120})
        return {"files_indexed": 120}

    async with app:
        sent = await app.send("index_repository", IndexRepository(path="."))
        bad = await app.send("index_repository", queue="indexing", payload={"path": "."}, max_retries=0)
        connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        async with connection:
            await connection.execute("update jobqueue.job set payload = '{}' where id = %s", (bad.id,))
        async with asyncio.timeout(60):
            await app.run_worker(queues=None, concurrency=100, until_idle=True)
        record = await app.get(sent.id)
        refused = await app.get(bad.id)
    assert record.error_message is None
    assert (record.status, record.result, record.display_name) == ("completed", {"files_indexed": 120}, "Indexing: .")
    assert (record.checkpoint_stage, record.progress_message) == ("scanned", "Processing chunk 5/17")
    assert (refused.status, refused.error_class, refused.error_code) == ("failed", "invalid", "INVALID_PAYLOAD")


async def test_an_app_never_migrates(empty_dsn: str) -> None:
    with pytest.raises(SchemaOutdated) as caught:
        await App(empty_dsn).open()
    assert "jobqueue migrate up" in (caught.value.hint or "")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, jobqueue; print(sorted({'psycopg', 'pydantic', 'click'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
