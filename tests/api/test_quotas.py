"""Quotas: what costs one, what costs nothing, and that the count is right over several processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import psycopg
import pytest

from jobqueue.api import streams
from jobqueue.api.database import Database
from jobqueue.api.errors import ApiError
from jobqueue.api.identity import Principal
from jobqueue.api.quotas import Quotas
from jobqueue.settings import load_settings
from tests.api.conftest import serving
from tests.api.test_streams import streaming
from tests.support.api_keys import bearer, create_key
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]
UNKNOWN = "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"
USED = "select coalesce(sum(used), 0) from jobqueue.quota_use where bucket = %s"


@pytest.fixture
def queue(connection: Connection) -> None:
    """The queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")


def remaining(answer: httpx2.Response) -> tuple[int, int]:
    """The status, and what is left according to the answer."""
    return answer.status_code, int(answer.headers["X-RateLimit-Remaining"])


@pytest.mark.usefixtures("queue")
async def test_a_200_costs_one_and_304_401_404_and_refusals_cost_nothing(dsn: str, connection: Connection) -> None:
    key = create_key(connection, quota_reads=4, quota_writes=2)
    async with serving(dsn) as client:
        client.headers.update(bearer(key))
        sent = await client.post("/jobs", json={"queue": "q"})
        assert remaining(sent) == (202, 1)
        path = f"/jobs/{sent.json()['id']}"
        connection.execute("select jobqueue.pause(id, 'its ETag is not to follow the clock') from jobqueue.job")
        first = await client.get(path)
        assert remaining(first) == (200, 3)
        limits = {name: first.headers[name] for name in ("X-RateLimit-Limit", "RateLimit-Policy")}
        assert limits == {"X-RateLimit-Limit": "4", "RateLimit-Policy": '"reads";q=4;w=3600'}
        assert 3500 < int(first.headers["X-RateLimit-Reset"]) - time.time() <= 3601
        assert first.headers["RateLimit"].startswith('"reads";r=3;t=3')
        assert remaining(await client.get(path, headers={"If-None-Match": first.headers["ETag"]})) == (304, 3)
        assert remaining(await client.get(f"/jobs/{UNKNOWN}")) == (404, 3)
        assert (await client.get(path + "?no=1")).status_code == 400
        assert (await client.get(path, headers=bearer("x"))).status_code == 401
        assert remaining(await client.post("/jobs", json={"queue": "nowhere"})) == (404, 1)
        assert [remaining(await client.get(path)) for _ in range(3)] == [(200, 2), (200, 1), (200, 0)]
        over = await client.get(path)
        assert remaining(over) == (429, 0)
        assert over.json()["error"]["code"] == "QUOTA_EXCEEDED"
        assert 3500 < int(over.headers["Retry-After"]) <= 3600
        assert (await client.get(path, headers={"If-None-Match": first.headers["ETag"]})).status_code == 429
        # the other bucket is another count, and a probe has none
        assert remaining(await client.post("/jobs", json={"queue": "q"})) == (202, 0)
        assert (await client.post("/jobs", json={"queue": "q"})).status_code == 429
        assert (await client.get("/livez")).status_code == 200
    assert (value(connection, USED, ("reads",)), value(connection, USED, ("writes",))) == (4, 2)
    assert value(connection, "select count(*) from jobqueue.job") == 2, "nothing of a refused request is stored"
    # the next hour
    connection.execute("update jobqueue.quota_use set window_ends = now() - interval '1 s'")
    async with serving(dsn) as client:
        assert remaining(await client.get(path, headers=bearer(key))) == (200, 3)


@pytest.mark.usefixtures("queue")
async def test_a_key_without_a_quota_has_no_headers_and_no_row(dsn: str, connection: Connection) -> None:
    async with serving(dsn) as client:
        answer = await client.post("/jobs", json={"queue": "q"}, headers=bearer(create_key(connection)))
    assert "X-RateLimit-Limit" not in answer.headers
    assert value(connection, "select count(*) from jobqueue.quota_use") == 0


@pytest.mark.usefixtures("queue")
async def test_opening_a_stream_costs_one_of_the_streams_and_a_revoked_key_ends_it(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.1)
    key = create_key(connection, quota_streams=2)
    async with serving(dsn) as client:
        app = client.app  # type: ignore[attr-defined]
        job_id = (await client.post("/jobs", json={"queue": "q"}, headers=bearer(key))).json()["id"]
        path = f"/jobs/{job_id}/events"
        asked = await client.post("/stream-tickets", json={"job_id": job_id}, headers=bearer(key))
        async with streaming(app, path, bearer(key)) as first, streaming(app, asked.json()["url"]) as second:
            assert (first.status, first.headers["x-ratelimit-remaining"]) == (200, "1")
            assert (second.status, second.headers["x-ratelimit-remaining"]) == (200, "0")
            refused = await client.get(path, headers=bearer(key))
            assert (refused.status_code, refused.json()["error"]["details"]["bucket"]) == (429, "streams")
            connection.execute("select jobqueue.revoke_api_key(%s, 'leaked')", (key.id,))
            async with asyncio.timeout(60):
                await first.ended.wait()
                await second.ended.wait()
        assert (await client.get(path, headers=bearer(key))).status_code == 401


@asynccontextmanager
async def processes(dsn: str, count: int, **options: Any) -> AsyncIterator[list[Quotas]]:
    """The quotas of several processes of one installation."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            database = Database(load_settings(dsn=dsn), dsn)
            stack.push_async_callback(database.close)
            found.append(Quotas(database, **options))
            stack.push_async_callback(found[-1].stop)
        yield found


async def spend(quotas: Quotas, caller: Principal, times: int) -> int:
    """Requests that were let through out of some."""
    passed = 0
    for _ in range(times):
        try:
            charge = await quotas.reserve(caller, "reads")
        except ApiError:
            continue
        assert charge is not None
        charge.settled = True
        passed += 1
    return passed


async def test_three_processes_let_exactly_the_quota_through(dsn: str) -> None:
    caller = Principal("k", quotas={"reads": 500})
    async with processes(dsn, 3) as found:
        passed = await asyncio.gather(*(spend(quotas, caller, 100) for quotas in found for _ in range(3)))
        # what one process still holds when another is refused comes back, and is let through then
        while (rest := sum([await spend(quotas, caller, 30) for quotas in found])) > 0:
            passed.append(rest)
    assert sum(passed) == 500


async def test_what_a_process_does_not_use_goes_back(dsn: str, connection: Connection) -> None:
    caller = Principal("k", quotas={"reads": 1000})
    async with processes(dsn, 1, held=0.05) as (quotas,):
        assert await spend(quotas, caller, 1) == 1
        deadline = time.monotonic() + 60
        while value(connection, USED, ("reads",)) != 1:
            assert time.monotonic() < deadline, "the portion did not come back"
            await asyncio.sleep(0.01)
        charge = await quotas.reserve(caller, "reads")
        assert charge is not None
        charge.settle(None)
        charge.settle(None)
    assert value(connection, USED, ("reads",)) == 1, "given back at the end, and once"


async def test_portions_shrink_towards_the_end_and_every_change_is_hot(dsn: str, connection: Connection) -> None:
    def take() -> tuple[int, int]:
        row = connection.execute("select granted, remaining from jobqueue.take_quota('k', 'reads', 200, 50)").fetchone()
        assert row is not None
        return row[0], row[1]

    assert [take() for _ in range(3)] == [(10, 190), (9, 181), (9, 172)]
    while (last := take())[1] > 0:
        assert last[0] <= max(1, (last[0] + last[1]) // 20)
    assert take() == (0, 0)
    connection.execute("select pg_stat_force_next_flush()")
    row = connection.execute(
        "select n_tup_upd > 20, n_tup_upd = n_tup_hot_upd from pg_stat_user_tables where relname = 'quota_use'"
    ).fetchone()
    assert row == (True, True)


async def test_a_late_portion_of_an_old_hour_is_void(dsn: str, connection: Connection) -> None:
    row = connection.execute("select ends from jobqueue.take_quota('k', 'reads', 10, 1)").fetchone()
    assert row is not None
    connection.execute("update jobqueue.quota_use set window_ends = now() - interval '1 s'")
    connection.execute("select jobqueue.take_quota('k', 'reads', 10, 1)")
    connection.execute("select jobqueue.give_quota(array['k'], array['reads'], array[1], array[%s])", (row[0] - 7,))
    assert value(connection, USED, ("reads",)) == 1


def test_what_has_long_ended_is_removed(connection: Connection) -> None:
    connection.execute("select jobqueue.take_quota(k, 'reads', 10, 1) from unnest(array['old', 'new']) k")
    connection.execute("update jobqueue.quota_use set window_ends = now() - interval '25 h' where owner = 'old'")
    connection.execute("select jobqueue.keep_ticket(sha256('old'), '{}', '/events', '-1 s')")
    connection.execute("select jobqueue.keep_ticket(sha256('new'), '{}', '/events')")
    connection.execute("select jobqueue.maintain(null, array['housekeeping'])")
    assert value(connection, "select array_agg(owner::text) from jobqueue.quota_use") == ["new"]
    assert value(connection, "select hash = sha256('new') from jobqueue.stream_ticket")
