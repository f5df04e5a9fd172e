"""Traces and figures of jobs, recorded by OpenTelemetry's own SDK, over a real database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jobqueue import App, Cancelled, Job, PermanentError, Retry, Snooze, TooLarge
from jobqueue.telemetry.attempts import carry_into_child
from jobqueue.testing import inline
from jobqueue.worker.process import around_child
from jobqueue.worker.process_child import load_target

Connection = psycopg.Connection[tuple[Any, ...]]


class Recorded:
    """An app, and what it says to OpenTelemetry."""

    def __init__(self, dsn: str, **options: Any) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.provider.get_tracer("the application")
        self.app = App(dsn)
        self.app.instrument(tracer_provider=self.provider, meter_provider=self.meters, **options)

    async def work(self, **options: Any) -> None:
        """Run a worker until nothing is left to do."""
        async with asyncio.timeout(60):
            await self.app.run_worker(until_idle=True, **options)
        await self.app.close()

    def spans(self, name: str) -> list[ReadableSpan]:
        """Those of this name, in order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        """The only one of this name."""
        (only,) = self.spans(name)
        return only

    def figures(self, name: str) -> dict[tuple[str, ...], Any]:
        """The points of a metric, by queue, outcome and error.type, as far as they have them."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
        names = ("messaging.destination.name", "jobqueue.outcome", "error.type")
        points = [point for metric in found for point in metric.data.data_points]
        return {tuple(str(p.attributes[n]) for n in names if n in (p.attributes or {})): p for p in points}

    def durations(self) -> dict[tuple[Any, ...], int]:
        """How many operations were measured, by their name, queue and error.type."""
        names = ("messaging.operation.name", "messaging.destination.name", "error.type")
        data = self.reader.get_metrics_data()
        assert data is not None
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        (found,) = (metric for metric in metrics if metric.name == "messaging.client.operation.duration")
        return {tuple((p.attributes or {}).get(n) for n in names): p.count for p in found.data.data_points}

    def close(self) -> None:
        """End the SDK's readers."""
        self.provider.shutdown()
        self.meters.shutdown()


@pytest.fixture
def recorded(dsn: str) -> Iterator[Recorded]:
    made = Recorded(dsn)
    yield made
    made.close()


def same(span: ReadableSpan | None) -> tuple[int, int]:
    """What a parent or a link names."""
    assert span is not None
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def current() -> list[int]:
    """The span in which the caller runs; as numbers, for results."""
    found = trace.get_current_span().get_span_context()
    return [found.trace_id, found.span_id]


def in_child(job: Job) -> list[int]:
    """Runs in a process; must be importable there."""
    return current()


async def test_an_attempt_links_to_the_span_that_sent_its_job_and_is_current_in_every_kind_of_handler(
    recorded: Recorded, connection: Connection
) -> None:
    app = recorded.app
    seen: dict[str, Any] = {}

    @app.job
    async def in_loop(job: Job) -> list[int]:
        seen["baggage"] = baggage.get_baggage("customer")
        await asyncio.sleep(0)
        await app.send("in_thread")
        return current()

    @app.job
    def in_thread(job: Job) -> list[int]:
        return current()

    app.job("in_process", executor="process")(in_child)
    app.before_job(lambda job: seen.update({f"before {job.job_type}": tuple(current())}))
    with recorded.tracer.start_as_current_span("request") as request:
        token = context.attach(baggage.set_baggage("customer", "7"))
        sent = await app.send("in_loop")
        context.detach(token)
        await app.send("in_process")
    await recorded.work()

    send, run = recorded.span("send in_loop"), recorded.span("process in_loop")
    assert (send.kind, run.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert parent_of(send) == (request.get_span_context().trace_id, request.get_span_context().span_id)
    assert linked(run) == [same(send)]
    assert run.parent is None
    assert same(run)[0] != same(send)[0]
    assert dict(send.attributes or {}) == {
        "messaging.system": "jobqueue",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "in_loop",
        "messaging.message.id": str(sent.id),
        "jobqueue.job.type": "in_loop",
    }
    said = dict(run.attributes or {})
    assert isinstance(said.pop("jobqueue.job.wait_ms"), int)
    assert said == {
        "messaging.system": "jobqueue",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "in_loop",
        "messaging.message.id": str(sent.id),
        "jobqueue.job.type": "in_loop",
        "jobqueue.job.attempt": 1,
        "jobqueue.outcome": "completed",
    }
    assert run.status.status_code is StatusCode.UNSET
    assert seen["baggage"] == "7"
    # what a job sends belongs to its attempt, and so on
    assert parent_of(recorded.span("send in_thread")) == same(run)
    assert linked(recorded.span("process in_thread")) == [same(recorded.span("send in_thread"))]
    results = connection.execute("select job_type, result from jobqueue.jobs").fetchall()
    for job_type, result in results:
        attempt = recorded.span(f"process {job_type}")
        assert tuple(result) == same(attempt) == seen[f"before {job_type}"]
    assert trace.get_current_span() is trace.INVALID_SPAN

    assert {key: point.value for key, point in recorded.figures("messaging.client.sent.messages").items()} == {
        ("in_loop",): 1,
        ("in_thread",): 1,
        ("in_process",): 1,
    }
    consumed = recorded.figures("messaging.client.consumed.messages")
    assert {key: point.value for key, point in consumed.items()} == {
        ("in_loop", "completed"): 1,
        ("in_thread", "completed"): 1,
        ("in_process", "completed"): 1,
    }
    took = recorded.figures("messaging.process.duration")[("in_loop",)]
    assert (took.count, took.explicit_bounds[-1]) == (1, 3600)
    assert recorded.durations()["send", "in_loop", None] == 1


async def test_the_end_of_every_attempt_is_on_its_span(recorded: Recorded) -> None:
    app = recorded.app
    raised = {
        "unknown": KeyError("x"),
        "refused": PermanentError("no", code="NOT_YET"),
        "asks": Retry(after=3600),
        "waits": Snooze(3600),
        "stops": Cancelled("enough"),
    }

    async def raise_it(job: Job) -> None:
        raise raised[job.job_type]

    for name in raised:
        app.job(name, max_retries=0 if name == "unknown" else 1)(raise_it)

    @app.job(max_retries=1, retry_delay=0, retry_backoff=False)
    def again(job: Job) -> int:
        if job.attempt == 1:
            raise ConnectionError("reset")
        return job.attempt

    @app.job(max_runtime=0.2, max_retries=0)
    async def slow() -> None:
        await asyncio.sleep(600)

    @app.job
    async def unstorable() -> object:
        return object()

    @app.before_job("early")
    def check(job: Job) -> None:
        raise PermanentError("not before")

    app.job("early")(raise_it)
    for name in (*raised, "again", "slow", "unstorable", "early"):
        await app.send(name)
    await recorded.work()

    def end(span: ReadableSpan) -> tuple[Any, Any, bool, bool]:
        said = span.attributes or {}
        is_error = span.status.status_code is StatusCode.ERROR
        has_exception = any(event.name == "exception" for event in span.events)
        return said.get("jobqueue.outcome"), said.get("error.type"), is_error, has_exception

    assert {name: end(recorded.span(f"process {name}")) for name in (*raised, "slow", "early", "unstorable")} == {
        "unknown": ("failed", "KeyError", True, True),
        "refused": ("failed", "NOT_YET", True, True),
        "asks": ("retry", "Retry", True, True),
        "waits": ("snoozed", None, False, False),
        "stops": ("cancelled", None, False, False),
        "slow": ("timed_out", "TIMEOUT", True, True),
        "early": ("failed", "PermanentError", True, True),
        "unstorable": ("completed", None, False, False),
    }
    # found out only when the result was written
    settled = recorded.span("settle unstorable")
    assert parent_of(settled) == same(recorded.span("process unstorable"))
    assert end(settled) == ("failed", "RESULT_INVALID", True, False)
    first, second = recorded.spans("process again")
    assert [end(first), end(second)] == [
        ("failed", "ConnectionError", True, True),
        ("completed", None, False, False),
    ]
    assert [(span.attributes or {})["jobqueue.job.attempt"] for span in (first, second)] == [1, 2]
    assert linked(first) == linked(second) == [same(recorded.span("send again"))]
    consumed = recorded.figures("messaging.client.consumed.messages")
    assert consumed[("again", "failed", "ConnectionError")].value == 1
    assert consumed[("waits", "snoozed")].value == 1
    assert ("slow", "TIMEOUT") in recorded.figures("messaging.process.duration")


async def test_what_is_asked_of_a_running_job_is_no_error(recorded: Recorded) -> None:
    app, running = recorded.app, asyncio.Semaphore(0)

    @app.job("cancelled", pausable=True)
    @app.job("released")
    async def long(job: Job) -> None:
        running.release()
        await asyncio.sleep(600)

    cancelled = await app.send("cancelled")
    await app.send("released")
    worker = await app.make_worker(drain_timeout=60)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        await running.acquire()
        await running.acquire()
        await app.cancel(cancelled.id, "not needed")
        worker._lease.beat_now()
        while not recorded.spans("process cancelled"):
            await asyncio.sleep(0.01)
        worker.release_now()
        await task
    await app.close()
    for name in ("cancelled", "released"):
        span = recorded.span(f"process {name}")
        assert (span.attributes or {})["jobqueue.outcome"] == name
        assert span.status.status_code is StatusCode.UNSET


async def test_claims_and_flushes_of_results_are_measured_but_are_no_spans(recorded: Recorded) -> None:
    app = recorded.app
    app.job("plain")(lambda: None)
    await app.send_many("plain", [None] * 3)
    worker = await app.make_worker(queues=["plain"], until_idle=True)
    async with asyncio.timeout(60):
        await worker.run()
    counted = recorded.durations()
    assert counted["send", "plain", None] == 1
    assert counted["settle", "plain", None] == worker._settler.flushes
    assert counted["receive", "plain", None] >= 2, "one that found the jobs, and one that found no more"
    assert {span.name for span in recorded.exporter.get_finished_spans()} == {"send plain", "process plain"}

    # what fails is measured with its error; what is about several queues names none
    assert app.hooks.timed is not None
    with pytest.raises(ConnectionError), app.hooks.timed("settle", {"plain", "other"}):
        raise ConnectionError
    assert recorded.durations()["settle", None, "ConnectionError"] == 1
    await app.close()


async def test_a_batch_is_one_span_with_a_link_per_job(recorded: Recorded) -> None:
    app, seen = recorded.app, []

    async def halves(jobs: list[Job]) -> list[Any]:
        seen.append(current())
        return [PermanentError("odd") if job.payload["n"] % 2 else job.payload["n"] for job in jobs]

    def threaded(jobs: list[Job]) -> None:
        seen.append(current())

    app.job("halves", batch_size=10)(halves)
    app.job("threaded", batch_size=10)(threaded)
    await app.send_many("halves", [{"n": n} for n in range(3)])
    await app.send("halves", {"n": 3})
    await app.send("threaded")
    await recorded.work(concurrency=1)
    many, one = recorded.spans("send halves")
    (run,) = recorded.spans("process halves")
    said = run.attributes or {}
    assert (many.attributes or {})["messaging.batch.message_count"] == 3
    assert said["messaging.batch.message_count"] == 4
    assert sorted(linked(run)) == sorted([same(many)] * 3 + [same(one)])
    assert run.parent is None
    assert said["jobqueue.batch.failed_count"] == 2
    assert [(event.attributes or {})["error.type"] for event in run.events] == ["PermanentError"] * 2
    assert sorted(map(tuple, seen)) == sorted([same(run), same(recorded.span("process threaded"))])
    consumed = {k: p.value for k, p in recorded.figures("messaging.client.consumed.messages").items()}
    assert consumed[("halves", "completed")] == consumed[("halves", "failed", "PermanentError")] == 2
    assert recorded.figures("messaging.client.sent.messages")[("halves",)].value == 4


async def test_every_way_of_sending_is_a_span_whose_context_its_jobs_carry(
    recorded: Recorded, connection: Connection
) -> None:
    app = recorded.app
    app.job("first", queue="shared")(lambda: None)
    app.job("second")(lambda: None)

    def carried(span: ReadableSpan) -> int:
        """How many jobs came from it."""
        header = "00-{:032x}-{:016x}-%".format(*same(span))
        query = "select count(*) from jobqueue.job where jobqueue.trace_context(id) ->> 'traceparent' like %s"
        row = connection.execute(query, (header,)).fetchone()
        assert row is not None
        return int(row[0])

    await app.send("first", singleton_key="k")
    collided = await app.send("first", singleton_key="k")
    assert not collided.created
    await asyncio.to_thread(app.send_sync, "second")
    await asyncio.to_thread(app.send_many_sync, "second", [None, None])
    await app.send_many("first", [None, None, None])
    await app.subscribe("paid", "second")
    await app.publish("paid")
    flow = app.flow()
    parent = flow.add("second")
    flow.add("first", depends_on=[parent], priority=3)
    await flow.send()
    await app.upsert("second", {"n": 1}, singleton_key="u")
    await app.upsert("second", {"n": 2}, singleton_key="u")
    with pytest.raises(TooLarge):
        await app.send("second", metadata={"text": "x" * 1_100_000})
    mine = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    explicit = await app.send("second", trace_context=mine)
    await app.close()

    one, again, three = recorded.spans("send shared")
    assert [carried(span) for span in (one, again, three)] == [1, 0, 3]
    assert (again.attributes or {})["jobqueue.collision"] == "singleton"
    assert {(span.attributes or {})["jobqueue.job.type"] for span in (one, three)} == {"first"}
    blocking, pair, failed, own = recorded.spans("send second")
    assert [carried(span) for span in (blocking, pair, failed, own)] == [1, 2, 0, 0]
    assert carried(recorded.span("publish paid")) == 1
    assert carried(recorded.span("send_flow")) == 2
    # the second only changed what the first one sent
    assert [carried(span) for span in recorded.spans("upsert second")] == [1, 0]
    assert failed.status.status_code is StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "TOO_LARGE"
    assert recorded.figures("messaging.client.sent.messages")[("second", "TOO_LARGE")].value == 1
    row = connection.execute("select jobqueue.trace_context(%s)", (explicit.id,)).fetchone()
    assert row == (mine,)


async def test_an_attempt_may_be_a_child_of_the_span_that_sent_its_job(dsn: str) -> None:
    # an own propagator, which knows of no baggage
    recorded = Recorded(dsn, parent=True, propagator=TraceContextTextMapPropagator())
    recorded.app.job("plain")(lambda: baggage.get_baggage("customer"))
    token = context.attach(baggage.set_baggage("customer", "7"))

    @recorded.app.job(batch_size=5)
    def batch(jobs: list[Job]) -> None: ...

    with inline(recorded.app):
        sent = await recorded.app.send("plain")
        await recorded.app.send(batch)
    context.detach(token)
    assert (await recorded.app.get(sent.id)).result is None
    await recorded.app.close()
    send, run = recorded.span("send plain"), recorded.span("process plain")
    assert (parent_of(run), run.links) == (same(send), ())
    # a batch has as many origins as jobs, so it links to all of them
    assert linked(recorded.span("process batch")) == [same(recorded.span("send batch"))]
    recorded.close()


async def test_baggage_is_left_behind_if_there_is_too_much_of_it(recorded: Recorded, connection: Connection) -> None:
    recorded.app.job("plain")(lambda: None)
    token = context.attach(baggage.set_baggage("a", "x" * 4000, baggage.set_baggage("b", "y" * 4000)))
    sent = await recorded.app.send("plain")
    context.detach(token)
    await recorded.app.close()
    row = connection.execute("select jobqueue.trace_context(%s)", (sent.id,)).fetchone()
    assert row is not None
    assert list(row[0]) == ["traceparent"]


async def test_jobs_need_not_carry_anything(dsn: str, connection: Connection) -> None:
    recorded = Recorded(dsn, propagate=False)
    recorded.app.job("plain")(lambda: None)
    await recorded.app.send("plain")
    await recorded.app.send_many("plain", [None])
    flow = recorded.app.flow()
    flow.add("plain")
    await flow.send()
    await recorded.work()
    assert connection.execute("select distinct options from jobqueue.job").fetchall() == [(None,)]
    assert [span.links for span in recorded.spans("process plain")] == [()] * 3
    recorded.close()


def test_spans_of_a_child_process_leave_before_it_can_be_ended(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    with recorded.tracer.start_as_current_span("attempt") as attempt:
        carry_into_child()
    surrounding = around_child.get()
    assert surrounding is not None
    reference, carrier = surrounding
    with load_target(reference)(carrier):
        provider.get_tracer("the handler").start_span("work").end()
    (work,) = exporter.get_finished_spans()
    assert parent_of(work) == (attempt.get_span_context().trace_id, attempt.get_span_context().span_id)
    assert trace.get_current_span() is trace.INVALID_SPAN
    provider.shutdown()
