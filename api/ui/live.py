"""`/ui/live`: the signals of GET /events for a page that is open, under the rights of who looks at it."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import Response

from jobqueue.api.events import tenant_stream
from jobqueue.api.identity import Principal
from jobqueue.api.ui.endpoint import identify
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit


async def show_live(visit: Visit) -> Response:
    """Stream what changes, until the session or its rights end."""
    services = visit.call.services

    async def again(connection: HTTPConnection) -> Principal | None:
        return await identify(services, connection)

    visit.call.scope["jobqueue.identify"] = again
    return await tenant_stream(visit.call)


VIEWS = (View(name="live", path="/live", show=show_live),)
