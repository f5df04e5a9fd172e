"""What has happened to a job: stages, attempts, audit, explanations; and who did what."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from tests.api.conftest import send, start_job
from tests.support.api_keys import bearer, create_key
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]


async def data(client: httpx2.AsyncClient, path: str) -> list[dict[str, Any]]:
    """The rows of a list."""
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    assert isinstance(found, list)
    return found


async def test_stages_and_attempts_are_rows_in_their_order(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client, stages=["scan", "merge"], tenant="a")
    _, token = start_job(connection)
    connection.execute("select jobqueue.stage(%s, %s, 'scan', 'in_progress')", (job_id, token))
    error = '{"class": "transient", "code": "IOError", "message": "no answer", "detail": "Traceback: secret"}'
    connection.execute("select jobqueue.fail(%s, %s, %s, '0 s')", (job_id, token, error))
    start_job(connection)
    stages = await data(client, f"/jobs/{job_id}/stages")
    assert [(stage["name"], stage["position"]) for stage in stages] == [("scan", 1), ("merge", 2)]
    attempts = await data(client, f"/tenants/a/jobs/{job_id}/attempts")
    assert [(row["attempt"], row["outcome"]) for row in attempts] == [(1, "failed"), (2, "processing")]
    assert (attempts[0]["error_code"], attempts[0]["error_detail"]) == ("IOError", "Traceback: secret")
    included = (await client.get(f"/jobs/{job_id}?include=attempts")).json()["attempts"]
    assert included == attempts


async def test_explain_says_why_it_is_not_running(client: httpx2.AsyncClient, connection: Connection) -> None:
    connection.execute("select jobqueue.pause_queue('q', 'a fire')")
    reasons = await data(client, f"/jobs/{await send(client)}/explain")
    assert reasons[0]["reason"] == "queue_paused"
    assert "a fire" in reasons[0]["detail"]


async def test_the_audit_of_a_job_outlives_it_and_says_when_no_reason_was_given(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client, tenant="a")
    await client.post(f"/jobs/{job_id}/cancel")
    await client.delete(f"/jobs/{job_id}?reason=too+old")
    lines = await data(client, f"/jobs/{job_id}/audit")
    assert [(line["action"], line["reason"]) for line in lines] == [
        ("cancel", "no reason given"),
        ("delete", "too old"),
    ]
    assert lines[0]["session_user_name"] == value(connection, "select session_user::text")
    assert (await client.get(f"/tenants/b/jobs/{job_id}/audit")).status_code == 404
    assert (await client.get(f"/jobs/{job_id}/stages")).status_code == 404


async def test_the_whole_audit_is_read_page_by_page_and_filtered(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    jobs = [await send(client, tenant=tenant) for tenant in "aba"]
    for job_id in jobs:
        await client.post(f"/jobs/{job_id}/pause", json={"reason": "r"})
    connection.execute("select jobqueue.pause_queue('q', 'all')")
    first = (await client.get("/audit?limit=3")).json()
    assert [line["action"] for line in first["data"]] == ["pause_queue", "pause", "pause"]
    rest = (await client.get("/audit", params={"limit": 3, "cursor": first["meta"]["next_cursor"]})).json()
    assert ([line["job_id"] for line in rest["data"]], rest["meta"]["next_cursor"]) == ([jobs[0]], None)
    assert [line["job_id"] for line in await data(client, "/tenants/a/audit")] == [jobs[2], jobs[0]]
    assert [line["job_id"] for line in await data(client, f"/audit?job_id={jobs[1]}&action=pause")] == [jobs[1]]
    assert [line["target"] for line in await data(client, "/audit?target=q")] == ["q"]
    for query, code in (
        ("cursor=x", "CURSOR_MISMATCH"),
        ("job_id=x", "INVALID_ARGUMENT"),
        ("who=me", "UNKNOWN_OPTION"),
    ):
        assert (await client.get(f"/audit?{query}")).json()["error"]["code"] == code


@pytest.mark.parametrize("what", ["stages", "attempts", "audit", "explain"])
async def test_an_unknown_or_malformed_job_is_404(client: httpx2.AsyncClient, what: str) -> None:
    for job_id, reason in ((uuid4(), "unknown_id"), ("7", "malformed_id")):
        answer = await client.get(f"/jobs/{job_id}/{what}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
        if what != "explain":
            assert answer.json()["error"]["details"]["reason"] == reason


async def test_stack_traces_and_logins_are_for_those_who_act(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client)
    _, token = start_job(connection)
    error = '{"class": "invalid", "code": "X", "message": "wrong", "detail": "Traceback: secret"}'
    connection.execute("select jobqueue.fail(%s, %s, %s)", (job_id, token, error))
    await client.post(f"/jobs/{job_id}/retry")
    for scope, shown in (("jobs:read", None), ("jobs:act", "Traceback: secret"), ("admin", "Traceback: secret")):
        key = bearer(create_key(connection, scopes=["jobs:read", scope]))
        attempts = (await client.get(f"/jobs/{job_id}/attempts", headers=key)).json()["data"]
        included = (await client.get(f"/jobs/{job_id}?include=attempts", headers=key)).json()["attempts"]
        assert attempts[0]["error_detail"] == included[0]["error_detail"] == shown
        (line,) = (await client.get(f"/jobs/{job_id}/audit", headers=key)).json()["data"]
        assert (line["session_user_name"] is not None) == (shown is not None)
        assert line["reason"] == "no reason given"


async def test_s9_and_s10_of_a_caller_with_a_key(client: httpx2.AsyncClient, connection: Connection) -> None:
    """What a tracker's client sees: its own active jobs, jobId and status at once, 401 without a key, a quota per read."""
    ann = bearer(create_key(connection, subject="ann", quota_reads=4))
    ben = bearer(create_key(connection, subject="ben"))
    sent = await client.post("/jobs", json={"queue": "q"}, headers=ann)
    assert {"jobId": sent.json()["id"], "status": "pending"}.items() <= sent.json().items()
    await client.post("/jobs", json={"queue": "q"}, headers=ben)
    active = await client.get("/jobs/active", headers=ann)
    assert [job["id"] for job in active.json()["data"]] == [sent.json()["id"]]
    assert (await client.get("/jobs/active?created_by=ben", headers=ann)).status_code == 403
    left = int(active.headers["X-RateLimit-Remaining"])
    read = await client.get(sent.headers["Location"], headers=ann)
    assert (read.status_code, int(read.headers["X-RateLimit-Remaining"])) == (200, left - 1)
