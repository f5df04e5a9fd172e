"""`POST /jobs` with OpenTelemetry (`JOBQUEUE_OTEL=1`): its jobs carry the trace of the request that sent them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from jobqueue.api.context import Call
from jobqueue.api.jobs import Sent, post_jobs, send_body
from jobqueue.api.operations import Operation
from jobqueue.telemetry.sending import describe
from jobqueue.telemetry.tracing import BATCH_COUNT, Telemetry


def traced(operations: Iterable[Operation]) -> Iterable[Operation]:
    """Return the operations, with a span around what `POST /jobs` stores."""
    handler = partial(post_jobs, send=partial(_send, Telemetry()))
    return [
        replace(operation, handler=handler) if operation.handler is post_jobs else operation for operation in operations
    ]


async def _send(
    telemetry: Telemetry, call: Call, text: str, body: Any, owning: dict[str, Any], key: str | None
) -> list[Sent]:
    """As `send_body`. The span's parent is the server's span if there is one, else what the request's headers name."""
    jobs: list[dict[str, Any]] = body.get("jobs", [body])
    queues = {job["queue"] for job in jobs}
    queue = queues.pop() if len(queues) == 1 else None
    job_type = (jobs[0].get("job_type") or queue) if len(jobs) == 1 else None
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in call.headers.items()}
    with telemetry.sending("send", queue, job_type, count=len(jobs), context=telemetry.incoming(headers)) as sending:
        defaults = owning["defaults"] | ({"trace_context": sending.carrier} if sending.carrier else {})
        sent = await send_body(call, text, body, owning | {"defaults": defaults}, key)
        if "jobs" in body:
            sending.span.set_attribute(BATCH_COUNT, len(sent))
        else:
            describe(sending.span, sent[0].id, sent[0].reason)
        return sent
