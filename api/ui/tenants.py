"""The page of one tenant: what it is waiting for, and what went wrong; for a link from the application that knows it."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

MOST_CARDS = 50

_PAGE = "select jobqueue.http_tenant_page(%s, %s, %s, %s)"


async def show_tenant(visit: Visit) -> Response:
    """Show a banner, the jobs under way, and the failed ones with what can be done."""
    page = await visit.json(_PAGE, visit.call.tenant, MOST_CARDS)
    return visit.render("tenant.html", tenant=visit.call.tenant, page=page, things=things(page), most=MOST_CARDS)


def things(page: dict[str, Any]) -> str:
    """Return what the unfinished jobs are about: `3 documents` if all subjects say so (`document:42`), else `3 jobs`."""
    count = page["unfinished"]
    same = len(page["subjects"]) == 1 and page["named"] == count
    thing = page["subjects"][0].replace("_", " ") if same else "job"
    return f"{count:,} {thing}" + ("" if count == 1 else "es" if thing.endswith(("s", "x")) else "s")


VIEWS = (View(name="tenant", path="/t/{tenant:path}", show=show_tenant, section="tenant"),)
