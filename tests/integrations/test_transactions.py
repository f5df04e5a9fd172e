"""A job belongs to the application's own transaction, whichever library holds the connection."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any
from uuid import UUID

import psycopg
import pytest

from jobqueue import App, InvalidArgument, Job, LeaseLost
from tests.integrations.connections import (
    ASYNC,
    BLOCKING,
    Insert,
    execute,
    execute_blocking,
    transaction,
    transaction_blocking,
)
from tests.support.application import Connection, rows, work


class Rollback(Exception):
    """What goes wrong in the application."""


@pytest.fixture(autouse=True)
def note(connection: Connection) -> None:
    """A table of the application."""
    connection.execute("create table public.note (text text)")


def state(connection: Connection) -> tuple[int, int]:
    """How many notes and how many jobs there are."""
    found = rows(connection, "select (select count(*) from public.note), (select count(*) from jobqueue.job)")
    return found[0][0], found[0][1]


async def test_sends_in_asynchronous_transactions_are_committed_or_rolled_back(
    dsn: str, connection: Connection
) -> None:
    app = App()
    for number, (kind, open_connection) in enumerate(ASYNC.items(), start=1):
        async with open_connection(dsn) as theirs:
            with contextlib.suppress(Rollback):
                async with transaction(theirs):
                    await app.send("index", {"kind": kind}, queue="q", connection=theirs)
                    await execute(theirs, Insert)
                    raise Rollback
            assert state(connection) == (number - 1, 2 * (number - 1)), kind
            async with transaction(theirs):
                # The job comes first: sending must begin the transaction as any statement does.
                sent = await app.send("index", {"kind": kind}, queue="q", connection=theirs)
                await app.send_many("index", [{}], queue="q", connection=theirs)
                await execute(theirs, Insert)
                assert state(connection) == (number - 1, 2 * (number - 1)), kind
            assert state(connection) == (number, 2 * number), kind
            assert rows(connection, "select payload from jobqueue.job where id = %s", sent.id) == [({"kind": kind},)]


def test_sends_in_blocking_transactions_are_committed_or_rolled_back(dsn: str, connection: Connection) -> None:
    app = App()
    for number, (kind, open_connection) in enumerate(BLOCKING.items(), start=1):
        with open_connection(dsn) as theirs:
            with contextlib.suppress(Rollback), transaction_blocking(theirs):
                app.send_sync("index", {"kind": kind}, queue="q", connection=theirs)
                execute_blocking(theirs, Insert)
                raise Rollback
            assert state(connection) == (number - 1, 2 * (number - 1)), kind
            with transaction_blocking(theirs):
                sent = app.send_sync("index", {"kind": kind}, queue="q", connection=theirs)
                app.send_many_sync("index", [{}], queue="q", connection=theirs)
                execute_blocking(theirs, Insert)
                assert state(connection) == (number - 1, 2 * (number - 1)), kind
            assert state(connection) == (number, 2 * number), kind
            assert rows(connection, "select payload from jobqueue.job where id = %s", sent.id) == [({"kind": kind},)]


async def everything_else(app: App, theirs: Any, lost: UUID) -> None:
    """Whatever changes something besides `send`, in a transaction of the application."""
    flow = app.flow()
    flow.add("report", queue="q", depends_on=[flow.add("scan", {"path": "."}, queue="q")])
    assert len(await flow.send(connection=theirs)) == 2
    async with app.batch("nightly", connection=theirs, callback="report", callback_queue="q") as batch:
        await app.send("index", queue="q", batch=batch, connection=theirs)
    assert await app.schedule("daily", "index", "0 3 * * *", queue="q", connection=theirs) is not None
    assert await app.unschedule("hourly", connection=theirs)
    assert [one.queue for one in await app.publish("paid", {"n": 1}, connection=theirs)] == ["q"]
    assert (await app.upsert("index", {}, queue="q", singleton_key="k", connection=theirs)).created
    assert await app.retry(lost, "the disk is back", connection=theirs) == "pending"
    assert await app.prioritize(lost, 7, "urgent", connection=theirs) == "pending"
    assert len(await app.update_jobs("q", lost, payload={"n": 2}, connection=theirs)) == 1
    assert await app.cancel(lost, "no longer needed", connection=theirs) == "cancelled"
    assert (await app.bulk("resume", "yes, it is", ids=[lost], connection=theirs)).done == 1


def everything_else_blocking(app: App, theirs: Any, lost: UUID) -> None:
    """The same, as far as there are blocking forms."""
    flow = app.flow()
    flow.add("report", queue="q", depends_on=[flow.add("scan", {"path": "."}, queue="q")])
    assert len(flow.send_sync(connection=theirs)) == 2
    batch = app.create_batch_sync("nightly", callback="report", callback_queue="q", connection=theirs)
    app.send_sync("index", queue="q", batch=batch, connection=theirs)
    assert app.close_batch_sync(batch, connection=theirs)
    assert app.schedule_sync("daily", "index", "0 3 * * *", queue="q", connection=theirs) is not None
    assert app.unschedule_sync("hourly", connection=theirs)
    assert [one.queue for one in app.publish_sync("paid", {"n": 1}, connection=theirs)] == ["q"]
    assert app.upsert_sync("index", {}, queue="q", singleton_key="k", connection=theirs).created
    assert app.act_sync("retry", lost, "the disk is back", connection=theirs) == "pending"
    assert app.act_sync("prioritize", lost, "urgent", priority=7, connection=theirs) == "pending"
    assert len(app.update_jobs_sync("q", lost, payload={"n": 2}, connection=theirs)) == 1
    assert app.act_sync("cancel", lost, "no longer needed", connection=theirs) == "cancelled"
    assert app.act_sync("resume", lost, "yes, it is", connection=theirs) == "pending"


EVERYTHING = """
    select (select jsonb_agg(to_jsonb(j) - 'updated_at') from jobqueue.job j), (select count(*) from jobqueue.audit),
        (select jsonb_agg(name order by name) from jobqueue.schedules), (select count(*) from jobqueue.batch)
"""


async def prepare_a_failed_job(dsn: str) -> UUID:
    """A job that has failed, a schedule, and a queue that wants to know of an event."""
    async with App(dsn) as app:
        await app.create_queue("q")
        await app.subscribe("paid", "q")
        await app.schedule("hourly", "index", "@hourly", queue="q")
        failed = await app.send("index", queue="q", max_retries=0)
        async with app._lend(None) as lent:
            cursor = await lent.execute("select claim_token from jobqueue.claim('{q}', gen_random_uuid(), 1)")
            ((token,),) = await cursor.fetchall()
            await lent.execute("select jobqueue.fail(%s, %s, '{}')", [failed.id, token])
        assert failed.id is not None
        return failed.id


async def test_flows_batches_schedules_events_and_actions_join_any_transaction(
    dsn: str, connection: Connection
) -> None:
    app, lost = App(), await prepare_a_failed_job(dsn)
    before = rows(connection, EVERYTHING)
    for kind, open_connection in ASYNC.items():
        async with open_connection(dsn) as theirs:
            with contextlib.suppress(Rollback):
                async with transaction(theirs):
                    await everything_else(app, theirs, lost)
                    raise Rollback
        assert rows(connection, EVERYTHING) == before, kind
    async with ASYNC["asyncpg"](dsn) as theirs, transaction(theirs):
        await everything_else(app, theirs, lost)
    assert rows(connection, "select status, priority from jobqueue.job where id = %s", lost) == [("pending", 7)]
    assert rows(connection, "select name from jobqueue.schedules") == [("daily",)]
    assert rows(connection, "select count(*) from jobqueue.job") == [(6,)]


def test_the_blocking_forms_of_all_that_join_any_transaction_too(dsn: str, connection: Connection) -> None:
    app, lost = App(), asyncio.run(prepare_a_failed_job(dsn))
    before = rows(connection, EVERYTHING)
    for kind, open_connection in BLOCKING.items():
        with open_connection(dsn) as theirs:
            with contextlib.suppress(Rollback), transaction_blocking(theirs):
                everything_else_blocking(app, theirs, lost)
                raise Rollback
        assert rows(connection, EVERYTHING) == before, kind
    with BLOCKING["SQLAlchemy Session"](dsn) as theirs, transaction_blocking(theirs):
        everything_else_blocking(app, theirs, lost)
    assert rows(connection, "select status, priority from jobqueue.job where id = %s", lost) == [("pending", 7)]


async def test_a_job_completes_in_the_transaction_of_the_application_or_not_at_all(
    dsn: str, connection: Connection
) -> None:
    app = App(dsn)

    @app.job(max_retries=0)
    async def write_async(job: Job, payload: dict[str, Any]) -> str:
        async with ASYNC[payload["kind"]](dsn) as theirs:
            async with job.transaction({"by": payload["kind"]}, connection=theirs) as same:
                assert same is theirs
                await execute(theirs, Insert)
                if payload["fails"]:
                    raise Rollback
        return "ignored"

    @app.job(max_retries=0)
    def write_blocking(job: Job, payload: dict[str, Any]) -> str:
        with BLOCKING[payload["kind"]](dsn) as theirs:
            with job.sync.transaction({"by": payload["kind"]}, connection=theirs) as same:
                assert same is theirs
                execute_blocking(theirs, Insert)
                if payload["fails"]:
                    raise Rollback
        return "ignored"

    async with app:
        for job_type, kinds in (("write_async", ASYNC), ("write_blocking", BLOCKING)):
            for kind in kinds:
                for fails in (True, False):
                    await app.send(job_type, {"kind": kind, "fails": fails})
        await work(app)
    kinds = sorted([*ASYNC, *BLOCKING])
    done = rows(connection, "select result ->> 'by' from jobqueue.job where status = 'completed'")
    assert sorted(kind for (kind,) in done) == kinds
    failed = rows(connection, "select payload ->> 'kind', error_code from jobqueue.job where status = 'failed'")
    assert sorted(failed) == [(kind, "Rollback") for kind in kinds]
    assert state(connection)[0] == len(kinds)


async def test_a_job_that_was_lost_takes_the_work_of_the_application_back(dsn: str, connection: Connection) -> None:
    app = App(dsn)
    seen: list[str] = []

    @app.job
    async def write(job: Job, payload: dict[str, Any]) -> None:
        async with ASYNC[payload["kind"]](dsn) as theirs:
            try:
                async with job.transaction(connection=theirs):
                    await execute(theirs, Insert)
                    connection.execute("select jobqueue.cancel(%s, 'a test', force => true)", [job.id])
            except (LeaseLost, asyncio.CancelledError):
                # A beat may have told the worker before the end of the block could.
                seen.append(payload["kind"])
                raise

    async with app:
        for kind in ASYNC:
            await app.send(write, {"kind": kind})
        await work(app)
    assert sorted(seen) == sorted(ASYNC)
    assert state(connection)[0] == 0


async def test_errors_of_the_database_are_the_same_over_every_connection(dsn: str) -> None:
    app = App()
    for kind, open_connection in ASYNC.items():
        async with open_connection(dsn) as theirs:
            with pytest.raises(InvalidArgument, match="priority") as error:
                async with transaction(theirs):
                    await app.send("index", queue="q", priority="high", connection=theirs)
            assert error.value.code == "INVALID_ARGUMENT", kind


def test_errors_of_the_database_are_the_same_over_every_blocking_connection(dsn: str) -> None:
    app = App()
    for kind, open_connection in BLOCKING.items():
        with open_connection(dsn) as theirs:
            with pytest.raises(InvalidArgument, match="priority") as error, transaction_blocking(theirs):
                app.send_sync("index", queue="q", priority="high", connection=theirs)
            assert error.value.code == "INVALID_ARGUMENT", kind


async def test_other_objects_are_refused_with_what_is_accepted(dsn: str) -> None:
    app = App()
    with pytest.raises(InvalidArgument, match=r"builtins\.str .* asyncpg connection"):
        await app.send("index", queue="q", connection=dsn)
    with pytest.raises(InvalidArgument, match=r"builtins\.object .* django\.db\.connection"):
        app.send_sync("index", queue="q", connection=object())
    with psycopg.connect(dsn) as blocking:
        with pytest.raises(InvalidArgument, match=r"psycopg\.Connection .* AsyncSession") as error:
            await app.send("index", queue="q", connection=blocking)
        assert "send_sync" in str(error.value.hint)
    for open_connection in ASYNC.values():
        async with open_connection(dsn) as theirs:
            with pytest.raises(InvalidArgument, match="a blocking call cannot use") as error:
                app.send_sync("index", queue="q", connection=theirs)
            assert "await" in str(error.value.hint)


async def test_a_transaction_that_has_begun_cannot_be_the_one_of_the_jobs_end(dsn: str, connection: Connection) -> None:
    app = App(dsn)

    @app.job(max_retries=0)
    async def write(job: Job, payload: dict[str, Any]) -> None:
        async with ASYNC[payload["kind"]](dsn) as theirs, transaction(theirs):
            await execute(theirs, Insert)
            async with job.transaction(connection=theirs):
                pass

    async with app:
        for kind in ASYNC:
            await app.send(write, {"kind": kind})
        await work(app)
    messages = rows(connection, "select distinct error_message from jobqueue.job where status = 'failed'")
    assert len(messages) == 1
    assert "in a transaction already" in messages[0][0]
    assert state(connection) == (0, len(ASYNC))
