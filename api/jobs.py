"""Jobs: `POST /jobs` and `GET /jobs/{id}`. Each is one SQL statement (sql/functions/http.sql)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from jobqueue.api.conditional import parse_if_none_match, retry_after
from jobqueue.api.context import Call
from jobqueue.api.encoding import with_members
from jobqueue.api.errors import ApiError
from jobqueue.api.limits import unknown_name
from jobqueue.api.models import JobResource, SendJob, SendJobs, SentJob, SentJobs
from jobqueue.api.operations import Operation, Parameter, Reply
from jobqueue.records import COLUMNS

LONGEST_WAIT = 30.0
FIELDS = (*COLUMNS, "done", "allowed_actions", "refused_actions", "queue_position", "links")
INCLUDES = ("stages", "attempts")

_ID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_IDEMPOTENCY_KEY = re.compile(r'"([\x20-\x21\x23-\x7e]{1,255})"|([\x21\x23-\x7e]{1,255})')
_WAIT = re.compile(r"\d{1,6}(?:\.\d{1,6})?")

_GET = """\
select etag, version, status, alive, due_in, ends_in, body from jobqueue.http_job(%s, %s, %s, %s, %s, %s, %s)"""
_SEND = """\
select replayed, id::text, created, reason, etag, version, status, alive, due_in, ends_in, body
from jobqueue.http_send(%s, %s, %s::jsonb, %s::jsonb, %s, %s, %s, %s)"""


class State(NamedTuple):
    """The columns of jobqueue.http_job_state: `body` is JSON text, or None if the caller has it (its ETag) already."""

    etag: str | None
    version: int | None
    status: str
    alive: bool | None
    due_in: float | None
    ends_in: float | None
    body: str | None


class Sent(NamedTuple):
    """A row of jobqueue.http_send; `state.version` is None if a replayed job has been deleted since."""

    replayed: bool
    id: str | None
    created: bool
    reason: str | None
    state: State


# -- GET /jobs/{id} ---------------------------------------------------------------------------------------------------


async def get_job(call: Call) -> Response:
    """Answer with the job, or 304; with `wait`, once there is something new."""
    job_id = job_id_of(call)
    etags = parse_if_none_match(call.header(b"if-none-match"))
    state = await _read(call, job_id, etags)
    seconds = call.query.get("wait", 0.0)
    if seconds and not _is_news(state, etags):
        state = await _wait_for_news(call, job_id, etags, state, seconds)
    headers = _headers(state)
    if state.body is None:
        return Response(status_code=304, headers=headers)
    fields = call.query.get("fields")
    members = {"links": links(call, job_id)} if fields is None or "links" in fields else {}
    return Response(with_members(state.body, members), headers=headers, media_type="application/json")


def _is_news(state: State, etags: list[str] | None) -> bool:
    """Whether `wait` is over before it began: the ETag differs or, without one, the job has ended."""
    return state.body is not None if etags else retry_after(*_timing(state)) is None


async def _wait_for_news(call: Call, job_id: str, etags: list[str] | None, seen: State, seconds: float) -> State:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    hub = call.services.hub
    while True:
        assert seen.version is not None
        in_time = await hub.wait(job_id, seen.version, seen.alive, deadline - loop.time())
        state = await _read(call, job_id, etags)
        if not in_time or hub.ending or (state.version, state.alive) != (seen.version, seen.alive):
            return state


async def _read(call: Call, job_id: str, etags: list[str] | None) -> State:
    database = call.services.database
    traces = not call.principal.scopes.isdisjoint({"jobs:act", "admin"})
    parameters = (
        database.role,
        call.tenants,
        job_id,
        etags,
        call.query.get("fields"),
        call.query.get("include"),
        traces,
    )
    ((*columns,),) = await database.rows(_GET, parameters, read_only=True)
    state = State(*columns)
    if state.version is None:
        raise job_not_found(job_id)
    return state


def job_id_of(call: Call) -> str:
    """Return the path's id in lower case. Raises ApiError: 404 if it cannot be one."""
    given = call.path["id"]
    if not _ID.fullmatch(given):
        raise ApiError(
            "JOB_NOT_FOUND",
            "There is no such job: this is not the id of a job.",
            hint="An id looks like 0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b.",
            details={"reason": "malformed_id", "id": given[:100].encode("utf-8", "replace").decode()},
        )
    return given.lower()


def job_not_found(job_id: str) -> ApiError:
    """Return the 404 for a job that is unknown, deleted, or another tenant's; which of them is not said."""
    return ApiError(
        "JOB_NOT_FOUND",
        f"There is no job {job_id}.",
        hint="It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.",
        details={"reason": "unknown_id", "id": job_id},
    )


def links(call: Call, job_id: str) -> dict[str, str]:
    """Return the paths of everything that hangs on a job."""
    return {operation.link: call.base + operation.path.format(id=job_id) for operation in OPERATIONS if operation.link}


def _timing(state: State) -> tuple[str, float | None, float | None]:
    return state.status, state.due_in, state.ends_in


def _headers(state: State) -> dict[str, str]:
    headers = {"ETag": state.etag or "", "Cache-Control": "private, no-cache"}
    seconds = retry_after(*_timing(state))
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    return headers


# -- POST /jobs -------------------------------------------------------------------------------------------------------


async def post_jobs(call: Call) -> Response:
    """Send one job, or all of `{"jobs": […]}`."""
    key = _idempotency_key(call.header(b"idempotency-key"))
    text, body = await call.json()
    if not isinstance(body, dict):
        raise ApiError("INVALID_ARGUMENT", "The body must be an object.", hint='Send {"queue": "…", "payload": {…}}.')
    many = "jobs" in body
    _check(SendJobs if many else SendJob, body)
    _check_tenant(call, body["jobs"] if many else [body])
    sent = await _send(call, text, body, key)
    headers = {"Cache-Control": "no-store"}
    if sent[0].replayed:
        headers["Idempotent-Replayed"] = "true"
    return _answer_many(call, sent, headers) if many else _answer_one(call, sent[0], headers)


async def _send(call: Call, text: str, body: Any, key: str | None) -> list[Sent]:
    database = call.services.database
    fixed = {} if call.tenant is None else {"tenant": call.tenant}
    # The body goes to the database as it came in: nothing is lost on the way through floating point numbers.
    parameters = (
        database.role,
        call.tenants,
        text,
        json.dumps(fixed),
        call.services.settings.api_create_queues,
        call.principal.key or "",
        key,
        _fingerprint(call, body) if key else None,
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
        headers |= {name: value for name, value in _headers(sent.state).items() if name != "Cache-Control"}
    return Response(_sent_json(call, sent), status_code=202, headers=headers, media_type="application/json")


def _answer_many(call: Call, sent: list[Sent], headers: dict[str, str]) -> Response:
    seconds = [after for job in sent if job.state.version and (after := retry_after(*_timing(job.state))) is not None]
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
    return with_members(sent.state.body, {"links": links(call, sent.id), **members})


def _check(model: type[BaseModel], body: Mapping[str, Any]) -> None:
    try:
        model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        listed = [
            {"pointer": "".join(f"/{part}" for part in problem["loc"]), "message": problem["msg"]}
            for problem in problems[:20]
        ]
        first = listed[0]
        raise ApiError(
            "INVALID_ARGUMENT",
            f"{first['pointer'] or 'The body'}: {first['message']}.".encode("utf-8", "replace").decode(),
            details={"errors": listed},
        ) from None


def _check_tenant(call: Call, jobs: list[dict[str, Any]]) -> None:
    if call.tenant is None:
        return
    for job in jobs:
        if job.get("tenant") not in {None, call.tenant}:
            raise ApiError(
                "FORBIDDEN",
                "The job names another tenant than the path.",
                hint="Leave tenant out, or send to the other tenant's path.",
            )


def _idempotency_key(header: str | None) -> str | None:
    if header is None:
        return None
    match = _IDEMPOTENCY_KEY.fullmatch(header.strip())
    if match is None:
        raise ApiError(
            "INVALID_ARGUMENT",
            "The Idempotency-Key cannot be read.",
            status=400,
            hint="Send 1 to 255 printable ASCII characters, for example a random UUID.",
        )
    return match[1] or match[2]


def _fingerprint(call: Call, body: Any) -> str:
    """What makes two requests the same: where they go and what they say, not how the JSON was written."""
    canonical = json.dumps([call.base, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# -- Parameters and the table -----------------------------------------------------------------------------------------


def _parse_wait(text: str) -> float:
    if not _WAIT.fullmatch(text):
        raise ApiError("INVALID_ARGUMENT", "wait must be a number of seconds.", status=400, hint="For example wait=25.")
    return min(float(text), LONGEST_WAIT)


def _parse_names(what: str, known: tuple[str, ...], text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ApiError("INVALID_ARGUMENT", **unknown_name(what, name, list(known)))
    return names


_QUERY = (
    Parameter(
        "wait",
        "Seconds to wait for news, at most 30: at once if the ETag in If-None-Match differs or, without one, if the "
        "job has ended; else until its version or alive changes.",
        {"type": "number", "minimum": 0},
        _parse_wait,
        25,
    ),
    Parameter(
        "fields",
        "Only these, separated by commas.",
        {"type": "string"},
        lambda text: _parse_names("field", FIELDS, text),
        "id,status,progress_pct",
    ),
    Parameter(
        "include",
        "More: stages, attempts. Stack traces only with jobs:act or admin.",
        {"type": "string"},
        lambda text: _parse_names("include", INCLUDES, text),
        "stages,attempts",
    ),
)
_CONDITION = Parameter("If-None-Match", "The ETag of what the client has.", {"type": "string"})
_KEY = Parameter(
    "Idempotency-Key",
    "1 to 255 printable characters, kept for 24 hours: a repeated request finds the job of the first.",
    {"type": "string", "minLength": 1, "maxLength": 260},
)
_ETAG = {"ETag": 'W/"<version>-<x>": x follows alive while processing, and a 10 s bucket while pending.'}
_RETRY_AFTER = {"Retry-After": "Seconds until the next poll is worth while; missing once the job has ended."}

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
        headers=(_KEY,),
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
                    **_ETAG,
                    **_RETRY_AFTER,
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
        query=_QUERY,
        headers=(_CONDITION,),
        replies={
            200: Reply("The job", (JobResource,), {**_ETAG, **_RETRY_AFTER}),
            304: Reply("The client has it", (), {**_ETAG, **_RETRY_AFTER}),
        },
        errors=("INVALID_ARGUMENT", "JOB_NOT_FOUND"),
        of_tenant=True,
        link="self",
    ),
)
