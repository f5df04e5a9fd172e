"""Queues, workers and schedules: lists, pauses, drains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from jobqueue.api.bodies import checked_body
from jobqueue.api.context import ALL_TENANTS, Call
from jobqueue.api.errors import ApiError
from jobqueue.api.history import list_answer
from jobqueue.api.job_state import ID
from jobqueue.api.operations import Operation, Reply
from jobqueue.api.resources import (
    QueueList,
    QueueResource,
    ReasonRequest,
    ScheduleList,
    ScheduleResource,
    WorkerList,
    WorkerResource,
)
from jobqueue.api.statements import actor_of, read, write

_LIST = "select jobqueue.http_list(%s, %s, %s)"
_ADMINISTER = "select jobqueue.http_administer(%s, %s, %s, %s, %s, %s)"

_NAME = {"name": {"type": "string", "minLength": 1, "maxLength": 200}}
_WORKER = {"id": {"type": "string", "format": "uuid"}}
_EXAMPLE = {"with a reason": {"reason": "the printer is on fire"}}


def _list_of(what: str) -> Callable[[Call], Awaitable[Response]]:
    async def get_list(call: Call) -> Response:
        # Workers belong to no tenant; who runs on which machine is for those who see all tenants, and admins are such.
        tenants = ALL_TENANTS if what == "workers" and call.principal.has_scope("admin") else None
        ((rows,),) = await read(call, _LIST, what, tenants=tenants)
        return list_answer(rows)

    return get_list


def _change(what: str) -> Callable[[Call], Awaitable[Response]]:
    async def change(call: Call) -> Response:
        name = call.path.get("name") or call.path["id"]
        if what == "drain_worker" and not ID.fullmatch(name):
            raise ApiError(
                "WORKER_NOT_FOUND",
                "There is no such worker: this is not the id of a worker.",
                status=404,
                details={"reason": "malformed_id"},
            )
        if "\0" in name:
            raise ApiError("NOT_FOUND", "No name has a NUL character.")
        options = await checked_body(call, ReasonRequest, optional=True)
        ((row,),) = await write(call, _ADMINISTER, actor_of(call), what, name, options.get("reason"))
        return Response(row, headers={"Cache-Control": "no-store"}, media_type="application/json")

    return change


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="listQueues",
        method="GET",
        path="/queues",
        summary="The queues, their options, and how many jobs are ready there",
        description="Durations are seconds. `ready` counts jobs of all tenants, at most 1,000.",
        handler=_list_of("queues"),
        tag="operations",
        scopes=("jobs:read",),
        replies={200: Reply("All queues, by name", (QueueList,))},
    ),
    *(
        Operation(
            name=f"{verb}Queue",
            method="POST",
            path=f"/queues/{{name}}/{verb}",
            summary=summary,
            handler=_change(f"{verb}_queue"),
            tag="operations",
            scopes=("jobs:act",),
            description="For callers who see all tenants.",
            path_schemas=_NAME,
            request=(ReasonRequest,),
            request_examples=_EXAMPLE,
            request_required=False,
            replies={200: Reply("The queue", (QueueResource,))},
            errors=("INVALID_ARGUMENT", "QUEUE_NOT_FOUND"),
        )
        for verb, summary in (
            ("pause", "Start no job of a queue until it is resumed"),
            ("resume", "Start jobs of a queue again"),
        )
    ),
    Operation(
        name="listSchedules",
        method="GET",
        path="/schedules",
        summary="What is sent when",
        handler=_list_of("schedules"),
        tag="operations",
        scopes=("jobs:read",),
        replies={200: Reply("The schedules of the caller's tenants, by name", (ScheduleList,))},
        of_tenant=True,
    ),
    *(
        Operation(
            name=f"{verb}Schedule",
            method="POST",
            path=f"/schedules/{{name}}/{verb}",
            summary=summary,
            handler=_change(f"{verb}_schedule"),
            tag="operations",
            scopes=("jobs:act",),
            path_schemas=_NAME,
            request=(ReasonRequest,),
            request_examples=_EXAMPLE,
            request_required=False,
            replies={200: Reply("The schedule", (ScheduleResource,))},
            errors=("INVALID_ARGUMENT", "SCHEDULE_NOT_FOUND"),
            of_tenant=True,
        )
        for verb, summary in (
            ("pause", "Send nothing by a schedule until it is resumed"),
            ("resume", "Send by a schedule again"),
        )
    ),
    Operation(
        name="listWorkers",
        method="GET",
        path="/workers",
        summary="The processes that run jobs, and those that stopped within a day",
        description="`name`, `hostname` and `pid` only for the scope admin and for callers who see all tenants.",
        handler=_list_of("workers"),
        tag="operations",
        scopes=("jobs:act",),
        replies={200: Reply("The workers, the latest first", (WorkerList,))},
    ),
    Operation(
        name="drainWorker",
        method="POST",
        path="/workers/{id}/drain",
        summary="Let a worker finish what it has, and stop",
        handler=_change("drain_worker"),
        tag="operations",
        scopes=("admin",),
        path_schemas=_WORKER,
        request=(ReasonRequest,),
        request_examples=_EXAMPLE,
        request_required=False,
        replies={200: Reply("The worker", (WorkerResource,))},
        errors=("INVALID_ARGUMENT", "WORKER_NOT_FOUND"),
    ),
)
