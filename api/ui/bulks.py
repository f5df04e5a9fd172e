"""Bulk operations: what was done with many jobs at once, by whom and why."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from jobqueue.api.job_state import ID
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

PER_PAGE = 50

_BULKS = "select jobqueue.http_bulks(%s, %s, %s, %s)"


async def show_bulks(visit: Visit) -> Response:
    """List the operations of the last 7 days and those under way, the newest first."""
    before = visit.query.get("before", "")
    operations = await visit.json(_BULKS, before if ID.fullmatch(before) else None, PER_PAGE + 1)
    following = operations[PER_PAGE - 1]["id"] if len(operations) > PER_PAGE else None
    for operation in operations:
        operation["meant"] = _meant(operation["filter"])
        operation["percent"] = 100 * operation["done"] // max(1, operation["total"])
    return visit.render("bulks.html", operations=operations[:PER_PAGE], following=following)


def _meant(given: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The filter as pairs of words; of jobs that were named, their number."""
    if given is None:
        return [("filter", "not kept")]
    pairs = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        text = f"{value:,} named" if name == "ids" else ", ".join(str(one) for one in values[:5])
        pairs.append((name, text + (" …" if len(values) > 5 else "")))
    return pairs


VIEWS = (View(name="bulks", path="/bulks", show=show_bulks, section="bulks"),)
