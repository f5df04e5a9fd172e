"""Schedules with real workers: every tick once and on time, from Python and from the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from jobqueue import App, Job
from jobqueue.errors import InvalidArgument, QueueNotFound
from jobqueue.worker import maintain as module
from jobqueue.worker.maintain import Maintainer
from tests.support.command import run
from tests.support.server import arows, rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
BOUND = 60.0


@asynccontextmanager
async def maintaining(dsn: str) -> AsyncIterator[None]:
    async def connect() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(dsn, autocommit=True)

    maintainer = Maintainer(connect, uuid4(), None, lambda: None)
    maintainer.start()
    try:
        yield
    finally:
        await maintainer.stop()


async def test_a_worker_runs_a_schedule_of_every_two_seconds(dsn: str) -> None:
    app = App(dsn)
    seen: list[dict[str, Any]] = []
    enough = asyncio.Event()

    @app.job("report", queue="reports", max_retries=1)
    async def report(job: Job, payload: dict[str, Any]) -> None:
        seen.append({**payload, **(job.metadata or {})["schedule"]})
        if len(seen) >= 3:
            enough.set()

    async with app:
        await app.schedule("often", report, "*/2 * * * * *", {"kind": "short"}, priority=3)
        worker = asyncio.create_task(app.run_worker(concurrency=4))
        try:
            async with asyncio.timeout(BOUND):
                await enough.wait()
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
    ticks = [datetime.fromisoformat(entry["tick"]) for entry in seen[:3]]
    assert {(entry["kind"], entry["name"]) for entry in seen} == {("short", "often")}
    assert {later - earlier for earlier, later in pairwise(ticks)} == {timedelta(seconds=2)}


async def test_ticks_are_met_to_a_few_milliseconds_and_once_with_many_maintainers(
    dsn: str, aconnection: psycopg.AsyncConnection[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAINTAIN_EVERY", 600.0)  # behind the first, ticks are slept for or never met
    await aconnection.execute("select jobqueue.schedule('often', 'q', '* * * * * *')")
    late = "extract(epoch from created_at - (metadata #>> '{schedule,tick}')::timestamptz)::float8"
    query = f"select metadata #>> '{{schedule,tick}}', {late} from jobqueue.jobs order by 1"
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(maintaining(dsn))
        delays: list[float] = []
        async with asyncio.timeout(BOUND):
            # The machine may be busy for a moment, or for longer: until four of them were met in time.
            while sum(delay < 0.05 for delay in delays) < 4:
                await asyncio.sleep(0.05)
                found = await arows(aconnection, query)
                delays = [delay for _, delay in found[1:]]
    ticks = [datetime.fromisoformat(tick) for tick, _ in found]
    assert {later - earlier for earlier, later in pairwise(ticks)} == {timedelta(seconds=1)}
    assert min(delays) >= 0


async def test_a_schedule_of_a_handler_that_is_unknown_needs_its_queue(dsn: str) -> None:
    async with App(dsn) as app:
        with pytest.raises(QueueNotFound):
            await app.schedule("n", "somewhere", "@daily")
        assert await app.schedule("n", "somewhere", "@daily", queue="q", time_zone="Europe/Berlin") is not None
        with pytest.raises(InvalidArgument, match="hour"):
            await app.schedule("n", "somewhere", "0 25 * * *", queue="q")
        assert len(await app.preview_schedule("@hourly", count=3)) == 3
        assert (await app.unschedule("n"), await app.unschedule("n")) == (True, False)


def test_the_blocking_forms_join_the_callers_transaction(dsn: str, connection: Connection) -> None:
    app = App(dsn)
    with connection.transaction(force_rollback=True):
        app.schedule_sync("n", "t", "@daily", queue="q", missed="once", connection=connection)
        assert rows(connection, "select name, queue, options, missed from jobqueue.schedules") == [
            ("n", "q", {"job_type": "t"}, "once")
        ]
        assert app.unschedule_sync("n", connection=connection)
    assert value(connection, "select count(*) from jobqueue.schedules") == 0


def test_the_command_line_adds_lists_pauses_and_removes(dsn: str, connection: Connection) -> None:
    done = run("schedules", "add", "nightly", "reports", "0 3 * * *", '{"n": 1}', "--time-zone", "Europe/Berlin",
               "--missed", "once", "--option", "priority=2", "-o", "json", dsn=dsn)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "nightly"
    (listed,) = json.loads(run("schedules", "list", "-o", "json", dsn=dsn).stdout)
    assert (listed["queue"], listed["time_zone"], listed["missed"]) == ("reports", "Europe/Berlin", "once")
    assert (listed["state"], listed["payload"], listed["options"]) == ("active", {"n": 1}, {"priority": 2})
    assert run("schedules", "pause", "nightly", "-r", "quiet", dsn=dsn, LOGNAME="ada").returncode == 0
    assert rows(connection, "select state, paused_by from jobqueue.schedules") == [("paused", "ada")]
    assert run("schedules", "resume", "nightly", "-r", "go on", dsn=dsn).returncode == 0
    assert run("schedules", "remove", "nightly", dsn=dsn).returncode == 0
    assert run("schedules", "remove", "nightly", dsn=dsn).returncode == 3


def test_the_command_line_previews_and_says_which_field_is_wrong(dsn: str) -> None:
    done = run("schedules", "preview", "0 3 * * *", "--count", 2, "-o", "jsonl", dsn=dsn)
    assert len(done.stdout.splitlines()) == 2, done.stderr
    wrong = run("schedules", "preview", "0 33 * * *", dsn=dsn)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "hour" in wrong.stderr
