"""Jobs: `POST /jobs` and `GET /jobs/{id}`. Each is one SQL statement (sql/functions/http.sql)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.responses import Response

from jobqueue.api.bodies import check_body
from jobqueue.api.conditional import parse_if_none_match
from jobqueue.api.context import Call
from jobqueue.api.encoding import with_members
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import State, headers_of, job_id_of, job_json, job_not_found
from jobqueue.api.models import JobResource, SendJob, SendJobs, SentJob, SentJobs
from jobqueue.api.operations import Operation, Reply
from jobqueue.api.ownership import owning_options
from jobqueue.api.parameters import (
    CONDITION,
    ETAG_HEADER,
    IDEMPOTENCY_KEY,
    INCLUDE,
    JOB_FIELDS,
    RETRY_AFTER_HEADER,
    WAIT,
)
from jobqueue.api.reads import WHOLE, Form
from jobqueue.api.statements import sees_traces

TURN_SECONDS = 20.0
"""That a long poll waits for its turn to read once it was woken; then it is answered 504."""

_KEY = re.compile(r'"([\x20-\x21\x23-\x7e]{1,255})"|([\x21\x23-\x7e]{1,255})')

_SEND = """\
select replayed, id::text, created, reason, etag, version, status, alive, due_in, ends_in, body
from jobqueue.http_send(%s, %s, %s::jsonb, %s::jsonb, %s, %s, %s, %s)"""


class Sent(NamedTuple):
    """A row of jobqueue.http_send; `state.version` is None if a replayed job has been deleted since."""

    replayed: bool
    id: str | None
    created: bool
    reason: str | None
    state: State


Send = Callable[[Call, str, Any, dict[str, Any], str | None], Awaitable[list[Sent]]]


# -- GET /jobs/{id} ---------------------------------------------------------------------------------------------------


async def get_job(call: Call) -> Response:
    """Answer with the job, or 304; with `wait`, once there is something new."""
    job_id = job_id_of(call)
    etags = parse_if_none_match(call.header(b"if-none-match"))
    state = await _read(call, job_id, etags)
    seconds = call.query.get("wait", 0.0)
    if seconds and not _is_news(state, etags):
        state = await _wait_for_news(call, job_id, etags, state, seconds)
    headers = headers_of(state)
    if state.body is None:
        return Response(status_code=304, headers=headers)
    content = job_json(call, state.body, job_id, call.query.get("fields"))
    return Response(content, headers=headers, media_type="application/json")


async def get_any_job(call: Call) -> Response:
    """Answer with a job of any tenant."""
    job_id = job_id_of(call)
    etags = parse_if_none_match(call.header(b"if-none-match"))
    state = await _read(call, job_id, etags, tenants="*")
    if state.body is None:
        return Response(status_code=304, headers=headers_of(state))
    content = job_json(call, state.body, job_id, call.query.get("fields"))
    return Response(content, headers=headers_of(state), media_type="application/json")


def _is_news(state: State, etags: list[str] | None) -> bool:
    """Whether `wait` is over before it began: the ETag differs or, without one, the job has ended."""
    return state.body is not None if etags else state.poll_after is None


async def _wait_for_news(call: Call, job_id: str, etags: list[str] | None, seen: State, seconds: float) -> State:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    hub = call.services.hub
    while True:
        assert seen.version is not None
        in_time = await hub.wait(job_id, seen.version, seen.alive, deadline - loop.time())
        # A job that thousands wait for wakes them all: they queue here, not for connections, where 5 s would be a 503.
        async with asyncio.timeout(TURN_SECONDS), hub.reading:
            state = await _read(call, job_id, etags)
        if not in_time or hub.ending or (state.version, state.alive) != (seen.version, seen.alive):
            return state


async def _read(call: Call, job_id: str, etags: list[str] | None, tenants: str | None = None) -> State:
    state = await call.services.reads.read(job_id, etags, call.tenants if tenants is None else tenants, _form_of(call))
    if state.version is None:
        raise job_not_found(job_id)
    return state


def _form_of(call: Call) -> Form:
    if not call.query:
        return WHOLE
    fields, include = call.query.get("fields"), call.query.get("include")
    return Form(
        None if fields is None else tuple(fields),
        None if include is None else tuple(include),
        # Only attempts have traces.
        include is not None and sees_traces(call),
    )


# -- POST /jobs -------------------------------------------------------------------------------------------------------


async def post_jobs(call: Call, send: Send | None = None) -> Response:
    """Send one job, or all of `{"jobs": […]}`; `send`: with what, if not plainly."""
    key = idempotency_key_of(call.header(b"idempotency-key"))
    text, body = await call.json()
    if not isinstance(body, dict):
        raise ApiError("INVALID_ARGUMENT", "The body must be an object.", hint='Send {"queue": "…", "payload": {…}}.')
    many = "jobs" in body
    check_body(SendJobs if many else SendJob, body)
    owning = owning_options(call, body["jobs"] if many else [body])
    sent = await (send or send_body)(call, text, body, owning, key)
    headers = {"Cache-Control": "no-store"}
    if sent[0].replayed:
        headers["Idempotent-Replayed"] = "true"
    return _answer_many(call, sent, headers) if many else _answer_one(call, sent[0], headers)


async def send_body(call: Call, text: str, body: Any, owning: dict[str, Any], key: str | None) -> list[Sent]:
    """Store what a body asks for; `owning`: what goes over and under the options of its jobs."""
    database = call.services.database
    # The body goes to the database as it came in: nothing is lost on the way through floating point numbers.
    parameters = (
        database.role,
        call.tenants,
        text,
        json.dumps(owning),
        call.services.settings.api_create_queues,
        call.principal.key or "",
        key,
        fingerprint_of(call, body) if key else None,
    )
    rows = await database.rows(_SEND, parameters)
    return [
        Sent(replayed, job_id, created, reason, State(*state)) for replayed, job_id, created, reason, *state in rows
    ]


def _answer_one(call: Call, sent: Sent, headers: dict[str, str]) -> Response:
    if sent.id is None:
        raise ApiError(
            "CONFLICT",
            "A job that you cannot see stands in the place of this one.",
            hint="Send it again later, or with another key.",
            details={"reason": sent.reason},
        )
    if sent.state.version is not None:
        headers["Location"] = f"{call.base}/jobs/{sent.id}"
        headers |= {name: value for name, value in headers_of(sent.state).items() if name != "Cache-Control"}
    return Response(_sent_json(call, sent), status_code=202, headers=headers, media_type="application/json")


def _answer_many(call: Call, sent: list[Sent], headers: dict[str, str]) -> Response:
    seconds = [after for job in sent if job.state.version and (after := job.state.poll_after) is not None]
    if seconds:
        headers["Retry-After"] = str(min(seconds))
    meta = json.dumps({"total": len(sent), "created": sum(job.created for job in sent)}, separators=(",", ":"))
    data = b",".join(_sent_json(call, job) for job in sent)
    content = b'{"data":[' + data + b'],"meta":' + meta.encode() + b"}"
    return Response(content, status_code=202, headers=headers, media_type="application/json")


def _sent_json(call: Call, sent: Sent) -> bytes:
    members: dict[str, Any] = {"jobId": sent.id, "created": sent.created, "reason": sent.reason}
    if sent.state.body is None:
        return with_members("{}", {"id": sent.id, **members})
    assert sent.id is not None
    return job_json(call, sent.state.body, sent.id, **members)


def idempotency_key_of(header: str | None) -> str | None:
    """Return the key in an Idempotency-Key header, quoted or bare. Raises ApiError (400) if it cannot be read."""
    if header is None:
        return None
    match = _KEY.fullmatch(header.strip())
    if match is None:
        raise ApiError(
            "INVALID_ARGUMENT",
            "The Idempotency-Key cannot be read.",
            status=400,
            hint="Send 1 to 255 printable ASCII characters, for example a random UUID.",
        )
    return match[1] or match[2]


def fingerprint_of(call: Call, body: Any) -> str:
    """What makes two requests the same: where they go and what they say, not how the JSON was written."""
    canonical = json.dumps([call.base, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# -- The table ---------------------------------------------------------------------------------------------------------

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="sendJob",
        method="POST",
        path="/jobs",
        summary="Send a job, or many",
        description="The job is stored before the answer is sent. An unknown queue is 404 unless a setting allows it.",
        handler=post_jobs,
        tag="jobs",
        scopes=("jobs:write",),
        headers=(IDEMPOTENCY_KEY,),
        request=(SendJob, SendJobs),
        request_examples={
            "one": {"queue": "indexing", "payload": {"path": "."}, "subject": "repository:7"},
            "many": {"jobs": [{"queue": "indexing", "payload": {"path": "a"}}, {"queue": "indexing", "priority": 5}]},
        },
        replies={
            202: Reply(
                "Sent, or found in its place",
                (SentJob, SentJobs),
                {
                    "Location": "The job; only for a single one.",
                    "Idempotent-Replayed": "true if the key was used before.",
                    **ETAG_HEADER,
                    **RETRY_AFTER_HEADER,
                },
            )
        },
        errors=(
            "INVALID_ARGUMENT",
            "UNKNOWN_OPTION",
            "QUEUE_NOT_FOUND",
            "CONFLICT",
            "TOO_LARGE",
            "UNSUPPORTED_MEDIA_TYPE",
            "IDEMPOTENCY_KEY_REUSED",
            "LIMIT_REACHED",
        ),
        of_tenant=True,
    ),
    Operation(
        name="getJob",
        method="GET",
        path="/jobs/{id}",
        summary="Read a job, or wait for news of it",
        handler=get_job,
        tag="jobs",
        scopes=("jobs:read",),
        query=(WAIT, JOB_FIELDS, INCLUDE),
        headers=(CONDITION,),
        replies={
            200: Reply("The job", (JobResource,), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
            304: Reply("The client has it", (), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
        },
        errors=("INVALID_ARGUMENT", "JOB_NOT_FOUND"),
        of_tenant=True,
        link="self",
    ),
    Operation(
        name="getAnyJob",
        method="GET",
        path="/admin/jobs/{id}",
        summary="Read a job of any tenant",
        handler=get_any_job,
        tag="jobs",
        scopes=("admin",),
        query=(JOB_FIELDS, INCLUDE),
        headers=(CONDITION,),
        replies={
            200: Reply("The job", (JobResource,), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
            304: Reply("The client has it", (), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
        },
        errors=("INVALID_ARGUMENT", "JOB_NOT_FOUND"),
    ),
)
