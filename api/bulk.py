"""One action on many jobs: `POST /jobs/bulk`, `GET /bulk/{id}`. How it is done: sql/functions/http_bulk.sql."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from jobqueue.api.bodies import checked_body
from jobqueue.api.context import Call
from jobqueue.api.encoding import with_members
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID
from jobqueue.api.jobs import fingerprint_of, idempotency_key_of
from jobqueue.api.operations import Operation, Reply
from jobqueue.api.parameters import IDEMPOTENCY_KEY
from jobqueue.api.resources import BulkRequest, BulkResource
from jobqueue.api.statements import actor_of, read, write

POLL_SECONDS = "1"

_START = "select body, replayed from jobqueue.http_bulk(%s, %s, %s, %s::jsonb, %s, %s, %s)"
_READ = "select jobqueue.http_bulk_read(%s, %s, %s)"


async def post_bulk(call: Call) -> Response:
    """Do an action with many jobs, or begin with it."""
    key = idempotency_key_of(call.header(b"idempotency-key"))
    body = dict(await checked_body(call, BulkRequest))
    body["filter"] = _filter(call, body)
    owner = call.principal.key or ""
    fingerprint = fingerprint_of(call, ["bulk", body]) if key else None
    ((text, replayed),) = await write(call, _START, actor_of(call), json.dumps(body), owner, key, fingerprint)
    if text is None:
        raise _not_found()
    return _answer(call, text, {"Idempotent-Replayed": "true"} if replayed else {}, begun=True)


async def get_bulk(call: Call) -> Response:
    """Answer with how far an operation is."""
    given = call.path["id"]
    ((text,),) = await read(call, _READ, given) if ID.fullmatch(given) else ((None,),)
    if text is None:
        raise _not_found()
    return _answer(call, text, {})


def _filter(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """The filter with the path's tenant. Raises ApiError: 422 unless something is meant, 403 for a foreign tenant."""
    ids, given = body.pop("ids", None), body.get("filter")
    wanted = {name: value for name, value in (given or {}).items() if value is not None}
    if (ids is None) == (given is None) or (ids is None and not wanted):
        raise ApiError(
            "INVALID_ARGUMENT",
            "Say which jobs are meant: give either ids, or a filter with at least one value.",
            hint='For example {"action": "retry", "filter": {"status": "failed", "queue": "indexing"}}.',
        )
    if ids is not None:
        wanted = {"ids": ids}
    tenant = wanted.get("tenant", call.tenant or call.principal.only_tenant)
    if tenant is not None:
        if not (tenant == call.tenant if call.tenant else call.principal.may_use(tenant)):
            raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})
        wanted["tenant"] = tenant
    return wanted


def _answer(call: Call, text: str, headers: dict[str, str], *, begun: bool = False) -> Response:
    operation = json.loads(text)
    headers = {"Cache-Control": "no-store", **headers}
    place = f"{call.base}/bulk/{operation['id']}"
    waits = operation.get("ended_at") is None and operation["status"] in {"pending", "processing", "paused"}
    if waits:
        headers["Retry-After"] = POLL_SECONDS
    if begun and operation["id"] is not None:
        headers["Location"] = place
    links = {"self": place, "job": f"{call.base}/jobs/{operation['id']}"} if operation["id"] is not None else {}
    content = with_members(text, {"links": links})
    status = 202 if begun and waits else 200
    return Response(content, status_code=status, headers=headers, media_type="application/json")


def _not_found() -> ApiError:
    return ApiError("BULK_NOT_FOUND", "There is no such bulk operation.", hint="They are kept for 7 days.")


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="bulkAction",
        method="POST",
        path="/jobs/bulk",
        summary="Do one action with many jobs",
        description="By ids or by filter. `dry_run` only counts. With `expected_count` it is refused if more than 10 % more "
        "jobs are meant by now. Up to 500 jobs are done at once (200); more become a job of their own (202).",
        handler=post_bulk,
        tag="actions",
        scopes=("jobs:act",),
        headers=(IDEMPOTENCY_KEY,),
        request=(BulkRequest,),
        request_examples={
            "retry all failed, first a look": {
                "action": "retry",
                "filter": {"status": "failed", "queue": "indexing"},
                "dry_run": True,
            },
            "cancel all pending": {"action": "cancel", "filter": {"status": "pending"}, "reason": "a wrong import"},
            "some": {"action": "pause", "ids": ["0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"], "reason": "lunch"},
        },
        replies={
            200: Reply("Done, or counted", (BulkResource,)),
            202: Reply("Begun", (BulkResource,), {"Location": "Where it can be watched.", "Retry-After": "Seconds."}),
        },
        errors=(
            "INVALID_ARGUMENT",
            "UNKNOWN_OPTION",
            "CONFLICT",
            "TOO_LARGE",
            "UNSUPPORTED_MEDIA_TYPE",
            "IDEMPOTENCY_KEY_REUSED",
        ),
        of_tenant=True,
    ),
    Operation(
        name="getBulk",
        method="GET",
        path="/bulk/{id}",
        summary="How far a bulk operation is",
        handler=get_bulk,
        tag="actions",
        scopes=("jobs:read",),
        replies={200: Reply("The operation", (BulkResource,), {"Retry-After": "Seconds, until it has ended."})},
        errors=("BULK_NOT_FOUND",),
        of_tenant=True,
    ),
)
