"""Login by an API key, and logout."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.ui import sessions
from jobqueue.api.ui.forms import first, own_path
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit


async def show_login(visit: Visit) -> Response:
    """Ask for a key; an application that identifies its users itself has no login here."""
    if not visit.takes_keys:
        raise ApiError("NOT_FOUND", "The application that this dashboard belongs to says who you are.")
    return visit.render("login.html", following=own_path(visit.query.get("next")), problem=None)


async def do_login(visit: Visit) -> Response:
    """Begin a session."""
    if not visit.takes_keys:
        raise ApiError("NOT_FOUND", "The application that this dashboard belongs to says who you are.")
    form = await visit.form()
    following = own_path(first(form, "next"))
    started = await sessions.start(visit.call.services.database, first(form, "key"))
    if started is None:
        problem = "This key is not let in: it is mistyped, unknown, expired or revoked."
        return visit.render("login.html", 401, following=following, problem=problem)
    await sessions.end(visit.call.services.database, HTTPConnection(visit.call.scope))
    response = visit.goto(following)
    token, ends = started
    sessions.set_cookie(response, token, ends, visit.url(""), secure=_is_secure(visit))
    return response


async def do_logout(visit: Visit) -> Response:
    """End the session, here and in the database."""
    await sessions.end(visit.call.services.database, HTTPConnection(visit.call.scope))
    response = visit.goto("/login", done="logout")
    sessions.clear_cookie(response, visit.url(""), secure=_is_secure(visit))
    return response


async def show_logout(visit: Visit) -> Response:
    """Ask, for those who come by a link."""
    return visit.render("logout.html")


def _is_secure(visit: Visit) -> bool:
    return bool(visit.call.scope["scheme"] == "https")


VIEWS = (
    View(name="login", path="/login", show=show_login, act=do_login, is_open=True),
    View(name="logout", path="/logout", show=show_logout, act=do_logout, is_open=True),
)
