"""Queues, workers, schedules, the admin's look at any job, the documents."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import httpx2
import psycopg

from tests.api.conftest import send, start_job
from tests.support.api_keys import bearer, create_key, forget_keys
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


async def test_queues_show_their_options_in_seconds_and_how_many_jobs_are_ready(client: httpx2.AsyncClient) -> None:
    await send(client)
    (queue,) = (await client.get("/queues")).json()["data"]
    assert {
        "name": "q",
        "state": "active",
        "ready": 1,
        "retry_delay": 60,
        "timeout": 900,
        "lease": 30,
    }.items() <= queue.items()


async def test_a_queue_is_paused_and_resumed(client: httpx2.AsyncClient, connection: Connection) -> None:
    paused = (await client.post("/queues/q/pause", json={"reason": "a fire"})).json()
    assert (paused["state"], paused["pause_reason"]) == ("paused", "a fire")
    assert (await client.post("/queues/q/pause")).json()["pause_reason"] == "a fire"
    assert (await client.post("/queues/q/resume")).json()["state"] == "active"
    lines = rows(connection, "select action, reason from jobqueue.audit order by id")
    assert lines == [("pause_queue", "a fire"), ("resume_queue", "no reason given")]
    unknown = await client.post("/queues/nowhere/pause")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "QUEUE_NOT_FOUND")


async def test_a_name_with_a_slash_is_found_by_its_escaped_path(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('team/ocr')")
    assert (await client.post("/queues/team%2Focr/pause")).json()["state"] == "paused"
    assert (await client.post("/queues/team/ocr/pause")).status_code == 404
    sent = await client.post("/tenants/x%2fy z/jobs", json={"queue": "team/ocr"})
    assert (sent.status_code, sent.json()["tenant"]) == (202, "x/y z")
    assert (await client.get(sent.headers["Location"])).json()["id"] == sent.json()["id"]
    assert (await client.get("/ui/t/x%2Fy z")).status_code == 200


async def test_schedules_belong_to_tenants(client: httpx2.AsyncClient, connection: Connection) -> None:
    for tenant in ("a", "b"):
        connection.execute(
            "select jobqueue.schedule(%s, 'q', '0 3 * * *', '{}', jsonb_build_object('tenant', %s::text))",
            (f"night-{tenant}", tenant),
        )
    assert [row["name"] for row in (await client.get("/schedules")).json()["data"]] == ["night-a", "night-b"]
    assert [row["name"] for row in (await client.get("/tenants/b/schedules")).json()["data"]] == ["night-b"]
    paused = await client.post("/tenants/a/schedules/night-a/pause", json={"reason": "holidays"})
    assert (paused.json()["state"], paused.json()["pause_reason"]) == ("paused", "holidays")
    assert (await client.post("/schedules/night-a/resume")).json()["state"] == "active"
    hidden = await client.post("/tenants/a/schedules/night-b/pause")
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "SCHEDULE_NOT_FOUND")


async def test_a_worker_is_drained(client: httpx2.AsyncClient, connection: Connection) -> None:
    await send(client)
    start_job(connection)
    (worker,) = (await client.get("/workers")).json()["data"]
    assert worker["state"] == "working"
    drained = await client.post(f"/workers/{worker['id']}/drain", json={"reason": "an upgrade"})
    assert (drained.json()["state"], drained.json()["drain_reason"]) == ("draining", "an upgrade")
    for unknown in (uuid4(), "7"):
        answer = await client.post(f"/workers/{unknown}/drain")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "WORKER_NOT_FOUND")


async def test_only_who_sees_all_tenants_is_told_on_which_machines_workers_run(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    about = {"name": "w1", "hostname": "db-7.internal", "pid": 4711}
    connection.execute("select jobqueue.register_worker(%s, %s::jsonb)", (uuid4(), json.dumps(about)))
    nobody = dict.fromkeys(about)
    act = ["jobs:read", "jobs:act"]
    for options, expected in (
        ({"tenants": ["acme"], "scopes": act}, nobody),
        ({"tenants": ["*"], "scopes": act}, about),
        ({"tenants": ["acme"], "scopes": ["admin"]}, about),
    ):
        key = create_key(connection, **options)
        forget_keys(client)
        (worker,) = (await client.get("/workers", headers=bearer(key))).json()["data"]
        assert {name: worker[name] for name in about} == expected, options
        assert worker["state"] == "working"


async def test_an_admin_reads_a_job_of_any_tenant(client: httpx2.AsyncClient) -> None:
    job_id = await send(client, tenant="secret")
    await client.post(f"/jobs/{job_id}/pause", json={"reason": "its ETag is not to follow the clock"})
    answer = await client.get(f"/admin/jobs/{job_id}")
    assert (answer.status_code, answer.json()["tenant"]) == (200, "secret")
    assert (
        await client.get(f"/admin/jobs/{job_id}", headers={"If-None-Match": answer.headers["ETag"]})
    ).status_code == 304
    assert (await client.get(f"/admin/jobs/{uuid4()}")).status_code == 404


async def test_who_acts_is_named_by_a_caller_with_a_key(client: httpx2.AsyncClient, connection: Connection) -> None:
    from jobqueue.api.identity import Principal

    services = client.app.state.services  # type: ignore[attr-defined]
    job_id = await send(client)
    anna = Principal(key="k1", subject="anna", tenants="default", scopes=frozenset({"jobs:read", "jobs:act"}))

    async def authenticate(_: Any) -> Principal:
        return anna

    object.__setattr__(services, "authenticate", authenticate)
    assert (await client.post(f"/jobs/{job_id}/cancel")).status_code == 200
    assert value(connection, "select actor from jobqueue.audit") == "anna"
    for path in (f"/workers/{uuid4()}/drain", "/queues/q/pause"):
        assert (await client.post(path)).status_code == 403
    assert (await client.get(f"/admin/jobs/{job_id}")).status_code == 403
    assert (await client.get("/jobs/active?created_by=ben")).status_code == 403
