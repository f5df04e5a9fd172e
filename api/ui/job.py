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
LARGE_VALUE = 1_000_000
"""Bytes (compressed) from which on a value is not even laid out."""
VALUES = ("payload", "result", "stats", "metadata")
KEYS: Mapping[str, str] = {"retry": "r", "resume": "r", "cancel": "c", "skip": "s"}

_FIELDS = [name for name in FIELDS if name not in {*VALUES, "links"}]
_JOB = "select version, body from jobqueue.http_job(%s, %s, %s, null, %s, %s, %s)"
_HISTORY = "select jobqueue.http_history(%s, %s, %s, %s, %s)"
# jsonb_pretty: numbers stay as they were sent, however large
_VALUES = """\
select x.name, pg_column_size(x.value), left(case when pg_column_size(x.value) < %s then jsonb_pretty(x.value) end, %s)
from jobqueue.jobs j
cross join lateral (
    values ('payload', j.payload), ('result', j.result), ('stats', j.stats), ('metadata', j.metadata)) x (name, value)
where j.id = %s"""
_CHECKPOINT = """\
select c.attempt, c.stage, c.reference, c.hash, c.pause_safe, c.created_at, pg_column_size(c.data),
    left(case when pg_column_size(c.data) < %s then jsonb_pretty(c.data) end, %s)
from jobqueue.checkpoints c
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
    job, audit = found["job"], found["audit"]
    return visit.render(
        "job.html",
        moments=timeline(job, audit),
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
            "audit": await _history(visit, connection, job_id, "audit"),
            "reasons": await _history(visit, connection, job_id, "explain"),
            "values": await _values(connection, job_id),
            "checkpoint": await _one(connection, _CHECKPOINT, (LARGE_VALUE, LONGEST_VALUE, job_id)),
            "parents": await _rows(connection, _PARENTS, (job_id,)),
            "children": await _rows(connection, _CHILDREN, (job_id,)),
            "flow": await _one(connection, _FLOW, (job_id,)),
            "dead_letters": await _rows(connection, _DEAD_LETTERS, (job_id,)),
        }


async def _job(visit: Visit, connection: AsyncConnection[Any], job_id: str) -> dict[str, Any]:
    parameters = (*visit.context, job_id, _FIELDS, ["stages", "attempts"], visit.sees_traces)
    row = await _one(connection, _JOB, parameters)
    if row is None or row[0] is None:
        raise job_not_found(job_id)
    found: dict[str, Any] = json.loads(row[1])
    return found


async def _history(visit: Visit, connection: AsyncConnection[Any], job_id: str, what: str) -> list[dict[str, Any]]:
    row = await _one(connection, _HISTORY, (*visit.context, job_id, what, visit.sees_traces))
    found: list[dict[str, Any]] = json.loads(row[0]) if row is not None and row[0] is not None else []
    return found


async def _values(connection: AsyncConnection[Any], job_id: str) -> list[Value]:
    rows = await _rows(connection, _VALUES, (LARGE_VALUE, LONGEST_VALUE, job_id))
    return [Value(*row) for row in rows if row[1] is not None]


async def _rows(connection: AsyncConnection[Any], query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query.encode(), parameters)).fetchall()


async def _one(connection: AsyncConnection[Any], query: str, parameters: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = await _rows(connection, query, parameters)
    return rows[0] if rows else None


def timeline(job: Mapping[str, Any], audit: list[dict[str, Any]]) -> list[Moment]:
    """Return what has happened to a job, and what is expected, in the order of time."""
    moments = [Moment(time_of(job["created_at"]), "sent", job["created_by"] or "")]
    for attempt in job["attempts"]:
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
