"""Actions: a page that says what will be done and asks why (GET), and does it (POST). app.js shows it as a dialogue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from jobqueue.api.errors import to_api_error
from jobqueue.api.ui.forms import Form, first, own_path
from jobqueue.api.ui.visit import Visit

LONGEST_REASON = 2000


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What is asked before an action. `label`: the button's word. `path`: where the form is sent, below `/ui`. `back`:
    where the way leads afterwards. `template`: one that extends confirm.html if the form has fields of its own; `values`
    are for it.
    """

    title: str
    about: str
    label: str
    path: str
    back: str
    template: str = "confirm.html"
    values: Mapping[str, Any] = field(default_factory=dict)

    def show(self, visit: Visit, *, problem: str | None = None, reason: str = "", status: int = 200) -> Response:
        """Return the page. `problem`: why the last attempt was refused."""
        return visit.render(self.template, status, page=self, problem=problem, reason=reason, **self.values)

    async def carry_out(
        self, visit: Visit, act: Callable[[str, Form], Awaitable[Any]], done: str, form: Form | None = None
    ) -> Response:
        """Do it with the reason and the form that were sent, and go back; show the page again if it is refused.

        `done`: the name of what is said then (rendering.DONE). `form`: what was sent, if it has been read already.
        """
        form = await visit.form() if form is None else form
        reason = first(form, "reason").strip()
        if not 0 < len(reason) <= LONGEST_REASON:
            problem = f"Give a reason: 1 to {LONGEST_REASON:,} characters, for those who read the audit later."
            return self.show(visit, problem=problem, reason=reason[:LONGEST_REASON], status=422)
        try:
            await act(reason, form)
        except Exception as error:
            found = to_api_error(error, visit.call.request_id)
            if found.status >= 500:
                raise
            problem = " ".join(part for part in (str(found), found.details.get("hint")) if part)
            return self.show(visit, problem=problem, reason=reason, status=found.status)
        return visit.goto(own_path(first(form, "back")), done=done)
