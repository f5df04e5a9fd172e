"""Switching OpenTelemetry on: `app.instrument()`. What it does is in `jobqueue/telemetry/`, imported only then."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from jobqueue.errors import ConfigurationError
from jobqueue.sender import Sender

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import TracerProvider

    from jobqueue.hooks import Hooks
    from jobqueue.settings import Settings
    from jobqueue.telemetry.tracing import Telemetry


class Instrumentation:
    """The part of `App` that switches tracing on."""

    hooks: Hooks
    _sender: Sender = Sender()

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagator: TextMapPropagator | None = None,
        propagate: bool = True,
        parent: bool = False,
    ) -> None:
        """Trace and measure the jobs that this app sends and runs, with OpenTelemetry (docs/guide/telemetry.md).

        Call it before a worker is made; the last call counts. `tracer_provider`, `meter_provider`, `propagator`:
        default: OpenTelemetry's global ones. `propagate`: jobs carry the trace that they were sent in (default).
        `parent`: an attempt is a child of the span that sent its job; default: the root of a trace of its own, with a
        link to that span. Raises ConfigurationError if OpenTelemetry is not installed.
        """
        require_opentelemetry()
        from jobqueue.telemetry.tracing import Telemetry

        self._trace_with(
            Telemetry(tracer_provider, meter_provider, propagator=propagator, propagate=propagate, parent=parent)
        )

    def _trace_with(self, telemetry: Telemetry) -> None:
        from jobqueue.telemetry.attempts import TracedJobHooks
        from jobqueue.telemetry.sending import TracedSender

        self._sender = TracedSender(telemetry)
        self.hooks.timed = telemetry.operation
        self.hooks.tracing = functools.partial(TracedJobHooks, telemetry)

    def _instrument_as_set(self, settings: Settings) -> None:
        """Switch it on if the settings say so and the program has not done it by itself."""
        if settings.otel and self.hooks.tracing is None:
            self.instrument(parent=settings.otel_parent)


def require_opentelemetry() -> None:
    """Raise ConfigurationError (exit code 78) unless the package opentelemetry-api is there."""
    try:
        import opentelemetry.trace  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"OpenTelemetry is switched on but cannot be imported: {error}",
            hint="pip install 'jobqueue[otel]', or unset JOBQUEUE_OTEL.",
        ) from error
