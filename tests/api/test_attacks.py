"""What somebody tries who has a key of tenant a, or none at all."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import jwt
import psycopg
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import rsa

from jobqueue.api import limits, server, streams
from jobqueue.api.app import OPERATIONS
from jobqueue.api.events import Door
from tests.api.conftest import serving
from tests.support.api_keys import bearer, create_key, forget_keys
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]
SECRET = "words-of-b"
NOW = int(time.time())  # when the tests were collected: some run many minutes later
DAY = 86_400
CLAIMS = {
    "iss": "issuer",
    "aud": "jobqueue",
    "exp": NOW + DAY,
    "sub": "mallory",
    "tenants": ["a"],
    "scope": "jobs:read",
}


@pytest.fixture
def victim(connection: Connection) -> str:
    """A job of tenant b."""
    options = {"tenant": "b", "subject": SECRET, "singleton_key": "only"}
    sent = "select id::text from jobqueue.send('q', %s::jsonb, %s::jsonb)"
    return str(value(connection, sent, (json.dumps({"said": SECRET}), json.dumps(options))))


@pytest.fixture
def mallory(connection: Connection) -> dict[str, str]:
    """Her key reads tenant a."""
    return bearer(create_key(connection, tenants=["a"], scopes=["jobs:read"], subject="mallory"))


@pytest.fixture
async def api(dsn: str, victim: str, mallory: dict[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
    async with serving(dsn) as client:
        yield client


def cursor(*parts: Any, filters: dict[str, Any] | None = None) -> str:
    """A cursor made by hand; it fits the list of tenant a."""
    fingerprint = hashlib.sha256(json.dumps([None, filters or {}], sort_keys=True).encode()).hexdigest()[:12]
    return in_base64(json.dumps([*parts, fingerprint], separators=(",", ":")).encode())


def in_base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


# -- Other tenants ----------------------------------------------------------------------------------------------------


async def test_no_route_and_verb_says_or_does_anything_about_another_tenants_job(
    api: httpx2.AsyncClient, connection: Connection, victim: str, mallory: dict[str, str]
) -> None:
    writer = bearer(create_key(connection, tenants=["a"], subject="mallory"))
    before = value(connection, "select to_jsonb(j)::text from jobqueue.job j where id = %s", (victim,))
    for headers in (mallory, writer):
        for operation in OPERATIONS:
            if operation.path == "/events":
                # endless; what it carries is of the caller's tenants: tests/api/test_streams.py
                continue
            path = operation.path.replace("{id}", victim).replace("{name}", "q")
            body = {"queue": "q", "ids": [victim], "job_id": victim, "action": "cancel", "reason": "mine"}
            for method in {operation.method, "PUT", "OPTIONS"}:
                options: dict[str, Any] = {} if method in {"GET", "OPTIONS"} else {"json": body}
                answer = await api.request(method, path, headers=headers, **options)
                assert answer.status_code < 500, (method, path)
                assert SECRET not in answer.text, (method, path)
    assert value(connection, "select to_jsonb(j)::text from jobqueue.job j where id = %s", (victim,)) == before


async def test_names_of_others_are_refused_in_every_disguise(
    api: httpx2.AsyncClient, connection: Connection, victim: str
) -> None:
    writer = bearer(create_key(connection, tenants=["a"], subject="mallory"))
    for path in ("b", "%2A", "a,b", "a%00", "A", "a%20", "a%2C*"):
        assert (await api.get(f"/tenants/{path}/jobs", headers=writer)).status_code == 403, path
        assert (await api.get(f"/jobs?tenant={path.replace('%00', '')}x", headers=writer)).status_code == 403, path
    assert (await api.get("/tenants/a%2F..%2Fb/jobs", headers=writer)).status_code == 403
    for path in ("/jobs", f"a%2Fjobs%2F{victim}", f"a/jobs/{victim}"):
        assert (await api.get(f"/tenants/{path}", headers=writer)).status_code == 404, path
    for given, status in (
        ({"tenant": None}, 403),
        ({"tenant": "*"}, 403),
        ({"tenant": "a,b"}, 403),
        ({"tenant": ["b"]}, 422),
        ({"created_by": "eve"}, 403),
        ({"depends_on": [victim]}, 404),
        ({"id": victim}, 409),
    ):
        answer = await api.post("/jobs", json={"queue": "q", **given}, headers=writer)
        assert (answer.status_code, SECRET in answer.text) == (status, False), given
    assert value(connection, "select count(*) from jobqueue.job") == 1


async def test_the_headers_of_proxies_and_frameworks_change_nothing(
    api: httpx2.AsyncClient, victim: str, mallory: dict[str, str]
) -> None:
    for header in ("X-HTTP-Method-Override", "X-Original-URL", "X-Forwarded-Prefix", "X-Forwarded-User", "X-Tenant"):
        answer = await api.get(f"/jobs/{victim}", headers={**mallory, header: "b"})
        assert answer.status_code == 404, header
    twice = [("Authorization", mallory["Authorization"])] * 2
    assert (await api.get("/jobs", headers=twice)).status_code == 401


async def test_an_idempotency_key_of_another_is_free(api: httpx2.AsyncClient, connection: Connection) -> None:
    keys = [create_key(connection, tenants=["a"]) for _ in range(2)]
    forget_keys(api)
    sent = [
        await api.post("/jobs", json={"queue": "q"}, headers={**bearer(key), "Idempotency-Key": "one"}) for key in keys
    ]
    assert [answer.status_code for answer in sent] == [202, 202]
    assert sent[0].json()["jobId"] != sent[1].json()["jobId"]


# -- What is made by hand ---------------------------------------------------------------------------------------------


async def test_a_cursor_made_by_hand_is_a_mismatch_and_never_an_error_of_the_server(
    api: httpx2.AsyncClient, victim: str, mallory: dict[str, str]
) -> None:
    at = "2026-01-01T00:00:00+00:00"
    times: tuple[Any, ...] = (5, 1.5, None, True, {}, [], "now", "infinity", "garbage", "2026-01-01", "\0", "\ud800")
    made = [cursor(time, victim) for time in times]
    made += [cursor(at, 5), cursor(at), cursor(at, victim, filters={"tenant": "b"}), "AAAA", "é"]
    made += [in_base64(b"[" * 5000), in_base64(b"5"), in_base64(b'{"a":1,"b":2,"c":3}')]
    for text in made:
        answer = await api.get("/jobs", params={"cursor": text}, headers=mallory)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "CURSOR_MISMATCH"), text[:60]
    fits = await api.get("/jobs", params={"cursor": cursor("2100-01-01T00:00:00+00:00", victim)}, headers=mallory)
    assert (fits.status_code, fits.json()["data"]) == (200, [])


@pytest.fixture(scope="module")
def signer() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def token_settings(tmp_path: Path, signer: rsa.RSAPrivateKey) -> dict[str, Any]:
    """Two keys, two families of algorithms."""
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(signer.public_key()))
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [{**public, "kid": "one"}, {**public, "kid": "two"}]}))
    names = {"jwt_key_file": path, "jwt_issuer": "issuer", "jwt_audience": "jobqueue"}
    return {**names, "jwt_algorithms": "RS256,ES256"}


def unsigned(header: Any, claims: Any = CLAIMS, signature: bytes = b"x") -> str:
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims))
    return ".".join([*map(in_base64, parts), in_base64(signature)])


async def test_a_token_made_by_hand_is_401_and_never_an_error_of_the_server(
    dsn: str, token_settings: dict[str, Any], signer: rsa.RSAPrivateKey, caplog: pytest.LogCaptureFixture
) -> None:
    def signed(**changes: Any) -> str:
        return jwt.encode({**CLAIMS, **changes}, signer, "RS256", {"kid": "one"})

    headers = [{"alg": alg, "kid": "one"} for alg in ("none", "HS256", "ES256", "RS256", 5, None, ["RS256"])]
    headers += [{"alg": "RS256", **kid} for kid in ({}, {"kid": ["one"]}, {"kid": "../one"}, {"kid": "x" * 5000})]
    made = [unsigned(header) for header in (*headers, b"[" * 3000, b"[]", b"5", b"\xff")]
    made += [unsigned(headers[0], signature=b""), unsigned(headers[3], b"[" * 3000), "...", "..", "a.b.c", "x" * 9000]
    made += [
        signed(aud="other"),
        signed(iss="other"),
        signed(exp=NOW - 60),
        signed(sub="a\nGET /forged 200"),
        signed(sub=""),
    ]
    made += [signed(exp=float("inf")), signed(exp="soon"), signed(nbf=NOW + DAY)]
    async with serving(dsn, token_settings) as client:
        for text in made:
            answer = await client.get("/jobs", headers=bearer(text))
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHORIZED"), text[:80]
        assert (await client.get("/jobs", headers=bearer(signed()))).status_code == 200
        everything = await client.get("/jobs?tenant=b", headers=bearer(signed(tenants="*")))
        assert everything.status_code == 403, "a provider's wildcard opens nothing without admin"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# -- Streams and tickets ----------------------------------------------------------------------------------------------


async def test_a_stream_ends_with_its_token_whatever_its_query_says(
    dsn: str, connection: Connection, token_settings: dict[str, Any], signer: rsa.RSAPrivateKey
) -> None:
    connection.execute("select jobqueue.send('q', '{}', '{\"tenant\": \"a\"}')")
    job_id = value(connection, "select id::text from jobqueue.job")
    token = jwt.encode({**CLAIMS, "exp": NOW + DAY}, signer, "RS256", {"kid": "one"})
    async with serving(dsn, token_settings) as client:
        tokens = client.app.state.services.authenticate.tokens  # type: ignore[attr-defined]
        made = await client.post("/stream-tickets", json={"job_id": job_id}, headers=bearer(token))
        for path, headers in (
            (f"/jobs/{job_id}/events?last_event_id=ticket=", bearer(token)),
            (made.json()["url"], {}),
        ):
            with pytest.MonkeyPatch.context() as patch:
                opened: list[Door] = []
                patch.setattr("jobqueue.api.events.Door", lambda call, into=opened: noted(Door(call), into))
                reading = asyncio.create_task(client.get(path, headers=headers))
                async with asyncio.timeout(60):
                    while not opened:
                        await asyncio.sleep(0.01)
                (door,) = opened
                door._next = 0.0
                assert await door.is_open(), path
                patch.setattr(tokens._jwt, "decode", expired)
                patch.setattr("jobqueue.api.tickets.time.time", lambda: NOW + 2.0 * DAY)
                door._next = 0.0
                assert not await door.is_open(), path
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


def noted(door: Door, into: list[Door]) -> Door:
    """The door of a stream, for the test to look at."""
    into.append(door)
    return door


def expired(*_: Any, **__: Any) -> Any:
    """What the library says once the time of a token is over."""
    raise jwt.ExpiredSignatureError("Signature has expired")


async def test_a_ticket_opens_nothing_once_its_key_is_revoked_nor_for_another_stream(
    api: httpx2.AsyncClient, connection: Connection, victim: str
) -> None:
    key = create_key(connection, tenants=["b"], scopes=["jobs:read"])
    forget_keys(api)
    urls = [
        (await api.post("/stream-tickets", json={"job_id": victim}, headers=bearer(key))).json()["url"]
        for _ in range(2)
    ]
    elsewhere = await api.get(f"/events?{urls[0].partition('?')[2]}")
    connection.execute("select jobqueue.revoke_api_key(%s, 'stolen')", (key.id,))
    revoked = await api.get(urls[1])
    assert (elsewhere.status_code, revoked.status_code) == (401, 401)
    assert SECRET not in elsewhere.text + revoked.text


async def test_one_key_cannot_take_all_streams(
    api: httpx2.AsyncClient, connection: Connection, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_OF_ONE", 2)
    greedy, other = (create_key(connection, tenants=["b"], scopes=["jobs:read"]) for _ in range(2))
    forget_keys(api)
    feed = api.app.state.feed  # type: ignore[attr-defined]
    path = f"/jobs/{victim}/events"
    reading = [asyncio.create_task(api.get(path, headers=bearer(greedy))) for _ in range(2)]
    async with asyncio.timeout(60):
        while feed.streams < 2:
            await asyncio.sleep(0.01)
    refused = await api.get(path, headers=bearer(greedy))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "LIMIT_REACHED")
    reading.append(asyncio.create_task(api.get(path, headers=bearer(other))))
    async with asyncio.timeout(60):
        while feed.streams < 3:
            await asyncio.sleep(0.01)
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    assert (feed.streams, dict(feed.streams_of)) == (0, {})


# -- Slowness ---------------------------------------------------------------------------------------------------------


async def test_a_body_that_trickles_in_is_given_up_and_nothing_is_stored(
    client: httpx2.AsyncClient, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)

    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"queue": "q"'
        await asyncio.Event().wait()

    answer = await client.post("/jobs", content=trickle(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["Connection"]) == (408, "close")
    assert value(connection, "select count(*) from jobqueue.job") == 0


async def test_a_large_body_does_not_keep_the_others_waiting(client: httpx2.AsyncClient) -> None:
    seen: list[str] = []
    parse = limits.parse_json
    with pytest.MonkeyPatch.context() as patch:

        def parse_and_note(body: bytes) -> Any:
            seen.append(threading.current_thread().name)
            return parse(body)

        patch.setattr("jobqueue.api.context.parse_json", parse_and_note)
        for size in (10, 300_000):
            await client.post("/jobs", json={"queue": "q", "payload": {"text": "x" * size}})
    assert seen[0] == "MainThread"
    assert seen[1] != "MainThread"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow:"])
async def test_a_head_that_trickles_in_is_given_up(monkeypatch: pytest.MonkeyPatch, sent: bytes, first: int) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 60.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    (listening,) = server.tcp_sockets("127.0.0.1", 0)
    listening.listen()
    # An idle connection between two requests is uvicorn's business: closed after this.
    patience = 60 if sent or not first else 1
    config = uvicorn.Config(app, http=server.HeadInTime, lifespan="off", log_config=None, timeout_keep_alive=patience)
    serving_it = uvicorn.Server(config)
    running = asyncio.create_task(serving_it.serve([listening]))
    try:
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        async with asyncio.timeout(60):
            for _ in range(first):
                writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" in await reader.readuntil(b"\r\n\r\n")
            monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
    finally:
        serving_it.should_exit = True
        await running


# -- Without keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP"])
async def test_without_keys_a_request_that_came_through_a_proxy_is_refused(
    client: httpx2.AsyncClient, header: str
) -> None:
    assert (await client.get("/jobs", headers={header: "127.0.0.1"})).status_code == 403
