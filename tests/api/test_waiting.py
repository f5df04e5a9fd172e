"""`?wait=`: at once, at the next change, or when the time is over; and without a connection per waiting request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx2
import psycopg
import pytest
from starlette.applications import Starlette

from jobqueue.api import hub as hub_module
from jobqueue.api.hub import Hub
from tests.api.conftest import keep_alive, send, serving, start_job

Connection = psycopg.Connection[tuple[Any, ...]]
NEVER = 3600.0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each wait came to its end before its time was over; readings are not repeated, so that it was woken."""
    monkeypatch.setattr(hub_module, "CHECK_EVERY", NEVER)
    ends, wait = list[bool](), Hub.wait

    async def noted(*arguments: Any) -> bool:
        ends.append(await wait(*arguments))
        return ends[-1]

    monkeypatch.setattr(Hub, "wait", noted)
    return ends


def hub_of(app: Starlette) -> Hub:
    hub = app.state.services.hub
    assert isinstance(hub, Hub)
    return hub


async def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Return once the condition holds, or fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)


async def started(client: httpx2.AsyncClient, connection: Connection) -> tuple[str, str, str]:
    """A job that runs: id, token, and its ETag (which does not follow the clock while it is alive)."""
    job_id = await send(client)
    token = start_job(connection)[1]
    keep_alive(connection)
    return job_id, token, (await client.get(f"/jobs/{job_id}")).headers["ETag"]


def complete(connection: Connection, job_id: str, token: str) -> None:
    connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))


async def test_a_change_ends_the_wait_at_once(
    client: httpx2.AsyncClient,
    app: Starlette,
    connection: Connection,
    waits: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "CHECK_AFTER", ())  # nothing but the notification wakes it
    job_id, token, etag = await started(client, connection)
    await until(lambda: hub_of(app).listening, "the hub listens")
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
    await until(lambda: any(w.readings for ws in hub_of(app)._waiters.values() for w in ws), "it was read once")
    complete(connection, job_id, token)
    answer = await waiting
    assert (answer.status_code, answer.json()["status"], waits) == (200, "completed", [True])
    assert hub_of(app).waiting == 0


async def test_another_etag_is_answered_at_once(
    client: httpx2.AsyncClient, connection: Connection, waits: list[bool]
) -> None:
    job_id, _, _ = await started(client, connection)
    answer = await client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": 'W/"0-a"'})
    assert (answer.status_code, waits) == (200, [])


async def test_without_an_etag_an_ended_job_is_answered_at_once(
    client: httpx2.AsyncClient, connection: Connection, waits: list[bool]
) -> None:
    job_id, token, _ = await started(client, connection)
    complete(connection, job_id, token)
    assert (await client.get(f"/jobs/{job_id}?wait=25")).json()["done"] is True
    assert waits == []


async def test_without_an_etag_a_job_that_runs_is_waited_for(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id, token, _ = await started(client, connection)
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25"))
    await until(lambda: hub_of(app).waiting, "the request waits")
    complete(connection, job_id, token)
    assert (await waiting).json()["status"] == "completed"


async def test_when_the_time_is_over_the_answer_is_304_or_the_job(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id, _, etag = await started(client, connection)
    unchanged = await client.get(f"/jobs/{job_id}?wait=0.2", headers={"If-None-Match": etag})
    assert unchanged.status_code == 304
    assert (await client.get(f"/jobs/{job_id}?wait=0.2")).json()["status"] == "processing"


async def test_a_deleted_job_ends_the_wait_with_404(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id, token, _ = await started(client, connection)
    complete(connection, job_id, token)
    etag = (await client.get(f"/jobs/{job_id}")).headers["ETag"]
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
    await until(lambda: hub_of(app).waiting, "the request waits")
    connection.execute("select jobqueue.delete_job(%s, 'test')", (job_id,))
    assert (await waiting).status_code == 404


async def test_alive_ends_the_wait(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHECK_EVERY", 0.1)
    job_id, _, etag = await started(client, connection)
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
    await until(lambda: hub_of(app).waiting, "the request waits")
    connection.execute("update jobqueue.job set heartbeat_at = now() - interval '11 s'")
    answer = await waiting
    assert (answer.status_code, answer.json()["alive"]) == (200, False)


async def test_a_change_between_reading_and_subscribing_is_not_lost(
    client: httpx2.AsyncClient, connection: Connection, waits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHECK_AFTER", ())  # the first reading has to find it
    job_id, token, etag = await started(client, connection)
    subscribe = Hub._watch

    async def change_then_subscribe(self: Hub, waiters: list[hub_module.Waiter]) -> None:
        # Nobody watches yet, so this change is notified to nobody.
        monkeypatch.setattr(Hub, "_watch", subscribe)
        complete(connection, job_id, token)
        await subscribe(self, waiters)

    monkeypatch.setattr(Hub, "_watch", change_then_subscribe)
    answer = await client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag})
    assert (answer.json()["status"], waits) == ("completed", [True])


async def test_a_change_committed_after_subscribing_but_decided_before_is_not_lost(
    client: httpx2.AsyncClient,
    app: Starlette,
    connection: Connection,
    waits: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The readings soon after the first find it; more of them here, because this commit may take longer than they do.
    monkeypatch.setattr(hub_module, "CHECK_AFTER", (0.25,) * 100)
    job_id, token, etag = await started(client, connection)
    with connection.transaction():
        complete(connection, job_id, token)
        # The sender has seen that nobody watches; now somebody does, and reads the old version.
        waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
        await until(lambda: any(w.readings for ws in hub_of(app)._waiters.values() for w in ws), "it was read once")
    assert (await waiting).json()["status"] == "completed"
    assert waits == [True]


async def test_without_listen_the_readings_find_every_change(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHECK_EVERY", 0.1)
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"pooler": True}) as client:
        app: Starlette = client.app  # type: ignore[attr-defined]
        job_id, token, etag = await started(client, connection)
        waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
        await until(lambda: hub_of(app).waiting, "the request waits")
        complete(connection, job_id, token)
        assert (await waiting).json()["status"] == "completed"
        assert not hub_of(app).listening


async def test_the_listener_comes_back_after_it_was_cut_off(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id, token, etag = await started(client, connection)
    hub = hub_of(app)
    await until(lambda: hub.listening, "the hub listens")
    connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name = 'jobqueue api listener'"
    )
    await until(lambda: not hub.listening, "the hub notices")
    await until(lambda: hub.listening, "the hub listens again")
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
    await until(lambda: hub._watched, "somebody watches")
    complete(connection, job_id, token)
    assert (await waiting).json()["status"] == "completed"


async def test_500_requests_wait_on_4_connections_and_are_woken_by_one_change_each(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection, waits: list[bool]
) -> None:
    jobs = [await started(client, connection) for _ in range(100)]
    hub = hub_of(app)
    await until(lambda: hub.listening, "the hub listens")
    waiting = [
        asyncio.create_task(client.get(f"/jobs/{job_id}?wait=30", headers={"If-None-Match": etag}))
        for job_id, _, etag in jobs
        for _ in range(5)
    ]
    await until(lambda: hub.waiting == 500, "all wait")
    await until(lambda: "all" in hub._watched, "one watch serves them all")
    busy = connection.execute(
        "select count(*), count(*) filter (where state <> 'idle') from pg_stat_activity"
        " where datname = current_database() and application_name = 'jobqueue api'"
    ).fetchone()
    assert busy is not None
    assert busy[0] <= 4
    for job_id, token, _ in jobs:
        complete(connection, job_id, token)
    answers = await asyncio.gather(*waiting)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["status"] for answer in answers} == {"completed"}
    assert waits == [True] * 500
    assert hub.waiting == 0


async def test_the_end_of_the_process_ends_all_waits(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection, waits: list[bool]
) -> None:
    job_id, _, etag = await started(client, connection)
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=30", headers={"If-None-Match": etag}))
    await until(lambda: hub_of(app).waiting, "the request waits")
    hub_module.end_all_waits()
    assert ((await waiting).status_code, waits) == (304, [True])
    assert (await client.get("/readyz")).status_code == 503


async def test_a_strange_notification_does_no_harm(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id, token, etag = await started(client, connection)
    hub = hub_of(app)
    await until(lambda: hub.listening, "the hub listens")
    waiting = asyncio.create_task(client.get(f"/jobs/{job_id}?wait=25", headers={"If-None-Match": etag}))
    await until(lambda: hub._watched, "somebody watches")
    for payload in ("nonsense", "7", "[[1,2,3]]", f'[["{job_id}", "x"]]', "[[{}, 1]]", "null"):
        connection.execute("select pg_notify('jobqueue_jobs', %s)", (payload,))
    complete(connection, job_id, token)
    assert (await waiting).json()["status"] == "completed"
    assert hub.listening
