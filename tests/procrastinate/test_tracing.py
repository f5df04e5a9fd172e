"""What `defer` says to OpenTelemetry: its jobs lead back to the span in which they were deferred."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import procrastinate
import psycopg
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext
from procrastinate import exceptions

from jobqueue.procrastinate import JobqueueConnector, SyncJobqueueConnector, adopt, job_uuid
from tests.support.server import rows

Connection = psycopg.Connection[tuple[Any, ...]]

CARRIED = "select job_type, options -> 'trace_context' ->> 'traceparent' from jobqueue.job order by job_type, 2"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


def origin(span: ReadableSpan) -> str:
    """What jobs that were deferred in it carry, without the flags."""
    assert span.context is not None
    return traceparent(span.context)


def linked(span: ReadableSpan) -> list[str]:
    return [traceparent(link.context) for link in span.links]


def traceparent(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}"


async def test_a_job_links_to_the_span_that_deferred_it_through_every_way_to_defer(
    dsn: str, connection: Connection, exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    """Deferred in the loop, in bulk, in a thread, inside of a task and on a connection of the application's own."""
    app = procrastinate.App(connector=JobqueueConnector(dsn, min_size=1))

    @app.task(name="first", queue="shared")
    async def first() -> None:
        await second.defer_async(n=0)

    @app.task(name="second", queueing_lock=None)
    def second(n: int) -> None: ...

    native = adopt(app)
    native.instrument(tracer_provider=provider)
    tracer = provider.get_tracer("the application")
    async with app.open_async():
        with tracer.start_as_current_span("request") as request:
            sent = await first.defer_async()
            await second.batch_defer_async({"n": 1}, {"n": 2})
            await asyncio.to_thread(second.defer, n=3)
            async with await psycopg.AsyncConnection.connect(dsn) as own:
                await second.configure(connection=own, queueing_lock="one").defer_async(n=4)
        with pytest.raises(exceptions.AlreadyEnqueued):
            await second.configure(queueing_lock="one").defer_async(n=5)
        async with asyncio.timeout(60):
            await native.run_worker(until_idle=True)

    spans = {name: [s for s in exporter.get_finished_spans() if s.name == name] for name in (
        "send shared", "send default", "process shared", "process default",
    )}  # fmt: skip
    (one,), (ran,) = spans["send shared"], spans["process shared"]
    two, blocking, own_connection, refused, inside = spans["send default"]
    assert dict(one.attributes or {}) == {
        "messaging.system": "jobqueue",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "shared",
        "messaging.message.id": str(job_uuid(sent)),
        "jobqueue.job.type": "first",
    }
    assert (two.attributes or {})["messaging.batch.message_count"] == 2
    assert (refused.attributes or {})["error.type"] == "UniqueViolation"
    for span in (one, two, blocking, own_connection):
        assert span.parent == request.get_span_context()
    # what a task defers belongs to its attempt
    assert inside.parent == ran.context
    carried = [(job_type, str(value)[:-3]) for job_type, value in rows(connection, CARRIED)]
    wanted = [("first", one), *(("second", span) for span in (two, two, blocking, own_connection, inside))]
    assert sorted(carried) == sorted((job_type, origin(span)) for job_type, span in wanted)
    assert linked(ran) == [origin(one)]
    assert sorted(link for span in spans["process default"] for link in linked(span)) == sorted(
        origin(span) for span in (two, two, blocking, own_connection, inside)
    )
    kept = rows(connection, "select options ->> 'queueing_lock' from jobqueue.job where payload = '{\"n\": 4}'")
    assert kept == [("one",)], "the other options of a job stay"


def test_a_blocking_connector_is_switched_on_by_the_environment(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, provider: TracerProvider
) -> None:
    app = procrastinate.App(connector=SyncJobqueueConnector(dsn))
    plain = app.configure_task("plain")
    with provider.get_tracer("the application").start_as_current_span("request") as request:
        with app.open():
            plain.defer()
        monkeypatch.setenv("JOBQUEUE_OTEL", "1")
        with app.open():
            plain.defer()
    trace_ids = [value and value.split("-")[1] for _, value in rows(connection, CARRIED)]
    assert trace_ids == [f"{request.get_span_context().trace_id:032x}", None]
