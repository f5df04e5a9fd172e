"""The list of jobs: tabs by status, a filter, a page by cursor, a selection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import psycopg
from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.events import feed_of
from jobqueue.api.job_state import ID
from jobqueue.api.lists import last_seen
from jobqueue.api.ui.filters import EXAMPLE, TABS, UNFINISHED, JobFilter, filter_of, read_box
from jobqueue.api.ui.rendering import bounded, time_of
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import READ_SECONDS, Banner, Visit

PER_PAGE = 50
WINDOW = timedelta(days=1)
"""How far a list looks back if looking through all jobs takes too long."""

FIELDS = [
    *("id", "queue", "job_type", "status", "requested_action", "tenant", "subject", "display_name"),
    *("progress_pct", "progress_message", "current_stage", "total_stages", "completed_stages", "estimated_completion"),
    *(
        "attempt",
        "retry_count",
        "max_retries",
        "run_at",
        "error_code",
        "error_message",
        "created_at",
        "completed_at",
        "alive",
    ),
]

ROW_ACTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "blocked": (("cancel", "c"),),
    "pending": (("cancel", "c"),),
    "processing": (("cancel", "c"),),
    "paused": (("resume", "r"), ("cancel", "c")),
    "failed": (("retry", "r"), ("skip", "s")),
    "cancelled": (("resume", "r"),),
}
"""What a row offers, with its key; the job's page has all actions."""

_JOBS = "select total, id::text, created_at, body, open from jobqueue.http_jobs(%s, %s, %s::jsonb, %s, %s, %s, 0, %s)"
_UNFINISHED = """\
select total, id::text, created_at, body, open from jobqueue.http_unfinished(%s, %s, %s::jsonb, %s, %s, %s, %s)"""
_STATS = "select counts, capped from jobqueue.http_stats(%s, %s, %s::jsonb)"


async def show_jobs(visit: Visit) -> Response:
    """Show a page of jobs, newest first; what was typed becomes an address."""
    wanted = filter_of(visit)
    typed, problem = visit.query.get("q", ""), None
    if typed.strip():
        try:
            found = read_box(typed)
        except ApiError as error:
            problem = f"{error} {error.details.get('hint', '')}".strip()
        else:
            if "id" in found:
                return visit.goto(f"/jobs/{found['id']}")
            return visit.goto("/jobs", **{**wanted.address, **found})
    (total, jobs, following), tabs = await asyncio.gather(_page(visit, wanted), _tabs(visit, wanted))
    return visit.render(
        "jobs.html",
        filter=wanted,
        tabs=tabs,
        jobs=jobs,
        total=total,
        following=following,
        is_first="after" not in visit.query,
        typed=typed,
        problem=problem,
        example=EXAMPLE,
        row_actions=ROW_ACTIONS,
        here=_here(wanted),
    )


def _here(wanted: JobFilter) -> str:
    """The list's own path, for the way back after an action: of the first page, so that what is new is seen."""
    return "/jobs" + (f"?{urlencode(wanted.address)}" if wanted.address else "")


# -- The page ---------------------------------------------------------------------------------------------------------


async def _page(visit: Visit, wanted: JobFilter) -> tuple[str, list[dict[str, Any]], str | None]:
    """How many there are as text (`?`: not known, `12+`: at least), the jobs, and where the list goes on."""
    conditions = wanted.conditions()
    query = _UNFINISHED if set(wanted.statuses or TABS) <= set(UNFINISHED) else _JOBS
    try:
        rows = await _read(visit, query, conditions)
    except psycopg.errors.QueryCanceled:
        rows = await _read_window(visit, query, conditions)
    if not rows:
        return bounded(None), [], None
    total = bounded(rows[0][0], is_open=rows[0][4])
    if rows[0][1] is None:
        return total, [], None
    found = [row for row in rows if row[3] is not None]
    following = None
    if (last := last_seen(rows, found, PER_PAGE)) is not None:
        _, job_id, created_at, *_ = last
        following = f"{created_at.astimezone(UTC).isoformat()}~{job_id}"
        if len(found) < PER_PAGE:
            visit.banners.append(Banner("note", _so_far(created_at)))
    return total, [_shown(json.loads(row[3])) for row in found], following


def _so_far(at: datetime) -> str:
    """What is said when a page ends because it has looked at enough."""
    return f"Looked through the jobs sent since {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC. Older looks at those before."


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "is_ahead": time_of(job["run_at"]) > datetime.now(UTC)}


async def _read(visit: Visit, query: str, conditions: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return await visit.ask(query, json.dumps(conditions), *_after(visit), PER_PAGE, FIELDS)


async def _read_window(visit: Visit, query: str, conditions: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The same of the last day only, with a banner; nothing if that takes too long as well."""
    text = f"Looking through all jobs takes longer than {READ_SECONDS:g} s. "
    since = (datetime.now(UTC) - WINDOW).isoformat()
    try:
        rows = await _read(visit, query, {"created_after": since, **conditions})
    except psycopg.errors.QueryCanceled:
        visit.banners.append(Banner("warning", text + "Narrow the list by queue: or subject:."))
        return []
    visit.banners.append(Banner("warning", text + "Shown are those sent in the last 24 hours."))
    return rows


def _after(visit: Visit) -> tuple[datetime | None, str | None]:
    """Where the list begins: behind this job. Raises ApiError (400) for what no list has given."""
    given = visit.query.get("after")
    if given is None:
        return None, None
    at, _, job_id = given.partition("~")
    try:
        after = datetime.fromisoformat(at)
    except ValueError:
        after = None
    if after is None or after.tzinfo is None or not ID.fullmatch(job_id):
        raise ApiError("CURSOR_MISMATCH", "This page of the list does not exist.", hint="Begin with the first page.")
    return after, job_id


# -- Tabs -------------------------------------------------------------------------------------------------------------


async def _tabs(visit: Visit, wanted: JobFilter) -> list[dict[str, Any]]:
    """The tabs with their counts: `12`, `12+` where not all jobs were counted, `?` if counting took too long."""
    counts = await _counts(visit, wanted)
    return [
        {
            "name": name,
            "url": visit.url("/jobs", **JobFilter(name, wanted.given).address),
            "count": _count(counts, name),
            "is_current": name == wanted.tab,
        }
        for name in TABS
    ]


def _count(counts: Mapping[str, Any] | None, name: str) -> str:
    if counts is None:
        return "?"
    statuses = {"unfinished": UNFINISHED, "all": ["total"]}.get(name, [name])
    return f"{sum(counts[status] for status in statuses):,}" + ("+" if counts["capped"] else "")


async def _counts(visit: Visit, wanted: JobFilter) -> Mapping[str, Any] | None:
    conditions = wanted.conditions(with_status=False)
    if not conditions:
        return await summary_of(visit)
    rows = await visit.ask_if_quick(_STATS, json.dumps(conditions), missing="The number of jobs by status")
    return None if rows is None else {**json.loads(rows[0][0]), "capped": rows[0][1]}


async def summary_of(visit: Visit) -> dict[str, Any] | None:
    """Return the counts by status, and of stages, of all that the visit sees; made once for all who look."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            text = await feed_of(visit.call).summary(visit.call.tenants)
    except (TimeoutError, psycopg.errors.QueryCanceled):
        visit.banners.append(Banner("warning", "The number of jobs by status is not shown: counting takes too long."))
        return None
    found: dict[str, Any] = json.loads(text)
    return found


VIEWS = (View(name="jobs", path="/jobs", show=show_jobs, section="jobs"),)
