"""The table of views: one row per page of the dashboard drives its routes and the checks of its requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from jobqueue.api.ui.visit import Visit

Handler = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One page.

    `name`: for people who read the table. `path`: below `/ui`; a `{tenant}` in it is checked to be the caller's, and the
    visit sees that tenant only. `show`: answers GET. `act`: answers POST, from pages of this dashboard only (none: POST
    is refused). `scopes`, `act_scopes`: any one of these is needed to see it, to act. `is_open`: it needs nobody to be
    known (login). `section`: the entry of the navigation (navigation.py) that it belongs to.
    """

    name: str
    path: str
    show: Handler
    act: Handler | None = None
    scopes: tuple[str, ...] = ("jobs:read",)
    act_scopes: tuple[str, ...] = ("jobs:act",)
    is_open: bool = False
    section: str = ""
