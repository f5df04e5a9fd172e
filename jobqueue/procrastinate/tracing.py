"""Tracing of `defer`, with OpenTelemetry: a span per call, whose context its jobs carry, as `app.send` has it.

defer ─► span ─► {"traceparent": …} ─► option trace_context, kept with the job ─► claim ─► link of each attempt's span
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobqueue.instrumentation import require_opentelemetry
from jobqueue.procrastinate.ids import job_uuid
from jobqueue.procrastinate.statements import Row

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import TracerProvider

    from jobqueue.telemetry.tracing import Sending, Telemetry

SETTING = "JOBQUEUE_OTEL"


class Instrumented:
    """The part of a connector that switches tracing on. Without it OpenTelemetry is not imported."""

    telemetry: Telemetry | None = None
    """What traces the jobs that are deferred; None: nothing does."""

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagator: TextMapPropagator | None = None,
        propagate: bool = True,
    ) -> None:
        """Trace and measure `defer`; arguments as of `jobqueue.App.instrument`. The last call counts.

        Raises ConfigurationError if OpenTelemetry is not installed.
        """
        require_opentelemetry()
        from jobqueue.telemetry.tracing import Telemetry

        self.telemetry = Telemetry(tracer_provider, meter_provider, propagator=propagator, propagate=propagate)

    def instrument_as_set(self) -> None:
        """Switch it on if the environment says so (`JOBQUEUE_OTEL`) and the program has not done it by itself."""
        if self.telemetry is None and SETTING in os.environ:
            from jobqueue.settings import load_settings

            if load_settings().otel:
                self.instrument()


@dataclass(frozen=True, slots=True)
class Deferring:
    """A defer under way. `arguments`: those of procrastinate's query, and the context that its jobs carry."""

    sending: Sending
    arguments: Mapping[str, Any]

    def note(self, rows: list[Row]) -> list[Row]:
        """Note which job was made; several are only counted. Returns the rows."""
        from jobqueue.telemetry.tracing import BATCH_COUNT, MESSAGE_ID

        if len(rows) == 1:
            self.sending.span.set_attribute(MESSAGE_ID, str(job_uuid(rows[0]["id"])))
        else:
            self.sending.span.set_attribute(BATCH_COUNT, len(rows))
        return rows


@contextmanager
def deferring(telemetry: Telemetry, arguments: Mapping[str, Any]) -> Iterator[Deferring]:
    """The span of a `defer_jobs` query, current inside of the block. Names a queue and a task if all its jobs have the same."""
    jobs = arguments["jobs"]
    queues, tasks = {job.queue_name for job in jobs}, {job.task_name for job in jobs}
    queue, task = queues.pop() if len(queues) == 1 else None, tasks.pop() if len(tasks) == 1 else None
    with telemetry.sending("send", queue, task, count=len(jobs)) as sending:
        yield Deferring(sending, {**arguments, "trace_context": sending.carrier or None})
