"""POST /jobs/{id}/{action}, PATCH and DELETE: what they do, what they refuse, and what is said about it."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from tests.api.conftest import send, start_job
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
FAILURE = '{"class": "permanent", "code": "ValueError"}'


def fail(connection: Connection, job_id: str, token: str) -> None:
    connection.execute("select jobqueue.fail(%s, %s, %s)", (job_id, token, FAILURE))


async def test_each_action_answers_with_the_job_after_it(client: httpx2.AsyncClient, connection: Connection) -> None:
    async def act(verb: str, **body: Any) -> dict[str, Any]:
        answer = await client.post(f"/jobs/{job_id}/{verb}", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    job_id = await send(client, delay=3600)
    assert (await act("run-now"))["queue_position"] == 1
    assert (await act("pause", reason="lunch"))["pause_reason"] == "lunch"
    assert (await act("resume"))["resume_count"] == 1
    fail(connection, *start_job(connection))
    retried = await act("retry", from_start=True)
    assert (retried["status"], retried["retry_count"], retried["max_retries"]) == ("pending", 1, 4)
    fail(connection, *start_job(connection))
    skipped = await client.post(f"/jobs/{job_id}/skip", json={"reason": "not needed"})
    assert (skipped.json()["status"], skipped.json()["done"]) == ("skipped", True)
    assert skipped.headers["ETag"] == f'W/"{skipped.json()["version"]}-0"'
    assert [row[0] for row in rows(connection, "select action from jobqueue.audit order by id")] == [
        "run_now",
        "pause",
        "resume",
        "restart",
        "skip",
    ]


async def test_an_action_works_without_a_body_and_its_repetition_changes_nothing(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client)
    first = await client.post(f"/jobs/{job_id}/cancel")
    again = await client.post(f"/jobs/{job_id}/cancel", json={"reason": "twice"})
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["version"] == again.json()["version"]
    assert rows(connection, "select reason from jobqueue.audit") == [("no reason given",)]


async def test_what_waits_for_the_worker_is_202_until_forced(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client)
    start_job(connection)
    for _ in range(2):
        asked = await client.post(f"/jobs/{job_id}/cancel", json={"reason": "stop"})
        assert (asked.status_code, asked.headers["Retry-After"]) == (202, "1")
        assert (asked.json()["status"], asked.json()["requested_action"]) == ("processing", "cancel")
    forced = await client.post(f"/jobs/{job_id}/cancel", json={"force": True})
    assert (forced.status_code, forced.json()["status"]) == (200, "cancelled")


async def test_a_refused_action_is_409_with_what_is_allowed(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client)
    answer = await client.post(f"/jobs/{job_id}/retry")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "INVALID_TRANSITION")
    assert (error["details"]["status"], error["details"]["allowed"]) == ("pending", ["cancel", "pause", "prioritize"])
    start_job(connection)
    pause = await client.post(f"/jobs/{job_id}/pause")
    assert (pause.status_code, "checkpoint" in pause.json()["error"]["message"]) == (409, True)
    assert (await client.delete(f"/jobs/{job_id}")).status_code == 409


@pytest.mark.parametrize(
    ("verb", "body", "status", "code"),
    [
        ("cancel", {"from_start": True}, 422, "INVALID_ARGUMENT"),
        ("retry", {"force": True}, 422, "INVALID_ARGUMENT"),
        ("cancel", {"reason": 7}, 422, "INVALID_ARGUMENT"),
        ("cancel", {"reason": "x" * 2001}, 422, "INVALID_ARGUMENT"),
        ("cancel", {"raeson": "x"}, 422, "INVALID_ARGUMENT"),
        ("cancel", [], 422, "INVALID_ARGUMENT"),
    ],
)
async def test_a_body_that_cannot_be_meant_is_refused(
    client: httpx2.AsyncClient, connection: Connection, verb: str, body: Any, status: int, code: str
) -> None:
    answer = await client.post(f"/jobs/{await send(client)}/{verb}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert value(connection, "select status from jobqueue.job") == "pending"


async def test_a_waiting_job_changes_priority_and_time(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client)
    later = {"priority": 7, "run_at": "2099-01-01T00:00:00+01:00", "reason": "first things first"}
    changed = (await client.patch(f"/jobs/{job_id}", json=later)).json()
    assert (changed["priority"], changed["run_at"], changed["queue_position"]) == (7, "2098-12-31T23:00:00+00:00", None)
    assert "run_now" in changed["allowed_actions"]
    lines = rows(connection, "select action, reason from jobqueue.audit order by id")
    assert lines == [("prioritize", "first things first"), ("run_at", "first things first")]
    same = await client.patch(f"/jobs/{job_id}", json=later)
    assert same.json()["version"] == changed["version"]
    for body in ({}, {"reason": "nothing"}, {"priority": 10**10}, {"run_at": "tomorrow"}, {"status": "completed"}):
        assert (await client.patch(f"/jobs/{job_id}", json=body)).status_code == 422
    await client.post(f"/jobs/{job_id}/cancel")
    for body in ({"priority": 1}, {"run_at": "2099-01-01T00:00:00Z"}):
        refused = await client.patch(f"/jobs/{job_id}", json=body)
        assert (refused.status_code, refused.json()["error"]["details"]["allowed"]) == (409, ["resume", "delete"])


async def test_an_ended_job_is_deleted_once(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client)
    assert (await client.delete(f"/jobs/{job_id}")).status_code == 409
    await client.post(f"/jobs/{job_id}/cancel")
    gone = await client.delete(f"/jobs/{job_id}", params={"reason": "tidy"})
    assert (gone.status_code, gone.content) == (204, b"")
    assert (await client.delete(f"/jobs/{job_id}")).status_code == 404


async def test_a_job_of_another_tenant_cannot_be_acted_on(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client, tenant="a")
    for verb in ("retry", "cancel", "skip", "pause", "resume", "run-now"):
        for path in (f"/tenants/b/jobs/{job_id}/{verb}", f"/jobs/{uuid4()}/{verb}", f"/jobs/x/{verb}"):
            assert (await client.post(path)).json()["error"]["code"] == "JOB_NOT_FOUND"
    assert (await client.patch(f"/tenants/b/jobs/{job_id}", json={"priority": 1})).status_code == 404
    assert (await client.delete(f"/tenants/b/jobs/{job_id}")).status_code == 404
    assert value(connection, "select count(*) from jobqueue.audit") == 0


async def test_a_foreign_web_page_cannot_act_by_itself(client: httpx2.AsyncClient) -> None:
    """What a browser sends without asking first: no body, no key, but where the page comes from."""
    job_id = await send(client)
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = await client.post(f"/jobs/{job_id}/cancel", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")
    own = await client.post(f"/jobs/{job_id}/cancel", headers={"Origin": "http://test"})
    assert own.status_code == 200
