"""Server-sent events: states of a job, signals of a tenant; nothing missed, nothing held, a quick end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import psycopg
import pytest
from starlette.applications import Starlette

from jobqueue.api import feed as feed_module
from jobqueue.api import hub as hub_module
from jobqueue.api import streams as streams_module
from tests.api.conftest import send, serving, start_job
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]
Event = tuple[str, Any, str | None]


class Stream:
    """A client of a stream, below HTTP: what the application sends it, as events (name, data, id)."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.comments = 0
        self.ended = asyncio.Event()
        self.started = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._rest = ""

    async def send(self, message: Any) -> None:
        """What the application calls; waits while the client does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): text.decode() for name, text in message["headers"]}
            self.started.set()
            return
        await self.reading.wait()
        self._rest += message.get("body", b"").decode()
        *blocks, self._rest = self._rest.split("\n\n")
        for block in blocks:
            lines = [line.split(": ", 1) for line in block.split("\n")]
            self.comments += sum(name == "" or name.startswith(":") for name, *_ in lines)
            fields = {line[0]: line[1] for line in lines if len(line) == 2}
            if "event" in fields:
                self._events.put_nowait((fields["event"], json.loads(fields["data"]), fields.get("id")))

    async def next(self, *names: str, seconds: float = 60.0) -> Event:
        """The next event, of these names if any are given."""
        async with asyncio.timeout(seconds):
            while True:
                found = await self._events.get()
                if not names or found[0] in names:
                    return found


@asynccontextmanager
async def streaming(app: Starlette, path: str, headers: dict[str, str] | None = None) -> AsyncIterator[Stream]:
    """Open a stream of the application; it is left at the end."""
    stream, gone = Stream(), asyncio.Event()
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    parts = urlsplit(path)
    scope = {
        "type": "http",
        "method": "GET",
        "path": parts.path,
        "raw_path": parts.path.encode(),
        "query_string": parts.query.encode(),
        "headers": [(name.lower().encode(), text.encode()) for name, text in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "scheme": "http",
        "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }

    async def run() -> None:
        try:
            await app(scope, receive, stream.send)
        finally:
            stream.ended.set()

    task = asyncio.create_task(run())
    try:
        async with asyncio.timeout(60):
            await stream.started.wait()
        yield stream
    finally:
        gone.set()
        stream.reading.set()
        await asyncio.wait_for(task, 60)


async def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Return once the condition holds, or fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)


def progress(connection: Connection, job_id: str, token: str, pct: int) -> None:
    connection.execute("select jobqueue.progress(%s, %s, %s)", (job_id, token, pct))


async def test_a_job_is_followed_from_its_state_now_to_its_end(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id = await send(client, tenant="a")
    async with streaming(app, f"/tenants/a/jobs/{job_id}/events") as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-store", "no")
        name, job, number = await stream.next()
        assert (name, job["status"], job["previous_status"], number) == ("job", "pending", None, str(job["version"]))
        assert job["links"]["events"] == f"/tenants/a/jobs/{job_id}/events"
        _, token = start_job(connection)
        assert (await stream.next())[1]["status"] == "processing"
        progress(connection, job_id, token, 40)
        _, job, _ = await stream.next()
        assert (job["status"], job["previous_status"], job["progress_pct"]) == ("processing", "processing", 40)
        connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))
        _, job, number = await stream.next()
        assert (job["status"], job["previous_status"], job["done"]) == ("completed", "processing", True)
        assert await stream.next() == ("done", {"id": job_id, "status": "completed"}, number)
        await asyncio.wait_for(stream.ended.wait(), 60)
    assert app.state.feed.streams == hub_of(app).waiting == 0


def hub_of(app: Starlette) -> hub_module.Hub:
    hub = app.state.services.hub
    assert isinstance(hub, hub_module.Hub)
    return hub


async def test_a_client_that_comes_back_gets_what_it_has_not_seen(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id = await send(client)
    path = f"/jobs/{job_id}/events"
    async with streaming(app, path) as stream:
        _, _, seen = await stream.next()
    assert seen is not None
    async with streaming(app, path, {"Last-Event-ID": seen}) as stream:
        # nothing new: the next event is the next change
        await until(lambda: hub_of(app).waiting, "the stream waits")
        _, token = start_job(connection)
        assert (await stream.next())[1]["status"] == "processing"
    progress(connection, job_id, token, 10)
    connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))
    async with streaming(app, path, {"Last-Event-ID": seen}) as stream:
        _, job, last = await stream.next()
        assert (job["status"], (await stream.next())[0]) == ("completed", "done")
    assert last is not None
    for has_all in ({"headers": {"Last-Event-ID": last}}, {"params": {"last_event_id": last}}):
        assert (await client.get(path, **has_all)).status_code == 204  # type: ignore[arg-type]


async def test_a_hidden_or_unknown_job_is_404_and_a_deleted_one_ends(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    job_id = await send(client, tenant="a")
    for path in (f"/tenants/b/jobs/{job_id}/events", f"/jobs/{uuid4()}/events", "/jobs/x/events"):
        assert (await client.get(path)).status_code == 404
    assert (await client.head(f"/jobs/{job_id}/events")).status_code == 200
    async with streaming(app, f"/jobs/{job_id}/events") as stream:
        await stream.next()
        await until(lambda: hub_of(app).waiting, "the stream waits")
        with connection.transaction():
            connection.execute("select jobqueue.cancel(%s, 'r'), jobqueue.delete_job(%s, 'r')", (job_id, job_id))
        assert (await stream.next())[:2] == ("done", {"id": job_id, "status": None, "deleted": True})


async def test_silence_is_broken_by_comments(
    client: httpx2.AsyncClient, app: Starlette, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "HEARTBEAT_SECONDS", 0.05)
    job_id = await send(client)
    async with streaming(app, f"/jobs/{job_id}/events") as job, streaming(app, "/events") as all_jobs:
        await until(lambda: job.comments > 2 and all_jobs.comments > 2, "heartbeats")


async def test_a_slow_client_gets_the_latest_state_and_a_stuck_one_is_dropped(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await send(client)
    _, token = start_job(connection)
    async with streaming(app, f"/jobs/{job_id}/events") as stream:
        await stream.next()
        stream.reading.clear()
        for pct in range(1, 30):
            progress(connection, job_id, token, pct)
            await asyncio.sleep(0)
        stream.reading.set()
        seen = []
        while not seen or seen[-1] < 29:
            seen.append((await stream.next())[1]["progress_pct"])
        assert len(seen) < 10
        monkeypatch.setattr(streams_module, "SEND_SECONDS", 0.1)
        stream.reading.clear()
        progress(connection, job_id, token, 50)
        await asyncio.wait_for(stream.ended.wait(), 60)


async def test_a_tenants_stream_has_signals_and_a_summary_of_its_jobs_only(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    done = await send(client, tenant="a", stages=["scan", "merge"])
    _, token = start_job(connection)
    connection.execute("select jobqueue.stage(%s, %s, 'scan', 'in_progress')", (done, token))
    connection.execute("select jobqueue.stage(%s, %s, 'scan', 'completed')", (done, token))
    connection.execute("select jobqueue.stage(%s, %s, 'merge', 'in_progress')", (done, token))
    async with streaming(app, "/tenants/a/events") as stream, streaming(app, "/events") as everything:
        name, summary, _ = await stream.next()
        assert (name, summary["processing"], summary["total"]) == ("summary", 1, 1)
        assert summary["stages"] == {"scan": {"done": 1, "active": 0}, "merge": {"done": 0, "active": 1}}
        assert (await stream.next())[0] == "resync"
        await until(lambda: {"all", "tenant:a"} <= hub_of(app)._watched.keys(), "both are watched")
        await until(lambda: hub_of(app).listening, "the hub listens")
        connection.execute("select jobqueue.complete(%s, %s)", (done, token))
        theirs = await send(client, tenant="b")
        connection.execute("select jobqueue.cancel(%s, 'r')", (theirs,))
        mine = await send(client, tenant="a", job_type="scan", subject="doc:1")
        connection.execute("select jobqueue.pause(%s, 'r')", (mine,))
        signals: dict[str, Any] = {}
        while mine not in signals:
            signals |= {row["id"]: row for row in (await stream.next("jobs"))[1]}
        assert theirs not in signals
        assert signals[done]["status"] == "completed"
        assert {"status": "paused", "job_type": "scan", "subject": "doc:1", "progress_pct": 0}.items() <= signals[
            mine
        ].items()
        assert signals[mine].keys() == {
            *("id", "version", "status", "job_type", "subject", "current_stage", "progress_pct", "estimated_completion")
        }
        others: dict[str, Any] = {}
        while theirs not in others:
            others |= {row["id"]: row for row in (await everything.next("jobs"))[1]}
        while (await stream.next("summary"))[1]["paused"] != 1:
            pass
    assert app.state.feed._subscribers == set()


def test_a_subscriber_that_cannot_keep_up_forgets_signals_and_is_told_to_read_again() -> None:
    subscriber = feed_module.Subscriber("a,b")
    for n in range(feed_module.MOST_PENDING):
        subscriber.add(str(n), "{}")
    subscriber.add("0", "{}")
    assert not subscriber.resync
    subscriber.add("one too many", "{}")
    assert (len(subscriber.pending), subscriber.resync) == (0, True)
    subscriber.add("1", "{}")
    assert subscriber.pending == {}
    assert [subscriber.sees(tenant) for tenant in ("a", "b", "ab", "*")] == [True, True, False, False]


async def test_a_tenants_stream_is_told_to_read_again_when_the_listener_was_cut_off(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection
) -> None:
    async with streaming(app, "/events") as stream:
        await stream.next("resync")
        await until(lambda: hub_of(app).listening and "all" in hub_of(app)._watched, "the hub listens")
        # the one after the first second, for what was being committed when the watch began
        await stream.next("resync")
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name = 'jobqueue api listener'"
        )
        await stream.next("resync")


async def test_1000_streams_hold_no_connection_and_end_with_the_process_at_once(
    client: httpx2.AsyncClient, app: Starlette, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They are told; none of them finds out by itself.
    monkeypatch.setattr(streams_module, "HEARTBEAT_SECONDS", 3600.0)
    # A thousand begin at once, and none is to be told to come again because the machine stood still meanwhile.
    monkeypatch.setattr(app.state.services.database, "patience", 60.0)
    jobs = [await send(client) for _ in range(20)]
    tokens = dict(start_job(connection) for _ in range(20))
    async with asyncio.TaskGroup() as group:
        gone = asyncio.Event()
        opened: list[Stream] = []

        async def follow(path: str) -> None:
            async with streaming(app, path) as stream:
                opened.append(stream)
                await gone.wait()

        for n in range(980):
            group.create_task(follow(f"/jobs/{jobs[n % 20]}/events"))
        for _ in range(20):
            group.create_task(follow("/tenants/default/events"))
        await until(lambda: hub_of(app).waiting == 980 and len(opened) == 1000, "all are open")
        held = value(
            connection,
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'jobqueue api'",
        )
        assert held <= 4
        for stream in opened:
            assert (await stream.next())[0] in {"job", "summary"}
        for job_id, token in tokens.items():
            progress(connection, job_id, token, 77)
        for stream in opened:
            while (latest := await stream.next("job", "jobs"))[0] == "job" and latest[1]["progress_pct"] != 77:
                pass
        hub_module.end_all_waits()
        for stream in opened:
            await asyncio.wait_for(stream.ended.wait(), 60)
        gone.set()
    assert {(await stream.next("bye"))[0] for stream in opened} == {"bye"}
    assert app.state.feed.streams == 0


async def test_a_ticket_opens_one_stream_once(client: httpx2.AsyncClient, app: Starlette) -> None:
    job_id = await send(client, tenant="a")
    made = await client.post("/tenants/a/stream-tickets", json={"job_id": job_id})
    ticket = made.json()
    assert (made.status_code, ticket["url"]) == (201, f"/tenants/a/jobs/{job_id}/events?ticket={ticket['ticket']}")
    async with streaming(app, ticket["url"]) as stream:
        assert (await stream.next())[1]["id"] == job_id
    for path in (ticket["url"], f"/events?ticket={ticket['ticket']}", "/events?ticket=nonsense"):
        assert (await client.get(path)).status_code == 401
    whole = (await client.post("/stream-tickets", json={})).json()
    assert (await client.get(f"/jobs/{job_id}/events?ticket={whole['ticket']}")).status_code == 401
    async with streaming(app, whole["url"]) as stream:
        assert (await stream.next())[0] == "summary"
    assert (await client.post("/stream-tickets", json={"job_id": "x"})).status_code == 422


async def test_a_revoked_key_ends_its_streams(
    client: httpx2.AsyncClient, app: Starlette, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "HEARTBEAT_SECONDS", 0.05)
    job_id = await send(client)

    async def nobody(_: Any) -> None:
        return None

    async with streaming(app, f"/jobs/{job_id}/events") as job, streaming(app, "/events") as all_jobs:
        object.__setattr__(app.state.services, "authenticate", nobody)
        await asyncio.wait_for(job.ended.wait(), 60)
        await asyncio.wait_for(all_jobs.ended.wait(), 60)


async def test_without_listen_streams_work_by_reading(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHECK_EVERY", 0.1)
    monkeypatch.setattr(feed_module, "CHECK_EVERY", 0.1)
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"pooler": True}) as client:
        app: Starlette = client.app  # type: ignore[attr-defined]
        job_id = await send(client)
        async with streaming(app, f"/jobs/{job_id}/events") as job, streaming(app, "/events") as all_jobs:
            await job.next()
            await all_jobs.next("resync")
            start_job(connection)
            assert (await job.next())[1]["status"] == "processing"
            await all_jobs.next("resync")
