"""All pages of the dashboard, put together."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from jobqueue.api.context import Services
from jobqueue.api.errors import ApiError
from jobqueue.api.ui import (
    actions,
    administer,
    audit,
    bulk,
    bulks,
    failures,
    groups,
    job,
    jobs,
    live,
    login,
    overview,
    queues,
    schedules,
    system,
    tenants,
    workers,
)
from jobqueue.api.ui.assets import Static
from jobqueue.api.ui.endpoint import ViewEndpoint
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit


async def _nothing(visit: Visit) -> Response:
    raise ApiError("NOT_FOUND", "There is no such page.", hint="Begin at the list of jobs.")


VIEWS: tuple[View, ...] = (
    *login.VIEWS,
    *live.VIEWS,
    *bulk.VIEWS,
    *jobs.VIEWS,
    *job.VIEWS,
    *actions.VIEWS,
    *overview.VIEWS,
    *failures.VIEWS,
    *queues.VIEWS,
    *workers.VIEWS,
    *schedules.VIEWS,
    *groups.VIEWS,
    *bulks.VIEWS,
    *audit.VIEWS,
    *system.VIEWS,
    *tenants.VIEWS,
    *administer.VIEWS,
    View(name="nothing", path="/{rest:path}", show=_nothing, act=_nothing, scopes=(), act_scopes=()),
)
"""In the order in which paths are tried: the last one takes what is left."""


def routes(services: Services) -> list[BaseRoute]:
    """Return the routes of the dashboard, for all methods, under the API's prefix."""
    base = services.settings.api_prefix + "/ui"

    async def to_the_front(request: Request) -> Response:
        return RedirectResponse(request.scope.get("root_path", "") + base + "/", 307)

    return [
        Route(base, to_the_front, methods=["GET"]),
        Route(base + "/static/{hash}/{name:path}", Static()),
        *(Route(base + view.path, ViewEndpoint(services, view)) for view in VIEWS),
    ]
