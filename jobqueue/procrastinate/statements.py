"""Our statement for each of procrastinate's queries: its SQL, its parameters, and how its rows are turned into theirs.

`translate(name, arguments, dumps)` is all that the connectors need; it knows no connection. JSON goes as text that the
application's own encoder wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from uuid import UUID

from procrastinate import types as procrastinate_types

from jobqueue.errors import JobqueueError
from jobqueue.procrastinate.ids import job_uuid, schedule_name

Row = dict[str, Any]
Dumps = Callable[[Any], str]

JOB_COLUMNS = (
    "id, queue_name, task_name, priority, lock, queueing_lock, args, status, scheduled_at, attempts, abort_requested, "
    "worker_id"
)
DEFER_TRACED: LiteralString = (
    "select id from jobqueue.procrastinate_defer(jobqueue.with_trace_context(%s::text::jsonb, %s::text::jsonb)) id"
)
LONGEST_WAIT = timedelta(days=30)
STATUSES: Mapping[str, str] = {"succeeded": "succeeded", "failed": "failed", "aborted": "aborted"}


@dataclass(frozen=True, slots=True)
class Statement:
    """What is sent instead of a query of procrastinate. Uuids in its rows become whole numbers."""

    sql: LiteralString
    parameters: tuple[Any, ...] = ()


def translate(name: str, arguments: Mapping[str, Any], dumps: Dumps | None = None) -> Statement:
    """Return the statement for a named query. Raises JobqueueError for arguments that cannot be meant."""
    return TRANSLATIONS[name](arguments, dumps or json.dumps)


def number_ids(row: Row) -> Row:
    """Return a row with procrastinate's numbers in the place of uuids."""
    return {name: value.int if isinstance(value, UUID) else value for name, value in row.items()}


def ending(to: str, **details: Any) -> str:
    """Return how an attempt ends, as procrastinate_end takes it; what is None is left out."""
    if to not in (*STATUSES, "retry"):
        raise JobqueueError(
            f'a job cannot be finished as "{to}"',
            hint=f"It is one of {', '.join(STATUSES)}; to cancel, use cancel_job.",
        )
    return json.dumps(end_of(to, **details))


def end_of(to: str, **details: Any) -> dict[str, Any]:
    """The same as an object."""
    values = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in details.items()}
    return {"to": to, **{name: value for name, value in values.items() if value is not None}}


def _defer(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    jobs = ",".join(_job(job, dumps) for job in arguments["jobs"])
    context = arguments.get("trace_context")
    if context is None:
        return Statement("select id from jobqueue.procrastinate_defer(%s::text::jsonb) id", (f"[{jobs}]",))
    return Statement(DEFER_TRACED, (f"[{jobs}]", json.dumps(context)))


def _job(job: procrastinate_types.JobToDefer, dumps: Dumps) -> str:
    head = {"queue": job.queue_name, "task": job.task_name, "priority": job.priority}
    more = {
        "lock": job.lock,
        "queueing_lock": job.queueing_lock,
        "at": job.scheduled_at.isoformat() if job.scheduled_at is not None else None,
    }
    text = json.dumps({**head, **{name: value for name, value in more.items() if value is not None}})
    return f'{text[:-1]},"args":{dumps(job.args)}}}'


def _defer_periodic(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    job = procrastinate_types.JobToDefer(
        queue_name=arguments["queue"],
        task_name=arguments["task_name"],
        priority=arguments["priority"],
        lock=arguments["lock"],
        queueing_lock=arguments["queueing_lock"],
        args=arguments["args"],
        scheduled_at=None,
    )
    name = schedule_name(arguments["task_name"], arguments["periodic_id"])
    return Statement(
        "select jobqueue.procrastinate_defer_periodic(%s, %s, %s::text::jsonb) as id",
        (name, arguments["defer_timestamp"], _job(job, dumps)),
    )


def _finish(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    end = ending(arguments["status"], delete=arguments["delete_job"] or None)
    return Statement("select jobqueue.procrastinate_finish(%s, %s::jsonb)", (job_uuid(arguments["job_id"]), end))


def bounded(at: datetime | None) -> datetime | None:
    """Return when to try again: a wait that has grown beyond what a date can hold becomes 30 days, not for ever.

    procrastinate says the year 9999 in that case, since 3.10.
    """
    return datetime.now(UTC) + LONGEST_WAIT if at is not None and at.year >= 9999 else at


def retry_end(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end of an attempt that a retry_job query means."""
    return end_of(
        "retry",
        at=bounded(arguments["retry_at"]),
        priority=arguments["new_priority"],
        queue=arguments["new_queue_name"],
        lock=arguments["new_lock"],
    )


def _retry(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    end = json.dumps(retry_end(arguments))
    return Statement("select jobqueue.procrastinate_finish(%s, %s::jsonb)", (job_uuid(arguments["job_id"]), end))


def _cancel(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    parameters = (job_uuid(arguments["job_id"]), bool(arguments["abort"]), bool(arguments["delete_job"]))
    return Statement("select jobqueue.procrastinate_cancel(%s, %s, %s) as id", parameters)


def _status(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    return Statement(
        "select status from jobqueue.procrastinate_job_status(%s) status", (job_uuid(arguments["job_id"]),)
    )


def _list_jobs(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    id, worker = arguments["id"], arguments["worker_id"]
    parameters = (
        None if id is None else job_uuid(id),
        *(arguments[name] for name in ("queue_name", "task_name", "status", "lock", "queueing_lock")),
        None if worker is None else job_uuid(worker),
    )
    query: LiteralString = f"select {JOB_COLUMNS} from jobqueue.procrastinate_jobs(%s, %s, %s, %s, %s, %s, %s)"  # noqa: S608
    return Statement(query, parameters)


def _counts(by: str) -> Callable[[Mapping[str, Any], Dumps], Statement]:
    def statement(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
        filters = tuple(arguments.get(name) for name in ("queue_name", "task_name", "status", "lock"))
        query: LiteralString = "select name, jobs_count, stats from jobqueue.procrastinate_counts(%s, %s, %s, %s, %s)"
        if by == "lock":
            # a sum there, so that it comes as a Decimal
            query = query.replace("jobs_count", "jobs_count::numeric")
        return Statement(query, (by, *filters))

    return statement


def _count_statuses(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    return Statement(
        "select jobs_count as count, name as status"
        " from jobqueue.procrastinate_counts('status', null, null, null, null)"
    )


def _stalled(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    query: LiteralString = f"select {JOB_COLUMNS} from jobqueue.procrastinate_stalled(%s::float8, %s::float8, %s, %s)"  # noqa: S608
    ages = (arguments.get("seconds_since_heartbeat"), arguments.get("nb_seconds"))
    return Statement(query, (*ages, arguments["queue"], arguments["task_name"]))


def _delete_old(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    parameters = (arguments["nb_hours"], arguments["queue"], list(arguments["statuses"]))
    return Statement("select jobqueue.procrastinate_delete_old(%s::float8, %s, %s::text[])", parameters)


def _to_abort(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    return Statement("select id from jobqueue.procrastinate_to_abort(%s) id", (arguments["queue_name"],))


def _prune(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    return Statement(
        "select worker_id from jobqueue.procrastinate_prune(%s::float8) worker_id",
        (arguments["seconds_since_heartbeat"],),
    )


def _check(arguments: Mapping[str, Any], dumps: Dumps) -> Statement:
    return Statement("select to_regclass('jobqueue.job')::text as check")


TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any], Dumps], Statement]] = {
    "defer_jobs": _defer,
    "defer_periodic_job": _defer_periodic,
    "finish_job": _finish,
    "retry_job": _retry,
    "cancel_job": _cancel,
    "get_job_status": _status,
    "list_jobs": _list_jobs,
    "list_queues": _counts("queue_name"),
    "list_tasks": _counts("task_name"),
    "list_locks": _counts("lock"),
    "count_jobs_status": _count_statuses,
    "select_stalled_jobs_by_started": _stalled,
    "select_stalled_jobs_by_heartbeat": _stalled,
    "delete_old_jobs": _delete_old,
    "list_jobs_to_abort": _to_abort,
    "prune_stalled_workers": _prune,
    "check_connection": _check,
}
"""The queries that a statement answers; the rest is answered by the worker's backstage."""
