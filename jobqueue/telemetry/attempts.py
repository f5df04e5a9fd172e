"""Running jobs with a span around each attempt: what `app.instrument` puts in the place of `JobHooks`.

```
process {queue}: before_job ─► middleware ─► handler ─► back ─┬─ its end says how the attempt ended (jobqueue.outcome)
                                                              └─ settle {queue}: only if the result could not be stored
```

The span is current in all of them, in the handler's thread too, and a child process gets its context. Nothing is detached
afterwards: the runner gives every call a context of its own, and what `after_job` sends belongs to the same trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opentelemetry import context as current
from opentelemetry.trace import Span, Status, StatusCode

from jobqueue.errors import Cancelled, LeaseLost, Retry, Snooze
from jobqueue.job import Paused
from jobqueue.telemetry.carried import BETWEEN_PROCESSES
from jobqueue.telemetry.tracing import (
    ATTEMPT,
    BATCH_COUNT,
    DESTINATION,
    ERROR_TYPE,
    JOB_TYPE,
    MESSAGE_ID,
    OPERATION,
    OPERATION_TYPE,
    OUTCOME,
    SYSTEM,
    WAIT_MS,
    Attributes,
    Telemetry,
    code_of,
)
from jobqueue.worker.held import Held, Stop
from jobqueue.worker.hooks import Call, JobHooks
from jobqueue.worker.process import around_child

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from jobqueue.handlers import Handler
    from jobqueue.hooks import Hooks
    from jobqueue.job import Claim, Job

COMPLETED, FAILED, RETRY, TIMED_OUT = "completed", "failed", "retry", "timed_out"
FAILURES = frozenset({FAILED, RETRY, TIMED_OUT})
"""Outcomes that are errors. The others are what somebody asked for, or no end at all (snoozed, released, lost)."""
CARRIED = "jobqueue.telemetry.carried:carried"

_OUTCOME_OF_STOP = {
    Stop.LOST: "lost",
    Stop.FENCED: "lost",
    Stop.RELEASE: "released",
    Stop.CANCEL: "cancelled",
    Stop.PAUSE: "paused",
    Stop.TIMEOUT: TIMED_OUT,
}
_OUTCOME_OF_ERROR: tuple[tuple[type[BaseException], str], ...] = (
    (LeaseLost, "lost"),
    (Paused, "paused"),
    (Cancelled, "cancelled"),
    (Snooze, "snoozed"),
    (Retry, RETRY),
    (asyncio.CancelledError, "released"),
    (GeneratorExit, "released"),
)


class TracedJobHooks(JobHooks):
    """The hooks of a worker's jobs, inside of a span per attempt; `held` says why a handler was stopped."""

    def __init__(
        self, telemetry: Telemetry, hooks: Hooks, handlers: Mapping[str, Handler], held: Mapping[str, Held]
    ) -> None:
        super().__init__(hooks, handlers)
        self._telemetry, self._held = telemetry, held
        # attempts whose results are on their way into the database
        self._done: WeakKeyDictionary[Job, Context] = WeakKeyDictionary()

    def around(self, handler: Handler, call: Call) -> Call:
        """Return a call with a span around the hooks and the handler."""
        inner = super().around(handler, call)
        if handler.takes_batch:
            # inline mode gives a batch handler one job
            return lambda given: self._batch(
                handler, given if isinstance(given, list) else [given], lambda _: inner(given)
            )
        return lambda job: self._attempt(handler, job, inner)

    def failed(self, held: Held, error: Mapping[str, Any], status: str) -> None:
        """Tell that an attempt failed; if its span has ended well, another one says that its result was refused."""
        if held.job is not None and (context := self._done.pop(held.job, None)) is not None:
            self._refused(held.claim, context, str(error["code"]), str(error["message"]))
        super().failed(held, error, status)

    async def _attempt(self, handler: Handler, job: Job, call: Callable[[Job], Awaitable[Any]]) -> Any:
        claim = job.claim
        span, context = self._telemetry.begin([claim], attributes_of(claim))
        current.attach(context)
        if handler.executor == "process":
            carry_into_child()
        began = perf_counter()
        outcome, error = COMPLETED, None
        try:
            result = await call(job)
            self._done[job] = context
            return result
        except BaseException as raised:
            outcome, error = self._outcome(job, raised), raised
            raise
        finally:
            failure = end_span(span, outcome, error)
            self._measure(claim, outcome, failure, 1)
            self._telemetry.processed.record(perf_counter() - began, figure(claim, failure))

    async def _batch(self, handler: Handler, jobs: list[Job], call: Callable[[list[Job]], Awaitable[Any]]) -> Any:
        claim = jobs[0].claim
        attributes: Attributes = {JOB_TYPE: handler.name, BATCH_COUNT: len(jobs)}
        span, context = self._telemetry.begin([job.claim for job in jobs], attributes)
        current.attach(context)
        began = perf_counter()
        outcome, error, failed = COMPLETED, None, 0
        try:
            result = await call(jobs)
            failed = self._answers(span, context, jobs, result)
            return result
        except BaseException as raised:
            outcome, error = self._outcome(jobs[0], raised), raised
            raise
        finally:
            failure = end_span(span, outcome, error)
            self._measure(claim, outcome, failure, len(jobs) - failed)
            self._telemetry.processed.record(perf_counter() - began, figure(claim, failure))

    def _answers(self, span: Span, context: Context, jobs: Sequence[Job], result: Any) -> int:
        """Note the jobs of a batch that failed one by one, each as an event; return how many."""
        results = result if isinstance(result, list | tuple) and len(result) == len(jobs) else [None] * len(jobs)
        failed = 0
        for job, value in zip(jobs, results, strict=True):
            if not isinstance(value, BaseException):
                self._done[job] = context
                continue
            failed += 1
            outcome, code = self._outcome(job, value), code_of(value)
            span.add_event("jobqueue.job.ended", {MESSAGE_ID: job.claim.id, OUTCOME: outcome, ERROR_TYPE: code})
            self._measure(job.claim, outcome, code if outcome in FAILURES else None, 1)
        if failed:
            span.set_attribute("jobqueue.batch.failed_count", failed)
        return failed

    def _outcome(self, job: Job, error: BaseException) -> str:
        """How an attempt ended that raised; in the order in which `Runner.end` decides it."""
        if job.settled:
            return COMPLETED
        held = self._held.get(job.claim.id)
        stop = held.stop if held is not None and held.job is job else None
        if stop is Stop.TIMEOUT and isinstance(error, Paused | Cancelled):
            stop = None
        if stop is not None:
            return _OUTCOME_OF_STOP[stop]
        return next((outcome for kind, outcome in _OUTCOME_OF_ERROR if isinstance(error, kind)), FAILED)

    def _measure(self, claim: Claim, outcome: str, failure: str | None, count: int) -> None:
        if count:
            self._telemetry.consumed.add(count, {**figure(claim, failure), OUTCOME: outcome})

    def _refused(self, claim: Claim, context: Context, code: str, message: str) -> None:
        shared: Attributes = {SYSTEM: "jobqueue", OPERATION: "settle", OPERATION_TYPE: "settle"}
        attributes = {**shared, DESTINATION: claim.queue, MESSAGE_ID: claim.id, ERROR_TYPE: code, OUTCOME: FAILED}
        span = self._telemetry.tracer.start_span(f"settle {claim.queue}", context, attributes=attributes)
        span.set_status(Status(StatusCode.ERROR, message))
        span.end()


def attributes_of(claim: Claim) -> Attributes:
    """What a span says of a job. Nothing of its content: no payload, no keys, no subject, no tenant."""
    attributes: Attributes = {MESSAGE_ID: claim.id, JOB_TYPE: claim.job_type, ATTEMPT: claim.attempt}
    if claim.started_at is not None:
        due = claim.created_at if claim.run_at is None else max(claim.created_at, claim.run_at)
        attributes[WAIT_MS] = max(0, round((claim.started_at - due).total_seconds() * 1000))
    return attributes


def figure(claim: Claim, failure: str | None) -> Attributes:
    """The attributes of a measurement."""
    shared: Attributes = {SYSTEM: "jobqueue", OPERATION: "process", DESTINATION: claim.queue, JOB_TYPE: claim.job_type}
    return shared if failure is None else {**shared, ERROR_TYPE: failure}


def end_span(span: Span, outcome: str, error: BaseException | None) -> str | None:
    """End the span of an attempt; return the code of its failure, None if it is none."""
    span.set_attribute(OUTCOME, outcome)
    failure = None
    if outcome in FAILURES and error is not None:
        failure = "TIMEOUT" if outcome == TIMED_OUT else code_of(error)
        span.set_attribute(ERROR_TYPE, failure)
        span.record_exception(error)
        span.set_status(
            Status(StatusCode.ERROR, f"{type(error).__name__}: {error}" if outcome != TIMED_OUT else failure)
        )
    span.end()
    return failure


def carry_into_child() -> None:
    """Let the process that runs the handler continue what is current here."""
    carrier: dict[str, str] = {}
    BETWEEN_PROCESSES.inject(carrier)
    around_child.set((CARRIED, carrier))
