"""What all spans and figures of jobqueue have in common: their names, and the trace that a job carries.

```
send span ─► {"traceparent": …} ─► option trace_context, kept with the job ─► claim ─► link, or parent, of each attempt's span
```

Names are those of OpenTelemetry's semantic conventions for messaging (1.44, still in development); what they do not know
begins with `jobqueue.`. Only the API is used: without an SDK nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import TYPE_CHECKING

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind

from jobqueue.classify import classify
from jobqueue.errors import JobqueueError
from jobqueue.json_text import from_json

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import TracerProvider

    from jobqueue.job import Claim

Attributes = dict[str, str | int | float | bool]

SYSTEM = "messaging.system"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
BATCH_COUNT = "messaging.batch.message_count"
ERROR_TYPE = "error.type"
JOB_TYPE = "jobqueue.job.type"
ATTEMPT = "jobqueue.job.attempt"
WAIT_MS = "jobqueue.job.wait_ms"
OUTCOME = "jobqueue.outcome"
COLLISION = "jobqueue.collision"

PROCESS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Bounds for handlers: the convention's end at 10 s, where document jobs only begin."""
OPERATION_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MOST_CARRIED = 8000
"""Characters of trace context; the database takes 8,192 as JSON. More is baggage, which is left behind then."""


@dataclass(slots=True)
class Sending:
    """A send under way: its span, the trace context for its jobs, and how many jobs they are, once that is known."""

    span: Span
    carrier: dict[str, str]
    count: int


class Telemetry:
    """The tracer, the figures and the choices of one `app.instrument()`."""

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        propagator: TextMapPropagator | None = None,
        propagate: bool = True,
        parent: bool = False,
    ) -> None:
        self.tracer = trace.get_tracer("jobqueue", _version(), tracer_provider)
        self._propagator, self._propagate, self._parent = propagator, propagate, parent
        meter = metrics.get_meter("jobqueue", _version(), meter_provider)
        self.sent = meter.create_counter("messaging.client.sent.messages", "{message}", "Jobs sent.")
        self.consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Attempts at jobs that ended, by outcome."
        )
        self.processed = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long handlers took.",
            explicit_bucket_boundaries_advisory=PROCESS_SECONDS,
        )
        self.operated = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "How long sending, claiming (receive) and writing results (settle) took.",
            explicit_bucket_boundaries_advisory=OPERATION_SECONDS,
        )

    # -- sending -------------------------------------------------------------------------------------------------------

    @contextmanager
    def sending(
        self,
        operation: str,
        destination: str | None,
        job_type: str | None,
        *,
        count: int,
        context: Context | None = None,
    ) -> Iterator[Sending]:
        """A producer's span, current inside of the block, and the figures of it.

        `destination`: the queue or event; None if there are several. `count`: jobs, as far as they are known beforehand.
        `context`: where it belongs; default: to what is current.
        """
        shared: Attributes = {SYSTEM: "jobqueue", OPERATION: operation, OPERATION_TYPE: "send"}
        shared |= {DESTINATION: destination} if destination is not None else {}
        shared |= {JOB_TYPE: job_type} if job_type is not None else {}
        name = operation if destination is None else f"{operation} {destination}"
        began = perf_counter()
        with self.tracer.start_as_current_span(name, context, SpanKind.PRODUCER, shared) as span:
            under_way = Sending(span, self._inject(), count)
            try:
                yield under_way
            except BaseException as error:
                shared[ERROR_TYPE] = code_of(error)
                span.set_attribute(ERROR_TYPE, code_of(error))
                raise
            finally:
                self.operated.record(perf_counter() - began, shared)
                if under_way.count:
                    self.sent.add(under_way.count, shared)

    @contextmanager
    def operation(self, operation: str, queues: Collection[str]) -> Iterator[None]:
        """Measure what a worker asks of the database: `receive` is a claim, `settle` a flush of results.

        There is no span: one statement serves hundreds of jobs and belongs to no trace. `queues`: named if it is one.
        """
        shared: Attributes = {SYSTEM: "jobqueue", OPERATION: operation, OPERATION_TYPE: operation}
        if len(queues) == 1:
            shared[DESTINATION] = next(iter(queues))
        began = perf_counter()
        try:
            yield
        except Exception as error:
            self.operated.record(perf_counter() - began, {**shared, ERROR_TYPE: code_of(error)})
            raise
        self.operated.record(perf_counter() - began, shared)

    def incoming(self, headers: dict[str, str]) -> Context | None:
        """The context of a request: None (what is current) inside of a span, else what its headers say."""
        if trace.get_current_span().get_span_context().is_valid:
            return None
        return self._textmap.extract(headers)

    def _inject(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        if self._propagate:
            self._textmap.inject(carrier)
            if _length(carrier) > MOST_CARRIED:
                carrier.pop("baggage", None)
        # a send never fails for what it carries
        return carrier if _length(carrier) <= MOST_CARRIED else {}

    @property
    def _textmap(self) -> TextMapPropagator:
        return self._propagator or propagate.get_global_textmap()

    # -- running -------------------------------------------------------------------------------------------------------

    def begin(self, claims: list[Claim], attributes: Attributes) -> tuple[Span, Context]:
        """Start the span of one call of a handler; returns it, and the context in which the handler runs.

        It links to the spans that sent its jobs; with `parent` it is the child of that one. A batch always links, also
        when it is of one job. The baggage of a job that runs alone is in its context either way.
        """
        origins = [origin for claim in claims if (origin := self._origin_of(claim)) is not None]
        sources = [trace.get_current_span(origin).get_span_context() for origin in origins]
        alone = BATCH_COUNT not in attributes
        base = origins[0] if alone and origins else Context()
        links = [Link(source) for source in sources if source.is_valid]
        if self._parent and alone:
            links = []
        else:
            # its own trace: whatever the worker was started in is not where the job comes from
            base = trace.set_span_in_context(trace.INVALID_SPAN, base)
        queue = claims[0].queue
        shared: Attributes = {SYSTEM: "jobqueue", OPERATION: "process", OPERATION_TYPE: "process", DESTINATION: queue}
        span = self.tracer.start_span(f"process {queue}", base, SpanKind.CONSUMER, {**shared, **attributes}, links)
        return span, trace.set_span_in_context(span, base)

    def _origin_of(self, claim: Claim) -> Context | None:
        if claim.options is None:
            return None
        carrier = from_json(claim.options).get("trace_context")
        return None if carrier is None else self._textmap.extract(carrier, Context())


def code_of(error: BaseException) -> str:
    """What an error is called in `error.type`: its code in jobqueue (see errors.py), or the name of its class."""
    return error.code if isinstance(error, JobqueueError) else classify(error).code


def _length(carrier: dict[str, str]) -> int:
    return sum(len(name) + len(value) for name, value in carrier.items())


def _version() -> str:
    try:
        return version("jobqueue")
    except PackageNotFoundError:
        return "unknown"
