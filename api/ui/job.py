"""One job: what it is, why it does not run, what has happened, what can be done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from psycopg import AsyncConnection
from starlette.responses import Response

from jobqueue.api.job_state import FIELDS, job_id_of, job_not_found
from jobqueue.api.ui.actions import ACTIONS
from jobqueue.api.ui.rendering import time_of
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

LONGEST_VALUE = 65_536
"""Characters of a value that are shown; the rest is read by the API."""
MOST_ROWS = 100
"""Stages, attempts and lines of the audit that are shown: 10,000 stages took 1.3 s, in which nobody else was answered."""
MOST_TRACES = 10
"""Of the latest attempts; each has up to 64 kB."""
LARGE_VALUE = 1_000_000
"""Bytes (compressed) from which on a value is not even looked at."""
LAID_OUT = 262_144
"""Characters up to which a value is laid out: 2 MB of zeros in a hundred brackets became 300 MB in the server."""
VALUES = ("payload", "result", "stats", "metadata")
KEYS: Mapping[str, str] = {"retry": "r", "resume": "r", "cancel": "c", "skip": "s"}

_LIMITS = (LAID_OUT, LONGEST_VALUE, LARGE_VALUE)
_FIELDS = [name for name in FIELDS if name not in {*VALUES, "links"}]
_JOB = "select version, body from jobqueue.http_job(%s, %s, %s, null, %s, null, false)"
# those around the first that is not done
_STAGES = """\
with stage as (
    select row_number() over (order by x.position) as number, x.name, x.status, x.started_at, x.completed_at, x.error
    from jobqueue.stages x
    where x.job_id = %s),
here as (
    select count(*) as total, count(*) filter (where s.status in ('completed', 'skipped')) as done,
        min(s.number) filter (where s.status not in ('completed', 'skipped')) as open
    from stage s)
select row_to_json(r)
from (
    select s.*, h.total, h.done
    from stage s
    cross join here h
    where s.number > least(h.open - 10, h.total - %s)
    order by s.number
    limit %s) r"""
_ATTEMPTS = """\
select row_to_json(r)
from (
    select t.attempt, t.outcome, t.started_at, t.ended_at, t.error_class, t.error_code, t.error_message, t.next_run_at,
        count(*) over () as total,
        case when %s and row_number() over (order by t.attempt desc) <= %s then t.error_detail end as error_detail
    from jobqueue.attempts t
    where t.job_id = %s
    order by t.attempt desc
    limit %s) r"""
_HISTORY = "select jobqueue.http_history(%s, %s, %s, %s, %s)"
# jsonb_pretty: numbers stay as they were sent, however large
_VALUES = """\
select x.name, pg_column_size(x.value), left(case when length(t.plain) <= %s then jsonb_pretty(x.value) else t.plain end, %s)
from jobqueue.jobs j
cross join lateral (
    values ('payload', j.payload), ('result', j.result), ('stats', j.stats), ('metadata', j.metadata)) x (name, value)
cross join lateral (select case when pg_column_size(x.value) < %s then x.value::text end as plain offset 0) t
where j.id = %s"""
_CHECKPOINT = """\
select c.attempt, c.stage, c.reference, c.hash, c.pause_safe, c.created_at, pg_column_size(c.data),
    left(case when length(t.plain) <= %s then jsonb_pretty(c.data) else t.plain end, %s)
from jobqueue.checkpoints c
cross join lateral (select case when pg_column_size(c.data) < %s then c.data::text end as plain offset 0) t
where c.job_id = %s
order by c.id desc
limit 1"""
_PARENTS = "select id::text, status, display_name, job_type, on_failure from jobqueue.parents(%s) limit 100"
_CHILDREN = "select id::text, status, display_name, job_type, on_failure from jobqueue.children(%s) limit 100"
_FLOW = "select m.flow_id::text from jobqueue.flow_member m where m.job_id = %s"
_DEAD_LETTERS = (
    "select j.id::text, j.status, j.queue from jobqueue.jobs j where j.dead_letter_of = %s order by j.id limit 10"
)


@dataclass(frozen=True, slots=True)
class Value:
    """A JSON value as it is shown: `text` is None if it is too large, `cut` if it is not all."""

    name: str
    size: int | None
    text: str | None

    @property
    def cut(self) -> bool:
        """Whether there is more than is shown."""
        return self.text is not None and len(self.text) >= LONGEST_VALUE


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened; `at` in the future is what is expected."""

    at: datetime
    what: str
    detail: str = ""

    @property
    def is_past(self) -> bool:
        """Whether it has happened."""
        return self.at <= datetime.now(UTC)


async def show_job(visit: Visit) -> Response:
    """Show a job."""
    job_id = job_id_of(visit.call)
    found = await visit.call.services.database.reading(lambda: _read(visit, job_id))
    job = found["job"]
    return visit.render(
        "job.html",
        moments=timeline(job, found["attempts"], found["audit"]),
        actions=[(name, job["refused_actions"].get(name)) for name in ACTIONS],
        keys=KEYS,
        origin=_origin(visit),
        **found,
    )


async def _read(visit: Visit, job_id: str) -> dict[str, Any]:
    """All that the page shows, as of one look. Raises ApiError (404)."""
    async with visit.reading() as connection:
        return {
            "job": await _job(visit, connection, job_id),
            "stages": await _objects(connection, _STAGES, (job_id, MOST_ROWS, MOST_ROWS)),
            "attempts": await _objects(connection, _ATTEMPTS, (visit.sees_traces, MOST_TRACES, job_id, MOST_ROWS)),
            "audit": (await _history(visit, connection, job_id, "audit"))[-MOST_ROWS:],
            "reasons": await _history(visit, connection, job_id, "explain"),
            "values": await _values(connection, job_id),
            "checkpoint": await _one(connection, _CHECKPOINT, (*_LIMITS, job_id)),
            "parents": await _rows(connection, _PARENTS, (job_id,)),
            "children": await _rows(connection, _CHILDREN, (job_id,)),
            "flow": await _one(connection, _FLOW, (job_id,)),
            "dead_letters": await _rows(connection, _DEAD_LETTERS, (job_id,)),
        }


async def _job(visit: Visit, connection: AsyncConnection[Any], job_id: str) -> dict[str, Any]:
    row = await _one(connection, _JOB, (*visit.context, job_id, _FIELDS))
    if row is None or row[0] is None:
        raise job_not_found(job_id)
    found: dict[str, Any] = json.loads(row[1])
    return found


async def _history(visit: Visit, connection: AsyncConnection[Any], job_id: str, what: str) -> list[dict[str, Any]]:
    row = await _one(connection, _HISTORY, (*visit.context, job_id, what, visit.sees_traces))
    found: list[dict[str, Any]] = json.loads(row[0]) if row is not None and row[0] is not None else []
    return found


async def _values(connection: AsyncConnection[Any], job_id: str) -> list[Value]:
    rows = await _rows(connection, _VALUES, (*_LIMITS, job_id))
    return [Value(*row) for row in rows if row[1] is not None]


async def _objects(connection: AsyncConnection[Any], query: str, parameters: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [row for (row,) in await _rows(connection, query, parameters)]


async def _rows(connection: AsyncConnection[Any], query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query.encode(), parameters)).fetchall()


async def _one(connection: AsyncConnection[Any], query: str, parameters: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = await _rows(connection, query, parameters)
    return rows[0] if rows else None


def timeline(job: Mapping[str, Any], attempts: list[dict[str, Any]], audit: list[dict[str, Any]]) -> list[Moment]:
    """Return what has happened to a job, and what is expected, in the order of time."""
    moments = [Moment(time_of(job["created_at"]), "sent", job["created_by"] or "")]
    for attempt in attempts:
        number = f"attempt {attempt['attempt']}"
        if attempt["started_at"]:
            moments.append(Moment(time_of(attempt["started_at"]), f"{number} began"))
        if attempt["ended_at"]:
            outcome = attempt["outcome"].replace("_", " ")
            moments.append(Moment(time_of(attempt["ended_at"]), f"{number}: {outcome}", attempt["error_code"] or ""))
    for line in audit:
        who = line["actor"] or line["session_user_name"] or ""
        words = f"{line['action'].replace('_', ' ')}: {line['reason']}"
        moments.append(Moment(time_of(line["at"]), words, who))
    if job["status"] == "pending" and time_of(job["run_at"]) > datetime.now(UTC):
        moments.append(Moment(time_of(job["run_at"]), "may run"))
    if job["estimated_completion"] and not job["done"] and time_of(job["estimated_completion"]) > datetime.now(UTC):
        moments.append(Moment(time_of(job["estimated_completion"]), "expected end"))
    return sorted(moments, key=lambda moment: moment.at)


def _origin(visit: Visit) -> str:
    """Scheme and host as the browser has them, for examples to copy."""
    return f"{visit.call.scope['scheme']}://{visit.call.header(b'host') or 'localhost'}"


VIEWS = (View(name="job", path="/jobs/{id}", show=show_job, section="jobs"),)
