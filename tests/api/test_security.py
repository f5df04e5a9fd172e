"""What every answer carries, and what pages of other sites may do."""

from __future__ import annotations

import logging
from typing import Any

import httpx2
import psycopg
import pytest

from jobqueue.api.app import OPERATIONS
from jobqueue.api.security import EXPOSED_HEADERS
from tests.api.conftest import serving
from tests.support.api_keys import bearer, create_key

Connection = psycopg.Connection[tuple[Any, ...]]
UNKNOWN = "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"
ORIGIN = {"Origin": "https://app.example"}
PREFLIGHT = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_every_answer_has_the_security_headers(client: httpx2.AsyncClient) -> None:
    for path in ("/livez", f"/jobs/{UNKNOWN}", "/nowhere", "/jobs?x=1", "/openapi.json"):
        headers = (await client.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "Server" not in headers
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [("trace-1.2_A", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False), ("a\x7f", False)],
)
async def test_a_request_id_is_kept_if_it_is_sane_and_stands_in_header_error_and_log(
    client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture, given: str, kept: bool
) -> None:
    with caplog.at_level(logging.INFO, "jobqueue.api.access"):
        answer = await client.get(f"/jobs/{UNKNOWN}", headers={"X-Request-Id": given})
    request_id = answer.headers["Request-Id"]
    assert (request_id == given) is kept
    assert request_id.startswith("req_") is not kept
    assert answer.json()["request_id"] == request_id
    (line,) = [vars(record) for record in caplog.records if record.name == "jobqueue.api.access"]
    assert (line["event"], line["outcome"], line["request_id"]) == ("http.request", "404", request_id)


async def test_an_unexpected_error_is_found_in_the_log_by_its_request_id(
    client: httpx2.AsyncClient, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    connection.execute("alter function jobqueue.http_read rename to gone")
    answer = await client.get(f"/jobs/{UNKNOWN}", headers={"X-Request-Id": "find-me"})
    assert answer.status_code == 500
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.request_id == "find-me"  # type: ignore[attr-defined]


async def test_the_access_log_can_be_turned_off_and_probes_are_not_in_it(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jobqueue.api.access"):
        async with serving(dsn) as client:
            await client.get("/livez")
            await client.get("/nowhere/livez")
        async with serving(dsn, {"api_access_log": False}) as client:
            await client.get("/nowhere")
    lines = [record.getMessage() for record in caplog.records if record.name == "jobqueue.api.access"]
    assert [line.split(" in ")[0] for line in lines] == ["GET /nowhere/livez 404"]


async def test_scripts_of_other_origins_are_kept_out_unless_a_setting_names_them(
    dsn: str, connection: Connection
) -> None:
    key = create_key(connection, tenants=["*"], scopes=["admin"])
    async with serving(dsn) as client:
        refused = await client.options("/jobs", headers=PREFLIGHT)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (405, False)
    async with serving(dsn, {"api_cors_origins": "https://app.example"}) as client:
        asked = await client.options("/jobs", headers=PREFLIGHT)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
        assert "Access-Control-Allow-Credentials" not in asked.headers
        foreign = await client.options("/jobs", headers={**PREFLIGHT, "Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in foreign.headers
        for answer in (
            await client.get(f"/jobs/{UNKNOWN}", headers={**ORIGIN, **bearer(key)}),
            await client.get(f"/jobs/{UNKNOWN}", headers=ORIGIN),
        ):
            assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
            readable = {name.strip() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
            assert readable >= {"ETag", "Retry-After", "X-RateLimit-Remaining", "Request-Id"}


def test_every_header_of_an_answer_can_be_read_by_scripts() -> None:
    documented = {name for operation in OPERATIONS for reply in operation.replies.values() for name in reply.headers}
    assert documented - {"Cache-Control", "Content-Type"} <= set(EXPOSED_HEADERS)
