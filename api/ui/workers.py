"""Workers: where they run, what they do now, and how to let one finish."""

from __future__ import annotations

import json

from starlette.responses import Response

from jobqueue.api.identity import ALL_TENANTS
from jobqueue.api.ui.administer import DRAIN_WORKER
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

_WORKERS = "select jobqueue.http_workers(%s, %s)"


async def show_workers(visit: Visit) -> Response:
    """List the live workers, then those that stopped within a day."""
    # An admin sees every job; and workers belong to no tenant.
    tenants = ALL_TENANTS if visit.may("admin") else visit.call.tenants
    ((text,),) = await visit.rows(_WORKERS, visit.call.services.database.role, tenants)
    workers = json.loads(text)
    return visit.render(
        "workers.html",
        live=[worker for worker in workers if worker["state"] != "stopped"],
        stopped=[worker for worker in workers if worker["state"] == "stopped"],
        drain=DRAIN_WORKER,
        refusal=DRAIN_WORKER.refusal(visit),
    )


VIEWS = (View(name="workers", path="/workers", show=show_workers, scopes=("jobs:act",), section="workers"),)
