"""POST /jobs/bulk: by ids or filter, a look first, at once or as a job of its own; never twice, never somebody else's."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from tests.api.conftest import send, start_job
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
MANY = 1_100


@pytest.fixture
def many(connection: Connection, client: httpx2.AsyncClient) -> None:
    """1,100 waiting jobs of the tenant `a`, and one of `b`."""
    connection.execute(
        "insert into jobqueue.job (queue, job_type, tenant, ready_seq) select 'q', 'q', case n when 0 then 'b' else 'a' end,"
        " jobqueue.next_ready() from generate_series(0, %s) n",
        (MANY,),
    )


def statuses(connection: Connection) -> dict[str, int]:
    """How many jobs of `q` are in which status."""
    return dict(rows(connection, "select status, count(*) from jobqueue.job where queue = 'q' group by status"))


def keep_house(connection: Connection) -> int:
    """One portion of one operation; how many jobs it looked at."""
    return int(value(connection, "select done from jobqueue.maintain(null, array['bulk'])"))


async def test_a_few_jobs_are_done_at_once_each_with_its_outcome(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    jobs = [await send(client) for _ in range(4)]
    start_job(connection)
    await client.post(f"/jobs/{jobs[3]}/pause")
    body = {"action": "pause", "ids": [*jobs, str(uuid4())], "reason": "lunch"}
    look = (await client.post("/jobs/bulk", json={**body, "dry_run": True})).json()
    assert (look["status"], look["total"], look["id"]) == ("dry_run", 4, None)
    assert look["counts"] == {"done": 2, "unchanged": 1, "refused": 1}
    assert statuses(connection) == {"pending": 2, "processing": 1, "paused": 1}
    answer = await client.post("/jobs/bulk", json=body)
    assert (answer.status_code, answer.json()["status"], answer.json()["counts"]) == (200, "completed", look["counts"])
    assert (await client.get(answer.headers["Location"])).json() == answer.json()
    cancelled = await client.post(
        "/jobs/bulk", json={"action": "cancel", "filter": {"status": ["paused", "processing"]}}
    )
    assert cancelled.json()["counts"] == {"asked": 1, "done": 3}
    assert value(connection, "select count(*) from jobqueue.audit where reason = 'lunch'") == 2


async def test_many_are_a_job_of_their_own_worked_off_in_portions(
    client: httpx2.AsyncClient, connection: Connection, many: None
) -> None:
    body = {"action": "cancel", "filter": {"status": "pending"}, "reason": "a wrong import"}
    sent = await client.post("/tenants/a/jobs/bulk", json=body, headers={"Idempotency-Key": "k"})
    assert (sent.status_code, sent.json()["status"], sent.json()["total"]) == (202, "pending", MANY)
    again = await client.post("/tenants/a/jobs/bulk", json=body, headers={"Idempotency-Key": "k"})
    assert (again.json()["id"], again.headers["Idempotent-Replayed"]) == (sent.json()["id"], "true")
    place, job = sent.headers["Location"], sent.json()["links"]["job"]
    assert keep_house(connection) == 500
    halfway = (await client.get(place)).json()
    assert (halfway["status"], halfway["done"], halfway["counts"]) == ("processing", 500, {"done": 500})
    assert (await client.get(job)).json()["progress_pct"] == 45
    # its house-keeper dies: another one goes on where the last portion ended
    connection.execute("update jobqueue.job set lease_until = now() - interval '1 s' where status = 'processing'")
    connection.execute("update jobqueue.claim_batch set check_at = now()")
    connection.execute("select * from jobqueue.maintain(null, array['rescue'])")
    assert (await client.get(job)).json()["status"] == "pending"
    assert [keep_house(connection) for _ in range(3)] == [500, 100, 0]
    ended = await client.get(place)
    assert (ended.json()["status"], ended.json()["counts"]) == ("completed", {"done": MANY})
    assert "Retry-After" not in ended.headers
    assert (await client.get(job)).json()["result"] == {"done": MANY}
    assert statuses(connection) == {"cancelled": MANY, "pending": 1}
    assert value(connection, "select count(*) from jobqueue.audit where reason = 'a wrong import'") == MANY
    for path in (f"/tenants/b/bulk/{sent.json()['id']}", f"/bulk/{uuid4()}", "/bulk/7"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "BULK_NOT_FOUND")


async def test_a_large_one_is_cancelled_like_any_job_and_nobody_else_gets_its_rights(
    client: httpx2.AsyncClient, connection: Connection, many: None
) -> None:
    sent = (await client.post("/jobs/bulk", json={"action": "cancel", "filter": {"queue": "q"}})).json()
    assert (await client.get(f"/tenants/default/jobs/{sent['id']}")).status_code == 404
    assert keep_house(connection) == 500
    assert (await client.post(f"/jobs/{sent['id']}/cancel")).status_code == 202
    assert [keep_house(connection) for _ in range(2)] == [0, 0]
    assert (await client.get(f"/bulk/{sent['id']}")).json()["status"] == "cancelled"
    assert statuses(connection)["pending"] == MANY + 1 - 500
    await client.post(f"/jobs/{sent['id']}/resume")
    assert [keep_house(connection) for _ in range(3)] == [500, 101, 0]
    forged = await client.post("/jobs", json={"queue": "jobqueue.bulk", "payload": {"action": "delete", "tenant": "*"}})
    connection.execute(
        "insert into jobqueue.bulk_operation (tenant, action, reason, ids) values ('a', 'cancel', 'r', '{}')"
    )
    keep_house(connection)
    connection.execute("update jobqueue.bulk_operation set ended_at = null")
    connection.execute(
        "insert into jobqueue.bulk_operation (id, tenant, action, reason, ids) select id, 'a', 'cancel', 'r', '{}'"
        " from jobqueue.send('q')"
    )
    keep_house(connection)
    failed = (await client.get(forged.headers["Location"])).json()
    assert (failed["status"], failed["error_code"]) == ("failed", "NO_OPERATION")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"action": "cancel"}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {"status": None}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {"statuss": "failed"}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {"status": []}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {"created_before": "yesterday"}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "ids": ["x"]}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "ids": [str(uuid4())], "filter": {"queue": "q"}}, 422, "INVALID_ARGUMENT"),
        ({"action": "destroy", "filter": {"queue": "q"}}, 422, "INVALID_ARGUMENT"),
        ({"action": "cancel", "filter": {"queue": "q"}, "expected_count": 3}, 409, "CONFLICT"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    client: httpx2.AsyncClient, connection: Connection, body: dict[str, Any], status: int, code: str
) -> None:
    for _ in range(4):
        await send(client)
    answer = await client.post("/jobs/bulk", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert statuses(connection) == {"pending": 4}


async def test_a_bulk_action_stays_in_its_tenant(client: httpx2.AsyncClient, connection: Connection) -> None:
    mine, theirs = await send(client, tenant="a"), await send(client, tenant="b")
    body = {"action": "cancel", "ids": [mine, theirs]}
    assert (await client.post("/tenants/a/jobs/bulk", json=body)).json()["counts"] == {"done": 1}
    foreign = {"action": "cancel", "filter": {"tenant": "b"}}
    assert (await client.post("/tenants/a/jobs/bulk", json=foreign)).status_code == 403
    assert value(connection, "select status from jobqueue.job where id = %s", [theirs]) == "pending"
    for tenants, allowed in (("a", True), ("*", False)):
        with connection.transaction(force_rollback=True):
            connection.execute("select set_config('jobqueue.tenants', 'a', true)")
            start = "select jobqueue.http_bulk_start('{\"action\": \"cancel\"}', '{}', %s)"
            if allowed:
                connection.execute(start, (tenants,))
            else:
                with pytest.raises(psycopg.Error, match="may not act"):
                    connection.execute(start, (tenants,))
