"""GET /jobs, /jobs/active, /jobs/stats: pages, filters, cursors, and the indexes behind them."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from tests.api.conftest import send, serving, start_job
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


async def page(client: httpx2.AsyncClient, path: str = "/jobs", **query: Any) -> tuple[list[Any], dict[str, Any]]:
    """The data and meta of a list."""
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"], answer.json()["meta"]


async def ids_of(client: httpx2.AsyncClient, path: str = "/jobs", **query: Any) -> list[str]:
    """The ids of a list, in its order."""
    return [job["id"] for job in (await page(client, path, **query))[0]]


@pytest.fixture
async def seven(client: httpx2.AsyncClient) -> list[str]:
    """Seven jobs of two tenants, the newest first."""
    sent = [await send(client, tenant="a" if n % 2 else "b", subject=f"doc:{n}", payload=n) for n in range(7)]
    return sent[::-1]


async def test_pages_are_newest_first_by_number_and_by_cursor(client: httpx2.AsyncClient, seven: list[str]) -> None:
    everything, meta = await page(client)
    assert [job["id"] for job in everything] == seven
    assert meta == {"total": 7, "total_capped": False, "page": 1, "per_page": 20, "next_cursor": None}
    assert await ids_of(client, page=2, per_page=3) == seven[3:6]
    assert await ids_of(client, page=4, per_page=3) == []
    walked: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        answer = await client.get("/jobs", params=query)
        walked += [job["id"] for job in answer.json()["data"]]
        cursor = answer.json()["meta"]["next_cursor"]
        assert ("Link" in answer.headers) == (cursor is not None)
        if cursor is None:
            break
        query["cursor"] = cursor
    assert walked == seven
    followed = (await client.get("/jobs?limit=3&page=1")).headers["Link"]
    assert [job["id"] for job in (await client.get(followed[1 : followed.index(">")])).json()["data"]] == seven[3:6]
    # a job sent meanwhile moves no page that is read by cursor
    cursor = (await page(client, limit=3))[1]["next_cursor"]
    await send(client)
    assert await ids_of(client, limit=3, cursor=cursor) == seven[3:6]
    assert (await page(client, limit=100_000))[1]["per_page"] == 200


async def test_filters_all_must_hold(client: httpx2.AsyncClient, connection: Connection, seven: list[str]) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('other')")
    other = str((await client.post("/jobs", json={"queue": "other", "job_type": "scan"})).json()["id"])
    assert await ids_of(client, tenant="a") == seven[1::2]
    assert await ids_of(client, "/tenants/a/jobs") == seven[1::2]
    assert await ids_of(client, subject="doc:3") == [seven[3]]
    assert await ids_of(client, queue="other") == await ids_of(client, job_type="scan") == [other]
    assert await ids_of(client, queue="other,q", limit=2) == [other, seven[0]]
    assert await ids_of(client, ids=f"{seven[2]},{seven[5].upper()},{uuid4()}") == [seven[2], seven[5]]
    assert await ids_of(client, "/tenants/b/jobs", ids=f"{seven[1]},{seven[2]}") == [seven[2]]
    running, _ = start_job(connection)
    failing, token = start_job(connection)
    connection.execute("select jobqueue.fail(%s, %s, %s)", (failing, token, '{"class": "invalid", "code": "X"}'))
    connection.execute("select jobqueue.cancel(%s, 'test')", (seven[0],))
    assert await ids_of(client, status="processing") == [running]
    assert await ids_of(client, status="failed") == await ids_of(client, error_class="invalid") == [failing]
    assert set(await ids_of(client, status="failed,cancelled")) == {failing, seven[0]}
    assert (await page(client, status="pending", tenant="a"))[1]["total"] == 2
    at = value(connection, "select to_jsonb(created_at) #>> '{}' from jobqueue.job where id = %s", [seven[3]])
    assert await ids_of(client, created_after=at, queue="q") == seven[:3]
    assert await ids_of(client, created_before=at) == seven[4:]


async def test_fields_and_large_values(client: httpx2.AsyncClient) -> None:
    large = await send(client, payload={"text": "".join(uuid4().hex for _ in range(2000))}, metadata={"small": 1})
    await send(client, payload={"small": 1})
    (small_job, large_job), _ = await page(client)
    assert small_job["payload"] == {"small": 1}
    assert "omitted" not in small_job
    assert (large_job["omitted"], "payload" in large_job, large_job["metadata"]) == (["payload"], False, {"small": 1})
    assert small_job.keys() - large_job.keys() == {"payload"}
    assert (small_job["done"], small_job["links"]["self"]) == (False, f"/jobs/{small_job['id']}")
    assert "cancel" in small_job["allowed_actions"]
    assert len((await client.get(f"/jobs/{large}")).json()["payload"]["text"]) == 64_000
    few, _ = await page(client, fields="status,id,done")
    assert few[1] == {"status": "pending", "id": large, "done": False}
    linked, _ = await page(client, fields="links,queue_position")
    assert [(job.keys(), job["queue_position"]) for job in linked] == [({"queue_position", "links"}, n) for n in (2, 1)]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("statuss=failed", 400, "UNKNOWN_OPTION"),
        ("status=QUEUED", 422, "INVALID_ARGUMENT"),
        ("limit=x", 400, "INVALID_ARGUMENT"),
        ("limit=0", 422, "INVALID_ARGUMENT"),
        ("limit=5&per_page=5", 400, "INVALID_ARGUMENT"),
        ("page=101&per_page=100", 422, "INVALID_ARGUMENT"),
        ("ids=7", 422, "INVALID_ARGUMENT"),
        ("ids=" + ",".join(["00000000-0000-0000-0000-000000000000"] * 101), 422, "INVALID_ARGUMENT"),
        ("created_after=yesterday", 422, "INVALID_ARGUMENT"),
        ("created_after=2030-01-01T00:00:00", 422, "INVALID_ARGUMENT"),
        ("tenant=*", 200, None),
        ("cursor=zzz", 400, "CURSOR_MISMATCH"),
        ("cursor=W10", 400, "CURSOR_MISMATCH"),
        ("cursor=e30&page=1", 400, "INVALID_ARGUMENT"),
        ("status=,", 422, "INVALID_ARGUMENT"),
    ],
)
async def test_a_query_that_cannot_be_meant_is_refused(
    client: httpx2.AsyncClient, query: str, status: int, code: str | None
) -> None:
    answer = await client.get(f"/jobs?{query}")
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code), answer.text


async def test_a_cursor_belongs_to_its_filters_and_tenant(client: httpx2.AsyncClient, seven: list[str]) -> None:
    _, meta = await page(client, limit=2)
    for path, query in (("/jobs", {"status": "failed"}), ("/tenants/a/jobs", {})):
        answer = await client.get(path, params={**query, "cursor": meta["next_cursor"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "CURSOR_MISMATCH")
    foreign = await client.get("/tenants/a/jobs?tenant=b")
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "FORBIDDEN")


async def test_the_total_is_exact_up_to_10000(client: httpx2.AsyncClient, connection: Connection) -> None:
    connection.execute(
        "insert into jobqueue.job (queue, job_type, status) select 'q', 'q', 'blocked' from generate_series(1, 10001)"
    )
    assert {"total": 10_000, "total_capped": True}.items() <= (await page(client, limit=1))[1].items()
    assert {"total": 0, "total_capped": False}.items() <= (await page(client, status="failed"))[1].items()
    counts, meta = await page(client, "/jobs/stats")
    assert (counts["blocked"], counts["total"], meta) == (10_001, 10_001, {"capped": False})  # type: ignore[call-overload]


async def test_a_page_that_has_looked_at_enough_has_a_cursor_and_a_total_that_may_be_more(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    connection.execute("create or replace function jobqueue.look_back() returns int language sql as 'select 200'")
    connection.execute(
        "insert into jobqueue.job (queue, job_type, status, created_at) select case when n %% 250 = 0 then 'rare' else 'q' end,"
        " 'x', 'blocked', now() - n * interval '1 min' from generate_series(1, 500) n",
        (),
    )
    pages = []
    query: dict[str, Any] = {"job_type": "x", "queue": "rare", "limit": 2}
    while not pages or query["cursor"]:
        jobs, meta = await page(client, **query)
        pages.append((len(jobs), meta["total"], meta["total_capped"]))
        query["cursor"] = meta["next_cursor"]
    assert pages == [(0, 0, True), (1, 0, True), (1, 0, True)]


async def test_s9_active_jobs_are_the_callers_of_the_last_hour_unfinished_or_just_ended(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    async def job(minutes_ago: int, ended_minutes_ago: int | None = None, **options: Any) -> str:
        job_id = await send(client, created_by="anna", **options)
        if ended_minutes_ago is not None:
            connection.execute("select jobqueue.cancel(%s, 'test')", (job_id,))
        connection.execute(
            "update jobqueue.job set created_at = now() - make_interval(mins => %s),"
            " completed_at = now() - make_interval(mins => %s) where id = %s",
            (minutes_ago, ended_minutes_ago, job_id),
        )
        return job_id

    old = await job(61)
    waiting, just_ended, running = await job(50), await job(40, 4), await job(30)
    long_ended = await job(20, 6)
    await send(client, created_by="ben")
    assert await ids_of(client, "/jobs/active", created_by="anna") == [running, just_ended, waiting]
    everybody, meta = await page(client, "/jobs/active", limit=2)
    assert (everybody[0]["created_by"], meta["total"], len(everybody)) == ("ben", 4, 2)
    assert await ids_of(client, "/tenants/other/jobs/active") == []
    assert not {old, long_ended} & set(await ids_of(client, "/jobs/active"))
    # ids of the sender's own, before and behind those that are made here
    own = [await send(client, id=f"{first}0000000-0000-4000-8000-00000000000{first}") for first in "0f"]
    assert set(own) <= set(await ids_of(client, "/jobs/active"))


def blocks_of(connection: Connection, statement: str) -> int:
    """How many pages a statement reads, as the API's role for all tenants."""
    with connection.transaction(force_rollback=True):
        connection.execute("set local role jobqueue_api; select set_config('jobqueue.tenants', '*', true)")
        ((plan,),) = rows(connection, "explain (analyze, buffers, timing off, format json) " + statement)
    return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])


def add_ended(connection: Connection, count: int) -> None:
    """Jobs of forty tenants that were sent just now and have long ended."""
    connection.execute(
        "insert into jobqueue.job (queue, job_type, tenant, status, progress_pct, started_at, completed_at)"
        " select 'q', 'q', 't' || n %% 40, 'completed', 100, now() - interval '1 h', now() - interval '30 min'"
        " from generate_series(1, %s) n",
        (count,),
    )


async def test_s9_the_active_jobs_of_everybody_cost_the_same_however_many_ended_lately(connection: Connection) -> None:
    everybody = "select * from jobqueue.http_active('jobqueue_api', '*', null, 200, null)"
    add_ended(connection, 11_000)
    before = blocks_of(connection, everybody)
    add_ended(connection, 14_000)
    # the 10,000 that are looked at: before PostgreSQL 18, where ids of a millisecond are in no order, each on another page
    assert before < 12_000
    assert blocks_of(connection, everybody) < 1.2 * before


def plan_of(connection: Connection, query: str) -> str:
    """The plan of a statement that a function of the API runs, as the API's role for one tenant."""
    with connection.transaction(force_rollback=True):
        connection.execute("set local role jobqueue_api; select set_config('jobqueue.tenants', 'busy', true)")
        return "\n".join(line for (line,) in rows(connection, "explain " + query))


async def test_s9_active_jobs_are_found_by_an_index_also_without_statistics(connection: Connection) -> None:
    mine = "select * from jobqueue.job j where j.tenant = 'busy' and j.created_at > now() - interval '1 hour'"
    plan = plan_of(connection, mine + " and j.created_by = 'anna' order by j.created_at desc limit 20000")
    assert "job_creator" in plan
    assert "Index Cond" in plan
    newest = "select id from jobqueue.job j where j.tenant = 'busy' order by j.created_at desc, j.id desc limit 21"
    assert "job_list" in plan_of(connection, newest)


@pytest.mark.slow
async def test_s9_and_pages_read_few_pages_of_a_large_table(connection: Connection, dsn: str) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    connection.execute(
        "insert into jobqueue.job (queue, job_type, tenant, created_by, created_at, status, completed_at)"
        " select 'q', 'q', 't' || n %% 20, 'user' || n %% 50, now() - n * interval '1 s', 'blocked', null"
        " from generate_series(1, 60000) n",
        (),
    )
    for statement in (
        "select * from jobqueue.http_active('jobqueue_api', '*', 'user7', 200, null)",
        "select * from jobqueue.http_active('jobqueue_api', 't7', 'user7', 200, null)",
        "select * from jobqueue.http_found('{}', null, null, 21, 0)",
        'select * from jobqueue.http_found(\'{"subject": "nothing"}\', null, null, 21, 0)',
    ):
        with connection.transaction(force_rollback=True):
            connection.execute("set local role jobqueue_api; select set_config('jobqueue.tenants', '*', true)")
            ((plan,),) = rows(connection, "explain (analyze, buffers, format json) " + statement)
        blocks = plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]
        # the table has about 2,000 pages; each listed job is read with its actions and its place in the line
        listed = plan[0]["Plan"]["Actual Rows"]
        assert blocks < 700 + 60 * listed, (statement, blocks, listed)


async def test_stats_count_by_status(client: httpx2.AsyncClient, connection: Connection, seven: list[str]) -> None:
    job_id, token = start_job(connection)
    connection.execute("update jobqueue.job set started_at = now() - interval '3 s' where id = %s", (job_id,))
    connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))
    start_job(connection)
    counts = (await client.get("/jobs/stats")).json()["data"]
    assert {name: counts[name] for name in ("pending", "processing", "completed", "failed", "total")} == {
        "pending": 5,
        "processing": 1,
        "completed": 1,
        "failed": 0,
        "total": 7,
    }
    assert 2_000 <= counts["avg_processing_time_ms"] <= 60_000
    assert (await client.get("/tenants/a/jobs/stats")).json()["data"]["total"] == 3


async def test_the_tenants_of_settings_and_clients_of_s0(dsn: str, connection: Connection) -> None:
    """A client that reads `/api/matters/<matter>/jobs?status=…&page=1&per_page=20` and acts without a body."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"api_prefix": "/api", "tenant_segment": "matters"}) as client:
        sent = (
            await client.post("/api/matters/m1/jobs", json={"queue": "q", "job_type": "DOCUMENT_PROCESSING"})
        ).json()
        await client.post("/api/matters/m2/jobs", json={"queue": "q"})
        query = {"status": "pending", "job_type": "DOCUMENT_PROCESSING", "page": 1, "per_page": 20}
        jobs, meta = await page(client, "/api/matters/m1/jobs", **query)
        assert [job["id"] for job in jobs] == [sent["id"]]
        assert {"total": 1, "page": 1, "per_page": 20}.items() <= meta.items()
        assert jobs[0]["links"]["self"] == f"/api/matters/m1/jobs/{sent['id']}"
        cancelled = await client.post(f"/api/matters/m1/jobs/{sent['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert (await client.get("/api/matters/m1/jobs/stats")).json()["data"]["cancelled"] == 1
        assert (await client.get(f"/api/matters/m2/jobs/{sent['id']}")).status_code == 404
