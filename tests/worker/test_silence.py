"""Connections that die without a word: a machine in between takes everything, answers nothing, and closes nothing."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from chaos_lab.proxy import Proxy

from jobqueue import App
from jobqueue.worker.resilience import AnswerWatch
from tests.worker.test_worker import Query, eventually, query, running

__all__ = ["query"]

BACKENDS = """
    select array_agg(pid order by pid) from pg_stat_activity
    where datname = current_database() and application_name = %s
"""
USERS = ("jobqueue claims", "jobqueue results", "jobqueue maintenance", "jobqueue handlers")


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    proxy = Proxy(dsn)
    yield proxy
    proxy.stop()


@pytest.fixture
async def app(proxy: Proxy) -> AsyncIterator[App]:
    app = App(proxy.start())

    @app.job("writes")
    async def writes(job) -> None:  # type: ignore[no-untyped-def]
        async with job.transaction() as connection:
            await connection.execute("select 1")

    @app.job("returns")
    async def returns() -> None: ...

    yield app
    await app.close()


async def test_a_worker_whose_claims_and_results_are_swallowed_reconnects_by_itself(
    app: App, proxy: Proxy, query: Query
) -> None:
    async with running(app, queues=["returns"], poll=0.2) as worker:
        await eventually(lambda: worker.status().state == "working")
        for user in (worker._claimer, worker._settler):
            user._watch = AnswerWatch(0.3)
        query("select 1 from jobqueue.send('returns')")
        await eventually(lambda: worker.status().done == 1)
        proxy.freeze()
        proxy.thaw(silent=1)
        query("select 1 from jobqueue.send('returns')")
        await eventually(lambda: worker.status().done == 2)
    assert query("select array_agg(distinct status) from jobqueue.job") == ["completed"]


async def test_a_server_that_is_slow_is_given_more_time_after_every_cut(dsn: str) -> None:
    watch = AnswerWatch(0.1, most=0.3)
    for limit in (0.2, 0.3, 0.3):
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            with pytest.raises(psycopg.OperationalError), watch.over(connection):
                await connection.execute("select pg_sleep(600)")
        assert watch._limit == pytest.approx(limit)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        with watch.over(connection):
            await connection.execute("select 1")
    assert watch._limit == pytest.approx(0.1)


async def test_a_worker_that_is_fenced_trusts_none_of_its_connections(app: App, query: Query) -> None:
    async with running(app, queues=["writes"], poll=0.2) as worker:
        query("select 1 from jobqueue.send('writes')")
        await eventually(lambda: worker.status().done + worker.status().failed == 1)
        await eventually(lambda: all(query(BACKENDS, user) for user in USERS))
        before = {user: set(query(BACKENDS, user)) for user in USERS}
        worker._fence(True)
        await eventually(lambda: not any(before[user] & set(query(BACKENDS, user) or ()) for user in USERS))
        worker._fence(False)
        query("select 1 from jobqueue.send('writes')")
        await eventually(lambda: query("select count(*) from jobqueue.job where status = 'completed'") == 2)
