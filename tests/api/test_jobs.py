"""POST /jobs and GET /jobs/{id}: what is answered, and with which headers."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psycopg
import pytest

from jobqueue.records import COLUMNS
from tests.api.conftest import job_count, keep_alive, send, serving, start_job
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]


async def test_a_sent_job_is_answered_202_with_its_place_and_state(client: httpx2.AsyncClient) -> None:
    answer = await client.post(
        "/jobs", json={"queue": "q", "payload": {"path": "."}, "priority": 5, "subject": "doc:7"}
    )
    assert answer.status_code == 202
    job = answer.json()
    assert UUID(job["jobId"]) == UUID(job["id"])
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert (job["status"], job["payload"], job["priority"], job["subject"]) == ("pending", {"path": "."}, 5, "doc:7")
    assert (job["created"], job["done"], job["tenant"]) == (True, False, "default")


async def test_a_job_has_every_column_and_what_can_be_done_with_it(client: httpx2.AsyncClient) -> None:
    job_id = await send(client)
    answer = await client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200
    job = answer.json()
    extras = {"done", "allowed_actions", "refused_actions", "queue_position", "links"}
    assert set(job) == {*COLUMNS, *extras}
    assert job["allowed_actions"] == ["cancel", "pause", "prioritize"]
    assert job["refused_actions"]["run_now"] == "it may run already"
    assert job["links"]["self"] == f"/jobs/{job_id}"
    assert answer.headers["Cache-Control"] == "private, no-cache"


async def test_the_place_in_the_line_follows_priority(client: httpx2.AsyncClient) -> None:
    first, second = await send(client), await send(client)
    await send(client, priority=3)
    places = [(await client.get(f"/jobs/{job}")).json()["queue_position"] for job in (first, second)]
    assert places == [2, 3]
    waiting = await send(client, delay=3600)
    assert (await client.get(f"/jobs/{waiting}")).json()["queue_position"] is None


async def test_an_unchanged_job_is_304_and_a_changed_one_200(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client)
    start_job(connection)
    keep_alive(connection)
    read = await client.get(f"/jobs/{job_id}")
    assert read.headers["ETag"] == f'W/"{read.json()["version"]}-a"'
    again = await client.get(f"/jobs/{job_id}", headers={"If-None-Match": f'"other", {read.headers["ETag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == read.headers["ETag"]
    assert "Retry-After" in again.headers
    connection.execute(
        "update jobqueue.job set heartbeat_at = now() - interval '11 s', started_at = now() - interval '1 min'"
    )
    silent = await client.get(f"/jobs/{job_id}", headers={"If-None-Match": read.headers["ETag"]})
    assert (silent.status_code, silent.json()["alive"]) == (200, False)
    assert silent.headers["ETag"].endswith('-n"')


async def test_an_ended_job_has_no_retry_after(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client)
    _, token = start_job(connection)
    connection.execute("select jobqueue.complete(%s, %s, %s)", (job_id, token, '{"pages": 3}'))
    answer = await client.get(f"/jobs/{job_id}")
    assert (answer.json()["done"], answer.json()["result"]) == (True, {"pages": 3})
    assert "Retry-After" not in answer.headers


async def test_retry_after_of_a_job_with_its_time_ahead_is_at_most_a_minute(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/jobs", json={"queue": "q", "delay": 86400})
    assert 60 <= int(answer.headers["Retry-After"]) <= 66


async def test_fields_and_include(client: httpx2.AsyncClient) -> None:
    job_id = await send(client, stages=["scan", "merge"])
    few = (await client.get(f"/jobs/{job_id}?fields=id,status")).json()
    assert few == {"id": job_id, "status": "pending"}
    links = (await client.get(f"/jobs/{job_id}?fields=links")).json()["links"]
    assert (links["self"], links["stages"]) == (f"/jobs/{job_id}", f"/jobs/{job_id}/stages")
    more = (await client.get(f"/jobs/{job_id}?include=stages,attempts")).json()
    assert [stage["name"] for stage in more["stages"]] == ["scan", "merge"]
    assert more["attempts"] == []
    wrong = await client.get(f"/jobs/{job_id}?fields=statuss")
    assert (wrong.status_code, wrong.json()["error"]["details"]["nearest"]) == (422, "status")


@pytest.mark.parametrize("bad", ["nonsense", "1", "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0", "%00", "🦆", "a" * 500])
async def test_a_malformed_id_is_404_with_the_reason(client: httpx2.AsyncClient, bad: str) -> None:
    answer = await client.get(f"/jobs/{bad}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "JOB_NOT_FOUND"
    assert answer.json()["error"]["details"]["reason"] == "malformed_id"


async def test_an_unknown_job_is_404_in_the_envelope(client: httpx2.AsyncClient) -> None:
    answer = await client.get(f"/jobs/{uuid4()}")
    body = answer.json()
    assert (answer.status_code, body["status"], body["error"]["code"]) == (404, 404, "JOB_NOT_FOUND")
    assert body["detail"] == body["error"]["message"]
    assert body["type"] == "urn:jobqueue:error:job-not-found"
    assert body["request_id"] == answer.headers["Request-Id"]
    problem = await client.get(f"/jobs/{uuid4()}", headers={"Accept": "application/problem+json"})
    assert problem.headers["Content-Type"] == "application/problem+json"


async def test_an_unknown_queue_is_404_unless_the_setting_allows_it(
    client: httpx2.AsyncClient, dsn: str, connection: Connection
) -> None:
    answer = await client.post("/jobs", json={"queue": "nowhere"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "QUEUE_NOT_FOUND")
    assert "jobqueue queues create" in answer.json()["error"]["details"]["hint"]
    assert job_count(connection) == 0
    connection.execute("insert into jobqueue.queue (name) values ('indexing'), ('emails')")
    mistyped = (await client.post("/jobs", json={"queue": "Indexnig"})).json()["error"]["details"]
    assert (mistyped["queue"], mistyped["nearest"]) == ("Indexnig", "indexing")
    assert mistyped["hint"].startswith('Did you mean "indexing"? GET /queues')
    async with serving(dsn, {"api_create_queues": True}) as allowed:
        assert (await allowed.post("/jobs", json={"queue": "nowhere"})).status_code == 202


async def test_many_jobs_are_sent_all_or_none(client: httpx2.AsyncClient, connection: Connection) -> None:
    answer = await client.post("/jobs", json={"jobs": [{"queue": "q", "payload": n} for n in range(3)]})
    assert answer.status_code == 202
    assert [job["payload"] for job in answer.json()["data"]] == [0, 1, 2]
    assert answer.json()["meta"] == {"total": 3, "created": 3}
    bad = await client.post("/jobs", json={"jobs": [{"queue": "q"}, {"queue": "q", "priorty": 1}]})
    assert (bad.status_code, bad.json()["error"]["code"]) == (422, "UNKNOWN_OPTION")
    assert bad.json()["error"]["details"] | {"hint": ""} == {
        "index": 1,
        "option": "priorty",
        "nearest": "priority",
        "hint": "",
    }
    assert job_count(connection) == 3


async def test_an_id_that_exists_answers_with_the_job_that_has_it(client: httpx2.AsyncClient) -> None:
    job_id = await send(client, id=str(uuid4()), payload=1)
    again = (await client.post("/jobs", json={"queue": "q", "id": job_id, "payload": 2})).json()
    assert (again["jobId"], again["created"], again["reason"], again["payload"]) == (job_id, False, "duplicate_id", 1)


async def test_numbers_arrive_as_they_were_written(client: httpx2.AsyncClient, connection: Connection) -> None:
    body = '{"queue": "q", "payload": {"exact": 0.1000000000000000000001, "most": 9223372036854775807}}'
    answer = await client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 202
    stored = value(connection, "select payload ->> 'exact' from jobqueue.job")
    assert stored == "0.1000000000000000000001"


# -- Idempotency ------------------------------------------------------------------------------------------------------


async def test_a_repeated_request_finds_the_job_of_the_first(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    headers = {"Idempotency-Key": '"8e03978e"'}
    first = await client.post("/jobs", json={"queue": "q", "payload": {"a": 1, "b": 2}}, headers=headers)
    reordered = {"payload": {"b": 2, "a": 1}, "queue": "q"}
    second = await client.post("/jobs", json=reordered, headers={"Idempotency-Key": "8e03978e"})
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["jobId"] == second.json()["jobId"]
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert job_count(connection) == 1


async def test_the_same_key_with_another_body_is_422(client: httpx2.AsyncClient, connection: Connection) -> None:
    headers = {"Idempotency-Key": "k"}
    await client.post("/jobs", json={"queue": "q"}, headers=headers)
    answer = await client.post("/jobs", json={"queue": "q", "payload": 2}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert job_count(connection) == 1


async def test_concurrent_twins_send_one_job(client: httpx2.AsyncClient, connection: Connection) -> None:
    headers = {"Idempotency-Key": "twins"}
    answers = await asyncio.gather(*(client.post("/jobs", json={"queue": "q"}, headers=headers) for _ in range(12)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["jobId"] for answer in answers}) == 1
    assert job_count(connection) == 1


async def test_a_refused_request_does_not_use_up_its_key(client: httpx2.AsyncClient) -> None:
    headers = {"Idempotency-Key": "again"}
    assert (await client.post("/jobs", json={"queue": "q", "priority": 10**10}, headers=headers)).status_code == 422
    assert (await client.post("/jobs", json={"queue": "nowhere"}, headers=headers)).status_code == 404
    assert (await client.post("/jobs", json={"queue": "q"}, headers=headers)).status_code == 202


async def test_a_key_is_free_again_after_a_day(client: httpx2.AsyncClient, connection: Connection) -> None:
    headers = {"Idempotency-Key": "old"}
    first = await client.post("/jobs", json={"queue": "q"}, headers=headers)
    connection.execute("update jobqueue.idempotency_key set created_at = now() - interval '25 h'")
    second = await client.post("/jobs", json={"queue": "q", "payload": "new"}, headers=headers)
    assert second.status_code == 202
    assert first.json()["jobId"] != second.json()["jobId"]


async def test_a_replay_of_a_deleted_job_still_names_it(client: httpx2.AsyncClient, connection: Connection) -> None:
    headers = {"Idempotency-Key": "gone"}
    first = await client.post("/jobs", json={"queue": "q"}, headers=headers)
    job_id = first.json()["jobId"]
    connection.execute("select jobqueue.cancel(%s, 'test'), jobqueue.delete_job(%s, 'test')", (job_id, job_id))
    second = await client.post("/jobs", json={"queue": "q"}, headers=headers)
    assert (second.status_code, second.json()["jobId"]) == (202, job_id)
    assert "Location" not in second.headers


# -- Tenants and paths ------------------------------------------------------------------------------------------------


async def test_under_a_tenant_only_its_jobs_are_seen(client: httpx2.AsyncClient) -> None:
    theirs = await send(client, tenant="acme")
    sent = await client.post("/tenants/acme/jobs", json={"queue": "q"})
    assert sent.json()["tenant"] == "acme"
    assert sent.headers["Location"] == f"/tenants/acme/jobs/{sent.json()['id']}"
    assert (await client.get(f"/tenants/acme/jobs/{theirs}")).status_code == 200
    assert (await client.get(f"/tenants/other/jobs/{theirs}")).status_code == 404
    assert (await client.get(f"/tenants/*/jobs/{theirs}")).status_code == 403
    assert (await client.get(f"/tenants/other,acme/jobs/{theirs}")).status_code == 403
    named = await client.post("/tenants/acme/jobs", json={"queue": "q", "tenant": "other"})
    assert (named.status_code, named.json()["error"]["code"]) == (403, "FORBIDDEN")


async def test_settings_rename_the_prefix_and_the_tenant_segment(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"api_prefix": "/api", "tenant_segment": "matters"}) as client:
        sent = await client.post("/api/matters/7/jobs", json={"queue": "q"})
        assert sent.headers["Location"] == f"/api/matters/7/jobs/{sent.json()['id']}"
        assert (await client.get(sent.headers["Location"])).json()["links"]["self"] == sent.headers["Location"]
        assert (await client.get("/jobs/x")).json()["error"]["code"] == "NOT_FOUND"
        assert (await client.get("/api/livez")).status_code == (await client.get("/livez")).status_code == 200
        document = (await client.get("/api/openapi.json")).json()
        assert document["servers"] == [{"url": "/api"}]
        assert "/matters/{tenant}/jobs" in document["paths"]


async def test_a_get_cannot_write_and_takes_the_api_role(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_id = await send(client)
    with connection.transaction(force_rollback=True):
        connection.execute("select jobqueue.http_job('jobqueue_api', '*', %s, null, null, null, false)", (job_id,))
        assert value(connection, "select current_user::text") == "jobqueue_api"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            connection.execute("select jobqueue.cancel(%s, 'test')", (job_id,))


async def test_the_same_path_with_another_method_is_405(client: httpx2.AsyncClient) -> None:
    answer = await client.put("/jobs", json={})
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD, POST")
    job_id = await send(client)
    head = await client.head(f"/jobs/{job_id}")
    assert (head.status_code, "ETag" in head.headers) == (200, True)


async def test_every_answer_has_the_security_headers_and_a_request_id(client: httpx2.AsyncClient) -> None:
    for path in ("/livez", "/jobs/x", "/nowhere"):
        answer = await client.get(path, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["Request-Id"] == "mine-1"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    forged = await client.get("/livez", headers={"X-Request-Id": "a b"})
    assert forged.headers["Request-Id"].startswith("req_")


async def test_without_keys_other_machines_are_refused(client: httpx2.AsyncClient, app: Any) -> None:
    foreign = httpx2.ASGITransport(app=app, client=("192.0.2.7", 4000))
    async with httpx2.AsyncClient(transport=foreign, base_url="http://test") as stranger:
        assert (await stranger.get(f"/jobs/{uuid4()}")).status_code == 403
        assert (await stranger.get("/livez")).status_code == 200
    assert json.loads((await client.get(f"/jobs/{uuid4()}")).text)["status"] == 404
