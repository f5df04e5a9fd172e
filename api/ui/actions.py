"""What can be done with one job: a page for each action, `/jobs/{id}/retry`, that asks why and does it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import job_id_of, job_not_found
from jobqueue.api.ui.confirming import Confirmation
from jobqueue.api.ui.forms import Form, first, own_path
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

ACTIONS: Mapping[str, str] = {
    "retry": "It runs again at once, with what it has done so far.",
    "restart": "It runs again from its beginning: checkpoint, done keys and the outputs of its stages are dropped.",
    "cancel": "It ends as cancelled. A running one is stopped by its worker, which may take some seconds.",
    "pause": "It waits until somebody resumes it. A running one stops at its next pause-safe checkpoint.",
    "resume": "It goes on where it stopped.",
    "skip": "It stays undone, and jobs that wait for it go on without it.",
    "run_now": "It does not wait for its time any more.",
    "prioritize": "Jobs with a higher priority are claimed first.",
    "delete": "The job and its history are gone for good; the audit keeps that it was deleted, and why.",
}
"""The actions of jobqueue.actions(), with what each of them means."""

LEAST_PRIORITY, MOST_PRIORITY = -2_147_483_646, 2_147_483_647

_JOB = "select version, body from jobqueue.http_job(%s, %s, %s, null, %s, null, false)"
_ACT = "select status from jobqueue.http_act(%s, %s, %s, %s, %s, %s::jsonb)"
_DELETE = "select jobqueue.http_delete(%s, %s, %s, %s, %s)"
_FIELDS = ["id", "display_name", "job_type", "status", "priority", "allowed_actions", "refused_actions"]


async def ask(visit: Visit) -> Response:
    """Ask for a reason; an action that is not allowed now says why."""
    job = await _job(visit)
    return _confirmation(visit, job).show(visit)


async def act(visit: Visit) -> Response:
    """Do the action."""
    job = await _job(visit)
    form = await visit.form()
    action = visit.call.path["action"]
    page = _confirmation(visit, job, first(form, "back"))
    return await page.carry_out(visit, _doing(visit, job["id"], action), action, form)


def _doing(visit: Visit, job_id: str, action: str) -> Callable[[str, Form], Awaitable[Any]]:
    async def do(reason: str, form: Form) -> None:
        if action == "delete":
            await visit.do(_DELETE, visit.actor, job_id, reason)
            return
        options: dict[str, Any] = {"reason": reason}
        function = action
        if action == "restart":
            function, options["from_start"] = "retry", True
        elif action == "cancel":
            options["force"] = bool(first(form, "force"))
        elif action == "prioritize":
            function, options["priority"] = "change", _priority(first(form, "priority"))
        await visit.do(_ACT, visit.actor, job_id, function, json.dumps(options))

    return do


def _priority(text: str) -> int:
    """The number that was typed. Raises ApiError (422)."""
    try:
        value = int(text.strip()[:20])
    except ValueError:
        value = MOST_PRIORITY + 1
    if not LEAST_PRIORITY <= value <= MOST_PRIORITY:
        raise ApiError("INVALID_ARGUMENT", "The priority must be a whole number; 0 is usual, higher ones run first.")
    return value


async def _job(visit: Visit) -> dict[str, Any]:
    action = visit.call.path["action"]
    if action not in ACTIONS:
        raise ApiError("NOT_FOUND", "There is no such action.", hint=f"There are: {', '.join(ACTIONS)}.")
    job_id = job_id_of(visit.call)
    ((version, body),) = await visit.ask(_JOB, job_id, _FIELDS)
    if version is None:
        raise job_not_found(job_id)
    found: dict[str, Any] = json.loads(body)
    return found


def _confirmation(visit: Visit, job: Mapping[str, Any], back: str | None = None) -> Confirmation:
    action = visit.call.path["action"]
    name = job["display_name"] or job["job_type"]
    after = f"/jobs/{job['id']}"
    asked = back or visit.query.get("back")
    returns = own_path(asked) if asked else after
    if action == "delete" and returns == after:
        returns = "/jobs"
    return Confirmation(
        title=f"{action.replace('_', ' ').capitalize()}: {name}",
        about=ACTIONS[action],
        label=action.replace("_", " ").capitalize(),
        path=f"{after}/{action}",
        back=returns,
        template="action.html",
        values={"job": job, "action": action, "refused": job["refused_actions"].get(action)},
    )


VIEWS = (
    View(
        name="act",
        path="/jobs/{id}/{action}",
        show=ask,
        act=act,
        scopes=("jobs:act",),
        act_scopes=("jobs:act",),
        section="jobs",
    ),
)
