"""The system: the database's health, the sizes of its tables, and the settings in use."""

from __future__ import annotations

import json

from starlette.responses import Response

from jobqueue.api.identity import ALL_TENANTS
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit
from jobqueue.settings import describe, variable_of

_SYSTEM = "select jobqueue.http_system(%s, %s)"
_ORDER = {"fail": 0, "warn": 1, "ok": 2}


async def show_system(visit: Visit) -> Response:
    """Show what doctor() says, how large everything is, and the settings without secrets."""
    # The database is no tenant's, and whoever has the scope may see it.
    ((text,),) = await visit.rows(_SYSTEM, visit.call.services.database.role, ALL_TENANTS)
    system = json.loads(text)
    settings = [(variable_of(setting.name), setting) for setting in describe(visit.call.services.settings)]
    return visit.render(
        "system.html",
        checks=sorted(system["checks"], key=lambda check: _ORDER[check["status"]]),
        tables=system["tables"],
        total=sum(table["bytes"] for table in system["tables"]),
        stored=system["settings"],
        given=[one for one in settings if one[1].source != "default"],
        defaults=[one for one in settings if one[1].source == "default"],
    )


VIEWS = (View(name="system", path="/system", show=show_system, scopes=("admin",), section="system"),)
