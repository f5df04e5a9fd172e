"""The inbox of failures: what goes wrong, how often, and one action for all jobs of a kind."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.ui.confirming import Confirmation
from jobqueue.api.ui.forms import Form, first
from jobqueue.api.ui.rendering import DONE
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

MOST_JOBS = 10_000
"""Failed jobs that are looked at, the newest; shared among the queues."""
MOST_GROUPS = 200
TYPED_ABOVE = 100
"""With more jobs the number has to be typed."""
DRY_RUN_SECONDS = 10.0
DONE_AT_ONCE = 500
"""More jobs are worked off in portions (sql/functions/http_bulk.sql)."""

_FILTERS = ("queue", "tenant", "job_type", "error_class")
_NAMED = ("job_type", "error_class", "fingerprint")
_INBOX = "select jobqueue.http_failures(%s, %s, %s::jsonb, %s, %s)"
_BULK = "select jobqueue.http_failure_bulk(%s, %s, %s, %s::jsonb, %s)"
_ACTIONS = {
    "retry": "They run again at once, each with its partial progress.",
    "skip": "What waits for them goes on without.",
}

DONE.update(
    failures_retry="The jobs of this group will be tried again.",
    failures_skip="The jobs of this group were skipped.",
)


async def show_failures(visit: Visit) -> Response:
    """Show the groups, that which happened last first."""
    wanted = _wanted(visit, _FILTERS)
    inbox = await visit.json(_INBOX, json.dumps(wanted), MOST_JOBS, MOST_GROUPS)
    groups = inbox["groups"]
    for group in groups:
        named: dict[str, str] = {name: group[name] for name in _NAMED}
        group["query"] = named | {name: wanted[name] for name in ("queue", "tenant") if name in wanted}
    return visit.render(
        "failures.html",
        groups=groups,
        capped=inbox["capped"],
        wanted=wanted,
        most=MOST_JOBS,
        full=len(groups) == MOST_GROUPS,
        refusal=visit.refusal("jobs:act"),
    )


async def ask_group(visit: Visit) -> Response:
    """Say how many jobs an action means, and ask for the reason."""
    return (await _question(visit)).show(visit)


async def act_on_group(visit: Visit) -> Response:
    """Do it with all jobs of the group."""
    form = await visit.form()
    expected = first(form, "expected_count")
    total = int(expected) if expected.isascii() and expected.isdigit() and len(expected) < 8 else 0

    async def act(reason: str, form: Form) -> None:
        if total > TYPED_ABOVE and first(form, "typed").replace(",", "").strip() != str(total):
            raise ApiError("INVALID_ARGUMENT", f"Type the number of jobs, {total:,}, to confirm.")
        body = {**_body(visit), "reason": reason, "expected_count": total}
        await visit.do(_BULK, visit.actor, json.dumps(body), MOST_JOBS)

    question = await _question(visit)
    done = f"failures_{_action(visit)}" if total <= DONE_AT_ONCE else "bulk_begun"
    return await question.carry_out(visit, act, done, form)


async def _question(visit: Visit) -> Confirmation:
    action, body = _action(visit), _body(visit)
    asked = json.dumps({**body, "reason": "dry run", "dry_run": True})
    ((text,),) = await visit.ask(_BULK, visit.actor, asked, MOST_JOBS, seconds=DRY_RUN_SECONDS)
    found = json.loads(text)
    jobs = f"{found['total']:,} {'job' if found['total'] == 1 else 'jobs'}"
    query = {name: body[name] for name in (*_NAMED, "queue", "tenant") if name in body}
    return Confirmation(
        title=f"{action.capitalize()} {jobs} that failed",
        about=_ACTIONS[action],
        label=f"{action.capitalize()} {jobs}",
        path=f"/failures/{action}?{urlencode(query)}",
        back="/failures",
        template="failures_confirm.html",
        values={"group": body, "found": found, "action": action, "typed": found["total"] > TYPED_ABOVE},
    )


def _body(visit: Visit) -> dict[str, Any]:
    body = _wanted(visit, (*_NAMED, "queue", "tenant"))
    if not all(name in body for name in _NAMED):
        raise ApiError("NOT_FOUND", "There is no such group of failures.", hint="Begin at the inbox.")
    if "tenant" not in body and visit.call.principal.only_tenant is not None:
        body["tenant"] = visit.call.principal.only_tenant
    return {**body, "action": _action(visit)}


def _action(visit: Visit) -> str:
    action = visit.call.path["action"]
    if action not in _ACTIONS:
        raise ApiError("NOT_FOUND", "There is no such action.", hint="It is retry or skip.")
    return action


def _wanted(visit: Visit, names: tuple[str, ...]) -> dict[str, str]:
    return {name: visit.query[name][:500] for name in names if visit.query.get(name)}


VIEWS = (
    View(name="failures", path="/failures", show=show_failures, section="failures"),
    View(
        name="failures: all of a group",
        path="/failures/{action}",
        show=ask_group,
        act=act_on_group,
        scopes=("jobs:act",),
        section="failures",
    ),
)
