"""Sending with a span around it: what `app.instrument` puts in the place of `jobqueue.sender.Sender`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobqueue import client
from jobqueue.client import Sent
from jobqueue.json_text import to_json_text
from jobqueue.sender import Sender
from jobqueue.telemetry.tracing import BATCH_COUNT, COLLISION, MESSAGE_ID

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from jobqueue.client import AnyConnection
    from jobqueue.telemetry.tracing import Telemetry

SEND_MANY = """
    select id, created, reason
    from jobqueue.send_many(%s::text, jobqueue.with_trace_context(%s::text::jsonb, %s::text::jsonb))
"""
SEND_FLOW = "select ref, id from jobqueue.send_flow(jobqueue.with_trace_context(%s::text::jsonb, %s::text::jsonb))"

_DECODER = json.JSONDecoder()


class TracedSender(Sender):
    """One span per call, whose context its jobs carry as their option trace_context; an explicit one stays."""

    __slots__ = ("_telemetry",)

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def send(self, connection: AnyConnection, queue: str, payload: str = "{}", options: str = "{}") -> Sent:
        """As `client.send`."""
        with self._telemetry.sending("send", queue, _job_type(options, queue), count=1) as sending:
            sent = await client.send(connection, queue, payload, with_context(options, sending.carrier))
            describe(sending.span, sent.id, sent.reason)
            return sent

    async def send_many(self, connection: AnyConnection, queue: str, jobs: str) -> list[Sent]:
        """As `client.send_many`: one span for all of them."""
        with self._telemetry.sending("send", queue, _first_job_type(jobs, queue), count=0) as sending:
            if sending.carrier:
                rows = await client.fetch(connection, SEND_MANY, (queue, jobs, json.dumps(sending.carrier)))
                sent = list(map(Sent._make, rows))
            else:
                sent = await client.send_many(connection, queue, jobs)
            sending.count = len(sent)
            sending.span.set_attribute(BATCH_COUNT, len(sent))
            return sent

    async def publish(  # type: ignore[override]
        self, connection: AnyConnection, query: str, parameters: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        """One span for the event, however many queues subscribed to it."""
        event, payload, options = parameters
        with self._telemetry.sending("publish", event, None, count=0) as sending:
            rows = await client.fetch(connection, query, (event, payload, with_context(options, sending.carrier)))
            sending.count = len(rows)
            sending.span.set_attribute(BATCH_COUNT, len(rows))
            return rows

    async def upsert(  # type: ignore[override]
        self, connection: AnyConnection, query: str, parameters: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        """A job that is changed, not sent, keeps the trace that it has."""
        queue, payload, options = parameters
        with self._telemetry.sending("upsert", queue, _job_type(options, queue), count=1) as sending:
            rows = await client.fetch(connection, query, (queue, payload, with_context(options, sending.carrier)))
            job_id, _created, _updated, reason = rows[0]
            describe(sending.span, job_id, reason)
            return rows

    async def send_flow(  # type: ignore[override]
        self, connection: AnyConnection, query: str, parameters: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        """One span for the whole flow, which has no one queue."""
        with self._telemetry.sending("send_flow", None, None, count=0) as sending:
            if sending.carrier:
                rows = await client.fetch(connection, SEND_FLOW, (*parameters, json.dumps(sending.carrier)))
            else:
                rows = await client.fetch(connection, query, parameters)
            sending.count = len(rows)
            sending.span.set_attribute(BATCH_COUNT, len(rows))
            return rows


def describe(span: Span, job_id: object, reason: str | None) -> None:
    """Note which job a send made, or found in its place."""
    if job_id is not None:
        span.set_attribute(MESSAGE_ID, str(job_id))
    if reason is not None:
        span.set_attribute(COLLISION, reason)


def with_context(options: str, carrier: dict[str, str]) -> str:
    """Return options, as JSON text, with the trace context in front: of a name that is there twice the last one counts."""
    if not carrier:
        return options
    own = to_json_text({"trace_context": carrier})
    return own if options == "{}" else f"{own[:-1]},{options[1:]}"


def _job_type(options: str, queue: str) -> str:
    return str(json.loads(options).get("job_type") or queue) if '"job_type"' in options else queue


def _first_job_type(jobs: str, queue: str) -> str:
    """Of the first element, without reading the others: all jobs of a call have the same."""
    if len(jobs) <= 2:
        return queue
    first, _ = _DECODER.raw_decode(jobs, 1)
    return str(first.get("options", {}).get("job_type") or queue)
