"""The first page: what needs attention, then every queue."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from jobqueue.api.ui.administer import PAUSE_QUEUE, RESUME_QUEUE
from jobqueue.api.ui.charts import sparkline
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

MOST_QUEUES = 200
"""More are not drawn: the page would take seconds; the busy ones come first."""

_OVERVIEW = "select jobqueue.http_overview(%s, %s)"
_COUNTS = ("ready", "scheduled", "blocked", "processing", "paused", "failed")
# Where a line of health() is looked into.
_PLACES = (
    ("paused: queue ", "/queues"),
    ("backlog: ", "/queues"),
    ("slow handlers: ", "/queues"),
    ("workers", "/workers"),
    ("stuck handlers", "/workers"),
    ("leases", "/workers"),
    ("slow jobs", "/jobs"),
    ("maintenance", "/system"),
    ("slow statements", "/system"),
)


async def show_overview(visit: Visit) -> Response:
    """Show what is wrong, and how all queues are doing."""
    found = await visit.json(_OVERVIEW)
    queues = sorted(found["queues"], key=lambda queue: (not _is_busy(queue), queue["name"]))
    shown = queues[:MOST_QUEUES]
    for queue in shown:
        queue["spark"] = sparkline(queue["completed_minutes"], queue["failed_minutes"])
    health = found["health"]
    for line in health or ():
        line["place"] = next((path for start, path in _PLACES if line["name"].startswith(start)), None)
    return visit.render(
        "overview.html",
        health=None if health is None else sorted(health, key=lambda line: (line["status"] != "fail", line["name"])),
        queues=shown,
        hidden=len(queues) - len(shown),
        totals={name: sum(queue[name] for queue in queues) for name in _COUNTS},
        refusal=PAUSE_QUEUE.refusal(visit),
        pause=PAUSE_QUEUE,
        resume=RESUME_QUEUE,
    )


def _is_busy(queue: dict[str, Any]) -> bool:
    """Whether anything is there, happened lately, or is paused."""
    return bool(queue["paused_at"] or queue["completed_minutes"] or any(queue[name] for name in _COUNTS))


VIEWS = (View(name="overview", path="/", show=show_overview, section="overview"),)
