"""In a child process: the worker's span of the attempt is current there too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

BETWEEN_PROCESSES = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
"""Of our own, and not the global one: a child need not have been told of that."""
FLUSH_MILLISECONDS = 2000
"""How long the handler's own spans may take to leave. A child is ended without ceremony: what it keeps would be lost."""


@contextmanager
def carried(carrier: Mapping[str, str]) -> Iterator[None]:
    """Make a carried context current, and export the spans that were made in it."""
    token = context.attach(BETWEEN_PROCESSES.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            flush(FLUSH_MILLISECONDS)
