"""Jobs that belong together: `GET /flows/{id}`, `GET /batches/{id}`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from jobqueue.api.context import Call
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID
from jobqueue.api.operations import Operation, Reply
from jobqueue.api.resources import BatchResource, FlowResource
from jobqueue.api.statements import read

_FLOW = "select jobqueue.http_flow(%s, %s, %s)"
_BATCH = "select jobqueue.http_batch(%s, %s, %s)"


def _read_by_id(query: str, code: str, what: str) -> Callable[[Call], Awaitable[Response]]:
    async def get(call: Call) -> Response:
        given = call.path["id"]
        if not ID.fullmatch(given):
            raise ApiError(code, f"There is no such {what}.", details={"reason": "malformed_id"})
        ((text,),) = await read(call, query, given)
        return Response(text, headers={"Cache-Control": "no-store"}, media_type="application/json")

    return get


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="getFlow",
        method="GET",
        path="/flows/{id}",
        summary="How far a flow is, and its jobs",
        description="By its id, or by that of any job in it. `jobs` has at most 1,000.",
        handler=_read_by_id(_FLOW, "FLOW_NOT_FOUND", "flow"),
        tag="groups",
        scopes=("jobs:read",),
        replies={200: Reply("The flow", (FlowResource,))},
        errors=("FLOW_NOT_FOUND",),
        of_tenant=True,
    ),
    Operation(
        name="getBatch",
        method="GET",
        path="/batches/{id}",
        summary="How far a batch is",
        handler=_read_by_id(_BATCH, "BATCH_NOT_FOUND", "batch"),
        tag="groups",
        scopes=("jobs:read",),
        replies={200: Reply("The batch", (BatchResource,))},
        errors=("BATCH_NOT_FOUND",),
        of_tenant=True,
    ),
)
