"""One action on many jobs: `/bulk?action=retry&id=…`, or `everything=1` with the filter of a list. First a dry run, then a
reason and, for more than 100 jobs, their number typed, so that nobody cancels twelve thousand jobs by a slip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from jobqueue.api.errors import ApiError, to_api_error
from jobqueue.api.job_state import ID
from jobqueue.api.ui.filters import PARAMETERS, filter_of
from jobqueue.api.ui.forms import Form, first, own_path
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

ACTIONS = ("retry", "restart", "cancel", "skip", "pause", "resume", "run_now", "delete")
TYPED_FROM = 100
"""With more jobs than this their number has to be typed."""
MOST_IDS = 1_000
SAMPLES = 3
DRY_RUN_SECONDS = 10.0
"""A dry run looks at each job; somebody waits for it, once."""
LONGEST_REASON = 2000

_BULK = "select body from jobqueue.http_bulk(%s, %s, %s, %s::jsonb, '', null, null)"
_SAMPLES = "select body from jobqueue.http_jobs(%s, %s, %s::jsonb, null, null, %s, 0, %s)"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked: an action, and which jobs. `fields`: the same, as a form sends it again."""

    action: str
    jobs: Mapping[str, Any]
    fields: tuple[tuple[str, str], ...]
    back: str


async def ask(visit: Visit) -> Response:
    """Say what would be done."""
    given: Form = {name: [value] for name, value in visit.query.items()}
    given["id"] = visit.query_list("id")
    return await _show(visit, _asked(visit, given))


async def act(visit: Visit) -> Response:
    """Do it."""
    form = await visit.form()
    asked = _asked(visit, form)
    reason = first(form, "reason").strip()
    expected = first(form, "expected")
    if not 0 < len(reason) <= LONGEST_REASON:
        return await _show(visit, asked, "Give a reason: 1 to 2,000 characters.", reason[:LONGEST_REASON], 422)
    if not expected.isascii() or not expected.isdigit() or len(expected) > 9:
        return await _show(visit, asked, "Look at what would be done first.", reason, 422)
    if int(expected) > TYPED_FROM and first(form, "typed").replace(",", "").strip() != expected:
        return await _show(visit, asked, f"Type the number of jobs, {int(expected):,}, to go on.", reason, 422)
    body = {"action": asked.action, "filter": asked.jobs, "reason": reason, "expected_count": int(expected)}
    try:
        ((text,),) = await visit.do(_BULK, visit.actor, json.dumps(body))
    except Exception as error:
        found = to_api_error(error, visit.call.request_id)
        if found.status >= 500:
            raise
        return await _show(visit, asked, f"{found} {found.details.get('hint', '')}".strip(), reason, found.status)
    operation = json.loads(text)
    counts = ",".join(f"{outcome}:{count}" for outcome, count in operation["counts"].items())
    done = "bulk_begun" if operation["ended_at"] is None else "bulk" if counts else "bulk_none"
    return visit.goto(asked.back, done=done, counts=counts)


async def _show(
    visit: Visit, asked: Asked, problem: str | None = None, reason: str = "", status: int = 200
) -> Response:
    """The page, with a new dry run."""
    body = {"action": asked.action, "filter": asked.jobs, "reason": "dry run", "dry_run": True}
    ((text,),) = await visit.ask(_BULK, visit.actor, json.dumps(body), seconds=DRY_RUN_SECONDS)
    dry_run = json.loads(text)
    rows = await visit.ask(_SAMPLES, json.dumps(asked.jobs), SAMPLES, ["id", "display_name", "job_type", "status"])
    samples = [json.loads(found) for (found,) in rows[:SAMPLES] if found is not None]
    return visit.render(
        "bulk.html",
        status,
        asked=asked,
        total=dry_run["total"],
        counts=dry_run["counts"],
        samples=samples,
        must_type=dry_run["total"] > TYPED_FROM,
        problem=problem,
        reason=reason,
    )


def _asked(visit: Visit, given: Form) -> Asked:
    """Read what is asked. Raises ApiError (404, 422, 403)."""
    action = first(given, "action")
    if action not in ACTIONS:
        raise ApiError("INVALID_ARGUMENT", "There is no such action.", hint=f"There are: {', '.join(ACTIONS)}.")
    back = own_path(first(given, "back") or "/jobs")
    ids = given.get("id", [])
    if ids and not first(given, "everything"):
        if len(ids) > MOST_IDS or not all(ID.fullmatch(one) for one in ids):
            raise ApiError("INVALID_ARGUMENT", f"At most {MOST_IDS:,} jobs can be named, by their ids.")
        wanted: dict[str, Any] = {"ids": [one.lower() for one in ids]}
        fields = tuple(("id", one) for one in ids)
    else:
        wanted, fields = _by_filter(visit, given)
    if visit.call.principal.only_tenant is not None:
        wanted["tenant"] = visit.call.principal.only_tenant
    return Asked(action, wanted, fields, back)


def _by_filter(visit: Visit, given: Form) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """The jobs of a list's filter. All jobs are never meant: without a status or another condition it is refused."""
    if not first(given, "everything"):
        raise ApiError("INVALID_ARGUMENT", "No job is selected.", hint="Tick some, or all that match.")
    pairs = [(name, first(given, name)) for name in PARAMETERS if first(given, name)]
    shown = filter_of(visit.of_query(dict(pairs)))
    conditions = shown.conditions()
    if not conditions:
        raise ApiError("INVALID_ARGUMENT", "Not all jobs there are can be meant.", hint="Choose a status, or a filter.")
    return conditions, (*pairs, ("everything", "1"))


VIEWS = (View(name="bulk", path="/bulk", show=ask, act=act, scopes=("jobs:act",), section="jobs"),)
