"""What POST /jobs does with the trace of its request, when OpenTelemetry is switched on."""

from __future__ import annotations

import sys
from typing import Any

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobqueue.api import create_app
from jobqueue.errors import ConfigurationError
from jobqueue.settings import Settings
from tests.api.conftest import serving
from tests.support.command import run

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
OTHER = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


async def test_jobs_carry_the_trace_of_the_request_that_sent_them(
    dsn: str, connection: psycopg.Connection[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")

    async def post(client: Any, body: Any, headers: dict[str, str] = HEADERS) -> Any:
        """What the job, or the last of several, carries afterwards."""
        answer = await client.post("/jobs", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        jobs = answer.json().get("data", [answer.json()])
        row = connection.execute("select jobqueue.trace_context(%s)", (jobs[-1]["id"],)).fetchone()
        assert row is not None
        return row[0]

    async with serving(dsn) as client:
        assert await post(client, {"queue": "q"}) is None
        assert await post(client, {"queue": "q", "trace_context": OTHER}) == OTHER

    # without an SDK there is no span of ours, and the request's own is what sent the job
    async with serving(dsn, {"otel": True}) as client:
        assert await post(client, {"queue": "q"}) == HEADERS
        assert await post(client, {"queue": "q", "trace_context": OTHER}) == OTHER
        assert await post(client, {"jobs": [{"queue": "q"}, {"queue": "q"}]}) == HEADERS
        assert await post(client, {"queue": "q"}, {"traceparent": "nonsense"}) is None

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    async with serving(dsn, {"otel": True, "api_cors_origins": ("https://app.example",)}) as client:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "traceparent"}
        assert (await client.options("/jobs", headers={"Origin": "https://app.example", **asked})).status_code == 200
        carried = await post(client, {"queue": "q", "job_type": "index"})
        answer = await client.post("/jobs", json={"queue": "missing"}, headers=HEADERS)
        assert answer.status_code == 404
        with provider.get_tracer("the server").start_as_current_span("POST /jobs") as server:
            await post(client, {"jobs": [{"queue": "q"}, {"queue": "q"}]})
    sent, refused, many, _ = exporter.get_finished_spans()
    assert [span.name for span in (sent, refused, many)] == ["send q", "send missing", "send q"]
    assert sent.context is not None
    assert carried["traceparent"].split("-")[1:3] == [TRACE, f"{sent.context.span_id:016x}"]
    assert sent.parent is not None
    assert f"{sent.parent.span_id:016x}" == SPAN
    assert (sent.attributes or {})["jobqueue.job.type"] == "index"
    assert refused.status.status_code is trace.StatusCode.ERROR
    # the server's own span is nearer than what the client said
    assert many.parent is not None
    assert many.parent.span_id == server.get_span_context().span_id
    assert (many.attributes or {})["messaging.batch.message_count"] == 2


def test_without_the_package_the_api_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ConfigurationError):
        create_app(Settings(otel=True), dsn="unused")
    done = run("api", dsn="host=127.0.0.1 port=1", JOBQUEUE_OTEL="1")
    assert done.returncode == 78
    assert "pip install 'jobqueue[otel]'" in done.stderr
