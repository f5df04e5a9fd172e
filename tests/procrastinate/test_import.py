"""`jobqueue import-procrastinate`: waiting jobs and periodic state move here, once, however often it is stopped and run."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import procrastinate
import psycopg
import pytest
from click.testing import CliRunner
from procrastinate.jobs import Status
from procrastinate.schema import SchemaManager
from psycopg.conninfo import make_conninfo

from jobqueue.cli import main
from jobqueue.errors import ConfigurationError
from jobqueue.procrastinate.importer import Importer
from tests.procrastinate.engines import ConnectorEngine, StockEngine
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
PLACES = """
    select job_type, queue, priority, singleton_key, options ->> 'queueing_lock', retry_count from jobqueue.job order by id
"""
MANY = "select array_agg((payload ->> 'n')::int order by id) from jobqueue.job where job_type = 'many'"


async def fill(stock_dsn: str) -> None:
    """A procrastinate installation with jobs of every kind."""
    app = StockEngine(stock_dsn).app()
    async with app.open_async():
        manager = app.job_manager
        worker = await manager.register_worker()
        await app.configure_task("running").defer_async()
        assert await manager.fetch_job(queues=None, worker_id=worker) is not None
        done = await app.configure_task("done").defer_async()
        await manager.finish_job_by_id_async(done, Status.SUCCEEDED, delete_job=False)
        await app.configure_task("a", queue="x", priority=3, lock="L", task_kwargs={"n": [1]}).defer_async()
        await app.configure_task("b", queueing_lock="Q").defer_async()
        await app.configure_task("c", schedule_in={"days": 3}).defer_async()
        again = await app.configure_task("again").defer_async()
        await manager.finish_job_by_id_async(again, Status.FAILED, delete_job=False)
        await manager.retry_job_by_id_async(again, procrastinate.utils.utcnow())
        await app.configure_task("many").batch_defer_async(*({"n": n} for n in range(20)))
        tick = app.configure_task("tick", task_kwargs={"timestamp": 500}).job
        await manager.defer_periodic_job(tick, "", 500)


async def test_what_waits_is_moved_in_order_and_the_rest_stays(
    stock_dsn: str, dsn: str, connection: Connection
) -> None:
    await fill(stock_dsn)
    given = ["import-procrastinate", "--dsn", dsn, "--source", stock_dsn, "--batch", "7", "-o", "json"]
    told = await asyncio.to_thread(CliRunner().invoke, main, [*given, "--dry-run"])
    assert told.exit_code == 0, told.output
    expected = {"jobs": 25, "ticks": 1, "held": 0, "running": 1, "ended": 1}
    assert json.loads(told.stdout) == expected
    assert value(connection, "select count(*) from jobqueue.job") == 0
    told = await asyncio.to_thread(CliRunner().invoke, main, given)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == expected

    moved = rows(connection, PLACES)
    assert moved[:4] == [
        ("a", "x", 3, "L", None, 0),
        ("b", "default", 0, None, "Q", 0),
        ("c", "default", 0, None, None, 0),
        ("again", "default", 0, None, None, 1),
    ]
    assert value(connection, MANY) == [*range(20)]
    assert value(connection, "select count(*) from jobqueue.job where wait_until > now() + interval '2 days'") == 1
    with psycopg.connect(stock_dsn) as stock:
        left = dict(rows(stock, "select status::text, count(*) from procrastinate_jobs group by 1"))
    assert left == {"doing": 1, "succeeded": 1, "cancelled": 25}

    app = ConnectorEngine(dsn).app()
    async with app.open_async():
        again = app.configure_task("tick", task_kwargs={"timestamp": 500}).job
        assert await app.job_manager.defer_periodic_job(again, "", 500) is None, "that tick was deferred there"
        assert (await app.configure_task("new").defer_async()) > max(
            job.id for job in await app.job_manager.list_jobs_async(task="many") if job.id
        )


async def test_an_import_that_was_stopped_goes_on_where_it_was_and_moves_nothing_twice(
    stock_dsn: str, dsn: str, connection: Connection
) -> None:
    await fill(stock_dsn)

    class Stopped(Exception):
        pass

    def stop(moved: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        await asyncio.to_thread(Importer(dsn, stock_dsn, batch=7, progress=stop).run)
    assert value(connection, "select count(*) from jobqueue.job") == 7
    with psycopg.connect(stock_dsn) as stock:  # it was stopped between the two commits of a batch
        stock.execute("update procrastinate_jobs set status = 'todo' where status = 'cancelled'")
    await asyncio.to_thread(Importer(dsn, stock_dsn, batch=4).run)
    assert value(connection, "select count(*) from jobqueue.job") == 25
    assert (await asyncio.to_thread(Importer(dsn, stock_dsn).run)).jobs == 0
    assert value(connection, "select count(*) from jobqueue.job") == 25


async def test_a_job_whose_queueing_lock_is_held_here_stays_there(stock_dsn: str, dsn: str) -> None:
    await fill(stock_dsn)
    app = ConnectorEngine(dsn).app()
    async with app.open_async():
        await app.configure_task("b", queueing_lock="Q").defer_async()
        done = await asyncio.to_thread(Importer(dsn, stock_dsn).run)
        assert (done.jobs, done.held) == (24, 1)


def test_a_database_without_procrastinates_tables_is_named(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no table"):
        Importer(dsn).run()


async def test_within_one_database_the_schema_of_the_old_tables_can_be_named(dsn: str, connection: Connection) -> None:
    connection.execute("create schema old")
    old = make_conninfo(dsn, options="-c search_path=old")
    with psycopg.connect(old, autocommit=True) as opened:
        opened.execute(SchemaManager.get_schema())
    await fill(old)
    moved = await asyncio.to_thread(Importer(dsn, schema="old", batch=7).run)
    assert (moved.jobs, moved.ticks) == (25, 1)
    assert value(connection, "select count(*) from jobqueue.job where status = 'pending'") == 25
    assert value(connection, "select count(*) from old.procrastinate_jobs where status = 'cancelled'") == 25
