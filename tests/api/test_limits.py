"""What is refused before anything is stored."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Iterator

import httpx2
import psycopg
import pytest
import pytest_asyncio

from tests.api.conftest import job_count, send, serving
from tests.support.databases import Databases

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"Content-Type": "application/json"}
DEEP = b'{"queue": "q", "payload": ' + b"[" * 200 + b"]" * 200 + b"}"
DEEPER = b'{"queue": "q", "payload": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001


@pytest.fixture(scope="module")
def dsn(databases: Databases) -> Iterator[str]:
    """One database for all tests here: nothing of what they send stays."""
    with databases.lend() as conninfo:
        yield conninfo


@pytest.fixture(scope="module")
def connection(dsn: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection to it."""
    with psycopg.connect(dsn, autocommit=True) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(dsn: str, connection: psycopg.Connection[tuple[object, ...]]) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the one application that refuses it all."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_stored(connection: psycopg.Connection[tuple[object, ...]]) -> Iterator[None]:
    """Every test of this file leaves no job behind."""
    yield
    assert job_count(connection) == 0


def payload(text: str) -> bytes:
    return ('{"queue": "q", "payload": ' + text + "}").encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"queue": "q"} x', 400),
        (b"\xff\xfe", 400),
        (payload('"\ud800"'), 400),
        (payload("NaN"), 400),
        (payload("-Infinity"), 400),
        (payload('"\0"'), 400),
        (payload(r'"\u0000"'), 422),
        (payload(r'{"a\u0000": 1}'), 422),
        (payload(r'"\\\u0000"'), 422),
        (payload(r'"\ud800"'), 422),
        (payload(r'{"\udc00x": 1}'), 422),
        (payload("9223372036854775808"), 422),
        (payload("-9223372036854775809"), 422),
        (payload("1" * 5000), 422),
        (payload("1e999"), 422),
        (DEEP, 422),
        (DEEPER, 422),
        (b"null", 422),
        (b"[]", 422),
        (b'"q"', 422),
        (b"{}", 422),
        (b'{"queue": null}', 422),
        (b'{"queue": 7}', 422),
        (b'{"queue": ""}', 422),
        (b'{"queue": "a b"}', 422),
        (b'{"queue": "q", "priority": "high"}', 422),
        (b'{"queue": "q", "priority": 3000000000}', 422),
        (b'{"queue": "q", "priority": true}', 422),
        (b'{"queue": "q", "priorty": 1}', 422),
        (b'{"queue": "q", "delay": -1}', 422),
        (b'{"queue": "q", "delay": "soon"}', 422),
        (b'{"queue": "q", "run_at": "2030-01-01"}', 422),
        (b'{"queue": "q", "run_at": "2030-01-01T00:00:00"}', 422),
        (b'{"queue": "q", "metadata": []}', 422),
        (b'{"queue": "q", "id": "x"}', 422),
        (b'{"queue": "q", "tenant": ""}', 422),
        (b'{"queue": "q", "lease": 1}', 422),
        (b'{"jobs": []}', 422),
        (b'{"jobs": {}}', 422),
        (b'{"jobs": [1]}', 422),
        (b'{"jobs": [{"queue": "q"}], "queue": "q"}', 422),
        (json.dumps({"jobs": [{"queue": "q"}] * 1001}).encode(), 422),
    ],
)
async def test_a_bad_body_is_refused(client: httpx2.AsyncClient, body: bytes, status: int) -> None:
    answer = await client.post("/jobs", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] in {"INVALID_ARGUMENT", "UNKNOWN_OPTION"}
    assert error["message"]


async def test_an_escaped_backslash_before_u0000_is_no_nul(
    client: httpx2.AsyncClient, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    answer = await client.post("/jobs", content=payload(r'"\\u0000"'), headers=JSON)
    assert (answer.status_code, answer.json()["payload"]) == (202, "\\u0000")
    connection.execute("truncate jobqueue.job")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
async def test_another_content_type_is_415(client: httpx2.AsyncClient, content_type: str) -> None:
    answer = await client.post("/jobs", content=b'{"queue": "q"}', headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_a_compressed_body_is_415(client: httpx2.AsyncClient) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    answer = await client.post("/jobs", content=gzip.compress(b'{"queue": "q"}'), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_metadata_over_1_mb_is_413_and_says_so(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/jobs", json={"queue": "q", "metadata": {"text": "é" * 600_000}})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["details"]["what"]) == (413, "TOO_LARGE", "metadata")
    assert "1048576" in error["message"]
    fits = await client.post("/jobs?x", json={"queue": "q", "metadata": {"text": "x" * 1_000_000}})
    assert fits.status_code == 400, "and an unknown parameter is refused before anything is stored"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/livez", {f"X-{number}": "1" for number in range(100)}, 431),
        ("/livez", {"X-Long": "x" * 33_000}, 431),
        ("/jobs/" + "x" * 5000, {}, 414),
    ],
)
async def test_a_request_with_too_large_a_head_is_refused(
    client: httpx2.AsyncClient, path: str, headers: dict[str, str], status: int
) -> None:
    answer = await client.get(path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "TOO_LARGE")
    assert answer.headers["Request-Id"] == answer.json()["request_id"]


async def test_a_huge_body_is_413_whether_its_length_is_declared_or_not(
    dsn: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    async def portions() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with serving(dsn, max_body_bytes=50_000) as client:
        declared = await client.post("/jobs", content=b" " * 50_001, headers=JSON)
        streamed = await client.post("/jobs", content=portions(), headers=JSON)
    for answer in (declared, streamed):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "TOO_LARGE")


async def test_a_payload_over_8_mb_is_413_and_says_so(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/jobs", json={"queue": "q", "payload": "x" * (8 * 1024 * 1024)})
    assert (answer.status_code, answer.json()["error"]["details"]["what"]) == (413, "payload")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("statu=1", "UNKNOWN_OPTION"),
        ("wait=soon", "INVALID_ARGUMENT"),
        ("wait=-1", "INVALID_ARGUMENT"),
        ("wait=1&wait=2", "INVALID_ARGUMENT"),
        ("fields=%ff", "INVALID_ARGUMENT"),
        ("fields=%00", "INVALID_ARGUMENT"),
        ("fields=" + "a" * 9000, "INVALID_ARGUMENT"),
    ],
)
async def test_a_bad_query_is_400(client: httpx2.AsyncClient, query: str, code: str) -> None:
    answer = await client.get(f"/jobs/0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_no_parameter_is_known_where_none_is_documented(client: httpx2.AsyncClient) -> None:
    assert (await client.post("/jobs?queue=q", json={"queue": "q"})).status_code == 400
    assert (await client.get("/livez?verbose")).status_code == 400


@pytest.mark.parametrize("key", ['"', "a" * 256, "a b", '"a"b"', "café"])
async def test_an_unreadable_idempotency_key_is_400(client: httpx2.AsyncClient, key: str) -> None:
    answer = await client.post("/jobs", json={"queue": "q"}, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 400


async def test_an_error_of_the_database_shows_no_sql(
    client: httpx2.AsyncClient, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    job_id = await send(client)
    connection.execute("alter function jobqueue.http_more rename to gone")
    answer = await client.get(f"/jobs/{job_id}")
    connection.execute("alter function jobqueue.gone rename to http_more")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "INTERNAL")
    assert "function" not in answer.text
    assert "jobqueue." not in answer.text
    connection.execute("truncate jobqueue.job")
