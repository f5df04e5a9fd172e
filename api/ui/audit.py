"""The audit: who did what, when and why, by whatever way."""

from __future__ import annotations

import json

from starlette.responses import Response

from jobqueue.api.job_state import ID
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

PER_PAGE = 50

_AUDIT = "select id, line from jobqueue.http_audit(%s, %s, %s::jsonb, %s, %s, %s)"
_FILTERS = ("action", "target", "actor", "job_id")


async def show_audit(visit: Visit) -> Response:
    """List the actions, the newest first."""
    wanted = {name: visit.query[name].strip()[:200] for name in _FILTERS if visit.query.get(name, "").strip()}
    problem = None
    if "job_id" in wanted and not ID.fullmatch(wanted["job_id"]):
        problem = "This is not the id of a job."
    before = visit.query.get("before", "")
    after = int(before) if before.isascii() and before.isdigit() and len(before) < 19 else None
    rows = [] if problem else await visit.ask(_AUDIT, json.dumps(wanted), after, PER_PAGE + 1, visit.sees_traces)
    return visit.render(
        "audit.html",
        lines=[json.loads(line) for _, line in rows[:PER_PAGE]],
        following=rows[PER_PAGE - 1][0] if len(rows) > PER_PAGE else None,
        wanted={name: wanted.get(name, "") for name in _FILTERS},
        problem=problem,
    )


VIEWS = (View(name="audit", path="/audit", show=show_audit, section="audit"),)
