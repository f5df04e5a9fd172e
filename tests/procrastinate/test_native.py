"""`jobqueue worker their.app`: tasks in our worker, with processes, schedules, pause and labels."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import procrastinate
import psycopg
import pytest
from click.testing import CliRunner
from procrastinate import cli as procrastinate_cli
from procrastinate.jobs import Status
from procrastinate.testing import InMemoryConnector

import jobqueue
from jobqueue.cli import main
from jobqueue.cli.worker import load_app
from jobqueue.errors import ConfigurationError
from jobqueue.procrastinate import JobqueueConnector, adopt, job_id, job_uuid, options
from jobqueue.procrastinate.ids import schedule_name
from jobqueue.procrastinate.periodic import expression_of
from jobqueue.procrastinate.queries import KNOWN, check_queries
from tests.procrastinate import tasks_app
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


def test_the_worker_command_runs_a_procrastinate_application(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBQUEUE_DSN", dsn)
    theirs = tasks_app.make(dsn)
    with theirs.open():
        done = tasks_app.add.defer(a=2, b=3)
        unknown = theirs.configure_task("of another release").defer()
    told = CliRunner().invoke(main, ["worker", "tests.procrastinate.tasks_app", "--until-idle"])
    assert told.exit_code == 0, told.output
    assert value(connection, "select result from jobqueue.job where id = %s", [job_uuid(done)]) == 5
    assert (
        value(
            connection, "select count(*) from jobqueue.queue where timeout is not null and name <> 'procrastinate.tick'"
        )
        == 0
    )
    status = value(connection, "select status from jobqueue.job where id = %s", [job_uuid(unknown)])
    assert status == "pending", "a task that this release does not have is left to another worker"
    assert isinstance(load_app("tests.procrastinate.tasks_app"), jobqueue.App)


async def test_a_task_runs_in_a_process_with_its_context_and_retries(dsn: str, connection: Connection) -> None:
    theirs = tasks_app.make(dsn)
    native = adopt(theirs)
    async with theirs.open_async():
        await asyncio.wait_for(native.run_worker(until_idle=True), 60)  # registers the task's label
        await tasks_app.in_process.defer_async(who="Ann")
        await asyncio.wait_for(native.run_worker(until_idle=True), 60)
    ((name, retries, result),) = rows(connection, "select display_name, retry_count, result from jobqueue.job")
    assert (name, retries) == ("Process of Ann", 1)
    assert (result["who"], result["task"]) == ("Ann", "in_process")
    assert result["pid"] != os.getpid()
    assert rows(connection, "select error_message from jobqueue.attempt") == [("not yet",)]


async def test_periodic_tasks_become_schedules_that_send_each_tick_once(dsn: str, connection: Connection) -> None:
    app = procrastinate.App(connector=JobqueueConnector(dsn, min_size=1))
    ran: list[Any] = []

    @app.periodic(cron="* * * * *", periodic_id="each", priority=2, task_kwargs={"who": "x"}, lock="L")
    @app.task(name="tick", queue="ticks")
    async def tick(timestamp: int, who: str) -> None:
        ran.append((who, timestamp))

    @app.periodic(cron="* * * * *")
    @app.task(name="one_waits", queueing_lock="one")
    async def one_waits(timestamp: int) -> None:
        ran.append(("one", timestamp))

    native = adopt(app)
    async with app.open_async():
        await asyncio.wait_for(native.run_worker(until_idle=True), 60)
        names = rows(connection, "select name, queue, state from jobqueue.schedules order by name")
        assert names == [
            ("procrastinate:one_waits", "procrastinate.tick", "active"),
            ("procrastinate:tick:each", "ticks", "active"),
        ]
        # A minute may have begun meanwhile: then its tick has been sent.
        connection.execute("update jobqueue.schedule set next_at = date_trunc('minute', now()) where last_at is null")
        value(connection, "select count(*) from jobqueue.maintain(null, array['schedules'])")
        await asyncio.wait_for(native.run_worker(until_idle=True), 60)
        await asyncio.wait_for(native.run_worker(until_idle=True), 60)
        assert {name for name, _ in ran} == {"one", "x"}
        assert len(set(ran)) == len(ran), "each tick ran once"
        assert all(tick % 60 == 0 for _, tick in ran)
        priorities = rows(connection, "select priority, singleton_key from jobqueue.job where job_type = 'tick'")
        assert set(priorities) == {(2, "L")}
        # the stock worker leaves ticks to the schedule from now on
        job = app.configure_task("tick", queue="ticks", task_kwargs={"timestamp": 10**10}).job
        assert await app.job_manager.defer_periodic_job(job, "each", 10**10) is None


async def test_a_running_task_can_be_paused_and_goes_on_where_it_was(dsn: str, connection: Connection) -> None:
    app = procrastinate.App(connector=JobqueueConnector(dsn, min_size=1))
    seen: list[int] = []
    halfway = asyncio.Event()

    @app.task(name="pages")
    @options(pausable=True)
    async def pages() -> None:
        job = jobqueue.current_job()
        assert job is not None
        async for page in job.remaining(range(4)):
            seen.append(page)
            if page == 1 and not halfway.is_set():
                halfway.set()
                await asyncio.sleep(0)
                while not job.pause_requested:
                    await asyncio.sleep(0.01)

    async with app.open_async():
        id = await pages.defer_async()
        worker = await adopt(app).make_worker()
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(halfway.wait(), 60)
        value(connection, "select jobqueue.pause(%s, 'lunch')", [job_uuid(id)])
        async with asyncio.timeout(60):
            while value(connection, "select status from jobqueue.job") != "paused":
                await asyncio.sleep(0.01)
        assert (await app.job_manager.get_job_status_async(id)) is Status.TODO
        value(connection, "select jobqueue.resume(%s, 'back')", [job_uuid(id)])
        async with asyncio.timeout(60):
            while value(connection, "select status from jobqueue.job") != "completed":
                await asyncio.sleep(0.01)
        worker.drain()
        await asyncio.wait_for(running, 60)
    assert sorted(set(seen)) == [0, 1, 2, 3]
    assert len(seen) <= 5, "what was done is not done again"


async def test_the_command_line_of_procrastinate_works(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks_app.make(dsn)
    monkeypatch.setenv("PROCRASTINATE_APP", "tests.procrastinate.tasks_app.app")
    await procrastinate_cli.cli(["schema", "--apply"])
    await procrastinate_cli.cli(["healthchecks"])
    await procrastinate_cli.cli(["defer", "add", '{"a": 1, "b": 2}'])
    await procrastinate_cli.cli(["worker", "--one-shot"])
    await procrastinate_cli.cli(["shell", "list_jobs"])
    told = capsys.readouterr().out
    assert "Found procrastinate_jobs table: OK" in told
    assert f"#{job_id(value(connection, 'select id from jobqueue.job'))} add on sums - [succeeded]" in told


def test_a_procrastinate_with_other_queries_is_refused_by_name() -> None:
    queries = dict(procrastinate.sql.queries)
    assert set(check_queries(queries).values()) == set(KNOWN)
    changed = {**queries, "finish_job": "select %(job_id)s, %(result)s", "steal_job": "select 1"}
    del changed["list_locks"]
    with pytest.raises(ConfigurationError) as caught:
        check_queries(changed)
    assert "steal_job is new; list_locks is gone; finish_job takes job_id, result" in str(caught.value)
    assert "pip install" in (caught.value.hint or "")


def test_an_application_whose_jobs_live_elsewhere_is_refused() -> None:
    app = procrastinate.App(connector=InMemoryConnector())
    with pytest.raises(ConfigurationError, match="its jobs live elsewhere"):
        adopt(app)


def test_ids_names_and_expressions_are_translated() -> None:
    assert job_uuid(job_id("019aa8a0-0000-7000-8000-0123456789ab")).hex == "019aa8a0000070008000" + "0123456789ab"
    assert schedule_name("app.task", "") == "procrastinate:app.task"
    odd = schedule_name("app.<locals>.task", "é")
    assert odd != schedule_name("app.<locals>.task", "è")
    assert expression_of("0 5 * * 1 30") == "30 0 5 * * 1"
    assert expression_of("0 5 * * 1") == "0 5 * * 1"
