"""What has happened: `GET /jobs/{id}/stages`, `/attempts`, `/audit`, `/explain`, and `GET /audit`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response

from jobqueue.api.context import Call
from jobqueue.api.encoding import dump_json
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID, job_id_of, job_not_found
from jobqueue.api.operations import Operation, Parameter, Reply
from jobqueue.api.parameters import LIMIT
from jobqueue.api.resources import AttemptList, AuditPage, ReasonList, StageList
from jobqueue.api.statements import read, sees_traces

PER_PAGE_DEFAULT = 50

_HISTORY = "select jobqueue.http_history(%s, %s, %s, %s, %s)"
_AUDIT = "select id, line from jobqueue.http_audit(%s, %s, %s::jsonb, %s, %s, %s)"


def list_answer(rows: str, **meta: Any) -> Response:
    """Return `{"data": …, "meta": …}` of a JSON list that is text already."""
    content = b'{"data":' + rows.encode() + b',"meta":' + dump_json(meta) + b"}"
    return Response(content, headers={"Cache-Control": "no-store"}, media_type="application/json")


def _history_of(what: str) -> Callable[[Call], Awaitable[Response]]:
    async def get_history(call: Call) -> Response:
        job_id = job_id_of(call)
        ((rows,),) = await read(call, _HISTORY, job_id, what, sees_traces(call))
        if rows is None:
            raise job_not_found(job_id)
        return list_answer(rows)

    return get_history


async def get_audit(call: Call) -> Response:
    """Answer with who did what, newest first."""
    wanted = {name: call.query[name] for name in ("job_id", "action", "target", "actor") if name in call.query}
    limit = call.query.get("limit", PER_PAGE_DEFAULT)
    rows = await read(call, _AUDIT, json.dumps(wanted), call.query.get("cursor"), limit + 1, sees_traces(call))
    following = str(rows[limit - 1][0]) if len(rows) > limit else None
    return list_answer(f"[{','.join(line for _, line in rows[:limit])}]", per_page=limit, next_cursor=following)


def _parse_cursor(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ApiError("CURSOR_MISMATCH", "This cursor is not one of this list.", hint="Begin anew without a cursor.")
    return int(text)


def _parse_job_id(text: str) -> str:
    if not ID.fullmatch(text):
        raise ApiError("INVALID_ARGUMENT", "job_id is not the id of a job.")
    return text


def _operation(name: str, what: str, summary: str, description: str, model: Any) -> Operation:
    return Operation(
        name=name,
        method="GET",
        path=f"/jobs/{{id}}/{what}",
        summary=summary,
        description=description,
        handler=_history_of(what),
        tag="history",
        scopes=("jobs:read",),
        replies={200: Reply("The rows, in their order", (model,))},
        errors=("JOB_NOT_FOUND",),
        of_tenant=True,
        link=what,
    )


_TEXT = {"type": "string"}

OPERATIONS: tuple[Operation, ...] = (
    _operation("listStages", "stages", "The stages of a job", "Each with its status, times and error.", StageList),
    _operation(
        "listAttempts",
        "attempts",
        "Every attempt of a job",
        "With the error of each failed one; stack traces (`error_detail`) only with jobs:act or admin.",
        AttemptList,
    ),
    _operation(
        "listJobAudit",
        "audit",
        "What people did with a job",
        "Also of a job that has been deleted. Logins and addresses only with jobs:act or admin.",
        AuditPage,
    ),
    _operation(
        "explainJob",
        "explain",
        "Why a job is not running, or why it ended so",
        "The first row is the answer; the others add to it.",
        ReasonList,
    ),
    Operation(
        name="listAudit",
        method="GET",
        path="/audit",
        summary="Who did what, newest first",
        handler=get_audit,
        tag="history",
        scopes=("jobs:read",),
        query=(
            Parameter("job_id", "About this job.", {"type": "string", "format": "uuid"}, _parse_job_id),
            Parameter("action", "This action.", _TEXT, example="cancel"),
            Parameter("target", "About this queue, schedule, worker or tenant.", _TEXT),
            Parameter("actor", "By this person.", _TEXT),
            LIMIT,
            Parameter("cursor", "`meta.next_cursor` of the page before.", _TEXT, _parse_cursor),
        ),
        replies={200: Reply("A page", (AuditPage,))},
        errors=("INVALID_ARGUMENT", "CURSOR_MISMATCH"),
        of_tenant=True,
    ),
)
