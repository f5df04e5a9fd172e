"""Schedules: when they send, in words and as times."""

from __future__ import annotations

from starlette.responses import Response

from jobqueue.api.ui.administer import PAUSE_SCHEDULE, RESUME_SCHEDULE
from jobqueue.api.ui.expressions import in_words
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

_SCHEDULES = "select jobqueue.http_schedules(%s, %s)"


async def show_schedules(visit: Visit) -> Response:
    """List the schedules with their next three times."""
    schedules = await visit.json(_SCHEDULES)
    for schedule in schedules:
        schedule["words"] = in_words(schedule["expression"])
    return visit.render(
        "schedules.html",
        schedules=schedules,
        pause=PAUSE_SCHEDULE,
        resume=RESUME_SCHEDULE,
        refusal=PAUSE_SCHEDULE.refusal(visit),
    )


VIEWS = (View(name="schedules", path="/schedules", show=show_schedules, section="schedules"),)
