"""What callers do with a job: `POST /jobs/{id}/{action}`, `PATCH` and `DELETE /jobs/{id}`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response

from jobqueue.api.bodies import checked_body, refuse_foreign_pages
from jobqueue.api.context import Call
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import State, headers_of, job_id_of, job_json
from jobqueue.api.models import JobResource
from jobqueue.api.operations import Operation, Parameter, Reply
from jobqueue.api.parameters import ETAG_HEADER, RETRY_AFTER_HEADER
from jobqueue.api.resources import ActionRequest, ChangeRequest
from jobqueue.api.statements import actor_of, write

ASKED_RETRY_AFTER = "1"
"""Seconds after which a worker has usually heard what is asked of it: at once by notification, else with its beat."""

_ACT = """\
select etag, version, status, alive, due_in, ends_in, body, asked from jobqueue.http_act(%s, %s, %s, %s, %s, %s::jsonb)"""
_DELETE = "select jobqueue.http_delete(%s, %s, %s, %s, %s)"

# verb of the path: function, the option that only it has, summary
_ACTIONS: Mapping[str, tuple[str, str | None, str]] = {
    "retry": ("retry", "from_start", "Run a failed job again; with from_start from its beginning"),
    "cancel": ("cancel", "force", "Stop a job; with force at once, whatever its worker does"),
    "skip": ("skip", None, "Go on without a failed job"),
    "pause": ("pause", None, "Hold a job; a running one stops at its next pause-safe checkpoint"),
    "resume": ("resume", None, "Take a paused or cancelled job up again"),
    "run-now": ("run_now", None, "Do not wait for run_at"),
}


def _action(verb: str) -> Callable[[Call], Awaitable[Response]]:
    function, own_option, _ = _ACTIONS[verb]

    async def act(call: Call) -> Response:
        job_id = job_id_of(call)
        options = await checked_body(call, ActionRequest, optional=True)
        for name in ("force", "from_start"):
            if options.get(name) and name != own_option:
                raise ApiError("INVALID_ARGUMENT", f"{verb} has no {name}.", details={"option": name})
        return await _act(call, job_id, function, options)

    return act


async def patch_job(call: Call) -> Response:
    """Change priority or run_at of a waiting job."""
    job_id = job_id_of(call)
    changes = await checked_body(call, ChangeRequest)
    if changes.get("priority") is None and changes.get("run_at") is None:
        raise ApiError("INVALID_ARGUMENT", "There is nothing to change.", hint="Give priority, run_at, or both.")
    return await _act(call, job_id, "change", changes)


async def _act(call: Call, job_id: str, action: str, options: Mapping[str, Any]) -> Response:
    ((*columns, asked),) = await write(call, _ACT, actor_of(call), job_id, action, json.dumps(options))
    state = State(*columns)
    assert state.body is not None
    headers = {
        **headers_of(state),
        "Cache-Control": "no-store",
        **({"Retry-After": ASKED_RETRY_AFTER} if asked else {}),
    }
    content = job_json(call, state.body, job_id)
    return Response(content, status_code=202 if asked else 200, headers=headers, media_type="application/json")


async def delete_job(call: Call) -> Response:
    """Delete an ended job."""
    job_id = job_id_of(call)
    refuse_foreign_pages(call)
    await write(call, _DELETE, actor_of(call), job_id, call.query.get("reason"))
    return Response(status_code=204)


OPERATIONS: tuple[Operation, ...] = (
    *(
        Operation(
            name=verb.replace("-n", "N") + "Job",
            method="POST",
            path=f"/jobs/{{id}}/{verb}",
            summary=summary,
            description="Without a reason the audit says that none was given. Repeating it changes nothing.",
            handler=_action(verb),
            tag="actions",
            scopes=("jobs:act",),
            request=(ActionRequest,),
            request_examples={"with a reason": {"reason": "asked for by the customer"}},
            request_required=False,
            replies={
                200: Reply("The job, after it", (JobResource,), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
                202: Reply("The job; its worker has been asked", (JobResource,), {**ETAG_HEADER, **RETRY_AFTER_HEADER}),
            },
            errors=("INVALID_ARGUMENT", "JOB_NOT_FOUND", "INVALID_TRANSITION", "CONFLICT"),
            of_tenant=True,
        )
        for verb, (_, _, summary) in _ACTIONS.items()
    ),
    Operation(
        name="changeJob",
        method="PATCH",
        path="/jobs/{id}",
        summary="Change priority or run_at of a waiting job",
        handler=patch_job,
        tag="actions",
        scopes=("jobs:act",),
        request=(ChangeRequest,),
        request_examples={
            "first": {"priority": 10, "reason": "the customer waits"},
            "later": {"run_at": "2099-01-01T00:00:00Z"},
        },
        replies={200: Reply("The job, after it", (JobResource,), {**ETAG_HEADER, **RETRY_AFTER_HEADER})},
        errors=("INVALID_ARGUMENT", "UNSUPPORTED_MEDIA_TYPE", "JOB_NOT_FOUND", "INVALID_TRANSITION"),
        of_tenant=True,
    ),
    Operation(
        name="deleteJob",
        method="DELETE",
        path="/jobs/{id}",
        summary="Delete an ended job, and what hangs on it",
        handler=delete_job,
        tag="actions",
        scopes=("jobs:act",),
        query=(Parameter("reason", "For the audit.", {"type": "string"}),),
        replies={204: Reply("It is gone")},
        errors=("INVALID_ARGUMENT", "JOB_NOT_FOUND", "INVALID_TRANSITION", "CONFLICT"),
        of_tenant=True,
    ),
)
