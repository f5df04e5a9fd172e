"""Flows and batches: how far they are, and their jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID
from jobqueue.api.ui.rendering import STATUS_ICONS
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

MOST_JOBS = 200
MOST_OF_FLOW = 1000

_FLOW = "select jobqueue.http_flow(%s, %s, %s)"
_BATCH = "select jobqueue.http_batch(%s, %s, %s)"
_BATCH_JOBS = "select jobqueue.http_batch_jobs(%s, %s, %s, %s)"
_ENDED_WELL = {"completed", "skipped"}


async def show_groups(visit: Visit) -> Response:
    """Ask for an id: of a flow, of a job in one, or of a batch."""
    given = visit.query.get("id", "").strip()
    if ID.fullmatch(given):
        return visit.goto(f"/{'batches' if visit.query.get('kind') == 'batch' else 'flows'}/{given}")
    problem = "This is not an id." if given else None
    return visit.render("groups.html", problem=problem, given=given[:100])


async def show_flow(visit: Visit) -> Response:
    """Show the jobs of a flow, parents before their children, and what each waits for."""
    flow = await visit.json(_FLOW, _id(visit, "flow"))
    jobs = _in_order(flow["jobs"])
    return visit.render("flow.html", flow=flow, jobs=jobs, counts=_counts(flow), most=MOST_OF_FLOW)


async def show_batch(visit: Visit) -> Response:
    """Show how far a batch is, and jobs of it, those that failed first."""
    given = _id(visit, "batch")
    batch = await visit.json(_BATCH, given)
    jobs = await visit.json(_BATCH_JOBS, given, MOST_JOBS)
    return visit.render("batch.html", batch=batch, jobs=jobs, counts=_counts(batch), most=MOST_JOBS)


def _id(visit: Visit, what: str) -> str:
    given = visit.call.path["id"]
    if not ID.fullmatch(given):
        raise ApiError(f"{what.upper()}_NOT_FOUND", f"There is no such {what}.", details={"reason": "malformed_id"})
    return given


def _counts(group: dict[str, Any]) -> list[tuple[str, int]]:
    return [(status, group[status]) for status in STATUS_ICONS if group[status]]


def _in_order(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number the jobs, and name for each the numbers of those that it waits for.

    `step`: 1 without a parent here, else one more than the latest of its parents.
    """
    by_id = {job["id"]: job for job in jobs}
    steps = _steps({job["id"]: {edge["id"] for edge in job["depends_on"]} & by_id.keys() for job in jobs})
    ordered = sorted(jobs, key=lambda job: steps[job["id"]])
    for number, job in enumerate(ordered, start=1):
        job["number"], job["step"] = number, steps[job["id"]]
    for job in ordered:
        job["parents"] = [
            {
                "id": edge["id"],
                "on_failure": edge["on_failure"],
                "number": by_id[edge["id"]]["number"] if edge["id"] in by_id else None,
                "status": by_id[edge["id"]]["status"] if edge["id"] in by_id else None,
                "is_done": edge["id"] in by_id and by_id[edge["id"]]["status"] in _ENDED_WELL,
            }
            for edge in job["depends_on"]
        ]
    return ordered


def _steps(parents: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the step of each job; each edge is looked at once, for a thousand jobs may wait one for the other."""
    children: dict[str, list[str]] = {job_id: [] for job_id in parents}
    for job_id, waits_for in parents.items():
        for parent in waits_for:
            children[parent].append(job_id)
    left = {job_id: len(waits_for) for job_id, waits_for in parents.items()}
    steps = dict.fromkeys(parents, 1)
    ready = [job_id for job_id, count in left.items() if not count]
    for job_id in ready:
        for child in children[job_id]:
            steps[child] = max(steps[child], steps[job_id] + 1)
            left[child] -= 1
            if not left[child]:
                ready.append(child)
    return steps


VIEWS = (
    View(name="groups", path="/groups", show=show_groups, section="groups"),
    View(name="flow", path="/flows/{id}", show=show_flow, section="groups"),
    View(name="batch", path="/batches/{id}", show=show_batch, section="groups"),
)
