"""The typed client against a real server: sends once, polls politely, waits, follows, raises the library's errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from jobqueue import Conflict, InvalidArgument, InvalidTransition, JobNotFound, QueueNotFound, UnknownOption
from jobqueue.api import create_app
from jobqueue.api import hub as hub_module
from jobqueue.errors import TimedOut
from jobqueue.http import AsyncClient, Client, ServiceUnavailable, Unauthorized
from jobqueue.http import calls as calls_module
from jobqueue.http.problems import problem_of
from jobqueue.settings import load_settings
from tests.api.conftest import job_count, start_job
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(slots=True)
class Front:
    """Stands before the API: notes requests, and fails those that it is told to fail."""

    app: ASGIApp
    url: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)
    """Path endings; the answer to a request that matches one is lost (after it was processed) or 503 (streams)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode(): text.decode() for name, text in scope["headers"]}
            self.requests.append((scope["method"], scope["path"], headers))
            failing = next((ending for ending in self.fail if scope["path"].endswith(ending)), None)
            if failing is not None and failing.endswith("/events"):
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b"away"})
                return
            if failing is not None:
                self.fail.remove(failing)

                async def lose(_: Any) -> None:
                    pass

                await self.app(scope, receive, lose)
                await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"0")]})
                await send({"type": "http.response.body", "body": b"the answer was lost"})
                return
        await self.app(scope, receive, send)

    def paths(self, method: str = "GET") -> list[str]:
        return [path for used, path, _ in self.requests if used == method]


@contextmanager
def served(dsn: str, **settings: Any) -> Iterator[Front]:
    """The API on a port of its own."""
    front = Front(create_app(load_settings(dsn=dsn, **settings)))
    config = uvicorn.Config(front, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, what="the server listens")
        front.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield front
    finally:
        hub_module.end_all_waits()
        server.should_exit = True
        thread.join()


@pytest.fixture
def front(dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """The API with the queue `q`; what is tried again is tried again soon."""
    monkeypatch.setattr(calls_module, "TRIES_AFTER", (0.01, 0.01, 0.01))
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    with served(dsn) as front:
        yield front


def complete_soon(dsn: str, after: threading.Event) -> threading.Thread:
    """Run the next job of `q` in another thread: claim, progress, complete, each when `after` is set."""

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            after.wait(60)
            job_id, token = start_job(connection)
            connection.execute("select jobqueue.progress(%s, %s, 50)", (job_id, token))
            connection.execute("select jobqueue.complete(%s, %s, %s)", (job_id, token, '{"pages": 3}'))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_job_is_sent_once_although_its_answer_was_lost(front: Front, connection: Connection) -> None:
    with Client(front.url) as client:
        front.fail.append("/jobs")
        later = datetime(2099, 1, 1, tzinfo=UTC)
        sent = client.send("q", {"path": "."}, subject="doc:1", run_at=later, retry_delay="5 min")
        assert (sent.created, sent.replayed, sent.payload, sent.run_at) == (False, True, {"path": "."}, later)
        assert job_count(connection) == 1
        keys = {headers["idempotency-key"] for method, _, headers in front.requests if method == "POST"}
        assert len(keys) == 1
        again = client.send("q", 2, idempotency_key="mine")
        assert (again.created, client.send("q", 2, idempotency_key="mine").id) == (True, again.id)


def test_errors_are_the_librarys(front: Front, connection: Connection) -> None:
    with Client(front.url) as client:
        sent = client.send("q")
        for call, error in (
            (lambda: client.get(uuid4()), JobNotFound),
            (lambda: client.get("nonsense"), JobNotFound),
            (lambda: client.retry(sent.id), InvalidTransition),
            (lambda: client.send("nowhere"), QueueNotFound),
            (lambda: client.send("q", priorty=1), UnknownOption),
            (lambda: client.send("q", tenant=""), InvalidArgument),
            (lambda: client.page(status="QUEUED"), InvalidArgument),
        ):
            with pytest.raises(error):
                call()
        with pytest.raises(InvalidTransition) as caught:
            client.retry(sent.id)
        assert caught.value.details["allowed"] == ["cancel", "pause", "prioritize"]
    assert isinstance(problem_of(401, {"error": {"code": "UNAUTHORIZED"}}, None), Unauthorized)
    assert isinstance(problem_of(409, {"error": {"code": "CONFLICT"}}, None), Conflict)
    limited = problem_of(429, {"error": {"code": "QUOTA_EXCEEDED", "message": "used up"}}, 7)
    assert (limited.code, limited.details["retry_after"], limited.exit_code) == ("QUOTA_EXCEEDED", 7, 75)
    assert problem_of(502, None, None).code == "ERROR"
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServiceUnavailable):
        client.get(uuid4())
    with pytest.raises(InvalidArgument):
        Client(front.url, tenant="a/b")


def test_polls_carry_the_etag_and_waits_end_with_the_job(front: Front, dsn: str) -> None:
    go = threading.Event()
    with Client(front.url) as client:
        sent = client.send("q")
        seen = client.pause(sent.id, "a moment")
        assert client.poll(seen) is seen
        assert (seen.etag, seen.poll_after is not None) == (front.requests[-1][2]["if-none-match"], True)
        client.resume(sent.id)
        with pytest.raises(TimedOut):
            client.wait(sent.id, timeout=0.05)
        worker = complete_soon(dsn, go)
        go.set()
        done = client.wait(sent.id, timeout=60)
        assert (done.done, done.result, done.poll_after) == (True, {"pages": 3}, None)
        assert client.poll(done) is done
        worker.join()


def test_a_job_is_followed_by_its_stream(front: Front, dsn: str) -> None:
    go = threading.Event()
    with Client(front.url) as client:
        sent = client.send("q")
        worker = complete_soon(dsn, go)
        seen = []
        for job in client.follow(sent.id):
            seen.append(job)
            go.set()
        worker.join()
        assert (seen[0].status, seen[-1].status, seen[-1].result) == ("pending", "completed", {"pages": 3})
        assert seen[-1].previous_status in {"pending", "processing"}
        assert front.paths() == [f"/jobs/{sent.id}/events"]
        for job in client.follow(client.send("q").id):
            assert job.status == "pending"
            break
        with pytest.raises(JobNotFound):
            next(client.follow(uuid4()))


def test_without_a_stream_it_is_followed_by_polls(front: Front, dsn: str) -> None:
    go = threading.Event()
    front.fail.append("/events")
    with Client(front.url) as client:
        assert client._calls.poll == 5
        client._calls.poll = 0.02
        sent = client.send("q")
        worker = complete_soon(dsn, go)
        statuses = []
        for job in client.follow(sent.id):
            statuses.append(job.status)
            go.set()
        worker.join()
    assert (statuses[0], statuses[-1]) == ("pending", "completed")
    assert front.paths().count(f"/jobs/{sent.id}/events") < len(front.paths())


def test_lists_and_everything_that_can_be_done(front: Front, connection: Connection) -> None:
    with Client(front.url, tenant="a b é") as client:
        jobs = [client.send("q", n, subject="s") for n in range(5)]
        assert [job.id for job in client.jobs(limit=2, subject="s")] == [job.id for job in jobs][::-1]
        page = client.page(ids=[jobs[0].id, jobs[1].id], created_after=datetime(2020, 1, 1, tzinfo=UTC))
        assert (page.total, page.next_cursor, {job.tenant for job in page.jobs}) == (2, None, {"a b é"})
        job_id = jobs[0].id
        assert client.change(job_id, priority=3, run_at=datetime(2099, 1, 1, tzinfo=UTC)).priority == 3
        assert client.run_now(job_id).queue_position == 1
        assert client.cancel(job_id, "no").status == "cancelled"
        assert client.resume(job_id).resume_count == 1
        _, token = start_job(connection)
        connection.execute("select jobqueue.fail(%s, %s, %s)", (job_id, token, '{"class": "invalid", "code": "X"}'))
        assert [row["error_code"] for row in client.attempts(job_id)] == ["X"]
        assert client.explain(job_id)[0]["reason"] == "failed"
        assert client.stages(job_id) == []
        assert client.get(job_id, include=["attempts"]).attempts == client.attempts(job_id)
        assert client.retry(job_id, from_start=True).retry_count == 1
        start_job(connection)
        connection.execute(
            "select jobqueue.fail(id, claim_token, %s) from jobqueue.job where id = %s",
            ('{"class": "invalid"}', job_id),
        )
        assert client.skip(job_id).status == "skipped"
        client.delete(job_id, "tidy")
        assert client.stats()["total"] == 4


async def test_the_asynchronous_client_does_the_same(front: Front, dsn: str) -> None:
    go = threading.Event()
    async with AsyncClient(front.url, key="jq_unknown") as refused:
        with pytest.raises(Unauthorized):
            await refused.stats()
    async with httpx2.AsyncClient() as own, AsyncClient(front.url, client=own) as client:
        sent = await client.send("q", {"n": 1})
        worker = complete_soon(dsn, go)
        statuses = []
        async for job in client.follow(sent.id):
            statuses.append(job.status)
            go.set()
        worker.join()
        assert (statuses[0], statuses[-1]) == ("pending", "completed")
        assert (await client.wait(sent.id)).done
        assert [job.id async for job in client.jobs()] == [sent.id]
        assert (await client.poll(await client.get(sent.id))).id == sent.id
        assert (await client.explain(sent.id))[0]["reason"] == "completed"
        await client.delete(sent.id)
    assert own.is_closed
