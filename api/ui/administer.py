"""Queues and schedules are paused and resumed, workers drained: each a page that asks for a reason."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.identity import ALL_TENANTS
from jobqueue.api.job_state import ID
from jobqueue.api.ui.confirming import Confirmation
from jobqueue.api.ui.forms import Form, own_path
from jobqueue.api.ui.rendering import DONE
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

_ADMINISTER = "select jobqueue.http_administer(%s, %s, %s, %s, %s, %s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something that is done with a queue, a schedule or a worker.

    `what`: as jobqueue.http_administer knows it. `thing`: queue, schedule or worker. `about`: what will happen. `done`:
    what is said afterwards. `section`: where it belongs and leads back to. `scopes`: any one of them is needed.
    `of_all`: it concerns all tenants, so only those who see all may do it.
    """

    what: str
    thing: str
    label: str
    about: str
    done: str
    section: str
    scopes: tuple[str, ...] = ("jobs:act",)
    of_all: bool = True

    @property
    def path(self) -> str:
        """Where it is asked for: `/queue/pause`."""
        return f"/{self.thing}/{self.label.lower()}"

    def refusal(self, visit: Visit) -> str | None:
        """Return why the caller may not do it, None if they may."""
        if self.of_all and visit.call.tenants != ALL_TENANTS:
            return "it concerns all tenants, and you do not see all"
        return visit.refusal(*self.scopes)

    async def show(self, visit: Visit) -> Response:
        """Ask for the reason."""
        return self._confirmation(visit).show(visit)

    async def act(self, visit: Visit) -> Response:
        """Do it."""

        async def administer(reason: str, form: Form) -> None:
            await visit.do(_ADMINISTER, visit.actor, self.what, name, reason)

        name = self._name(visit)
        return await self._confirmation(visit).carry_out(visit, administer, self.what)

    def _confirmation(self, visit: Visit) -> Confirmation:
        name = self._name(visit)
        if problem := self.refusal(visit):
            raise ApiError("FORBIDDEN", problem)
        return Confirmation(
            title=f"{self.label} the {self.thing} {name}",
            about=self.about,
            label=self.label,
            path=f"{self.path}?{urlencode({'name': name})}",
            back=own_path(visit.query.get("back", f"/{self.section}")),
        )

    def _name(self, visit: Visit) -> str:
        name = visit.query.get("name", "")
        if not name or (self.thing == "worker" and not ID.fullmatch(name)):
            raise ApiError("NOT_FOUND", f"There is no such {self.thing}.")
        return name


PAUSE_QUEUE = Command(
    what="pause_queue",
    thing="queue",
    label="Pause",
    about="No job of it is started until it is resumed. What runs goes on.",
    done="The queue is paused.",
    section="queues",
)
RESUME_QUEUE = Command(
    what="resume_queue",
    thing="queue",
    label="Resume",
    about="Its jobs are started again.",
    done="The queue goes on.",
    section="queues",
)
PAUSE_SCHEDULE = Command(
    what="pause_schedule",
    thing="schedule",
    label="Pause",
    about="It sends nothing until it is resumed. Jobs that it has sent stay.",
    done="The schedule is paused.",
    section="schedules",
    of_all=False,
)
RESUME_SCHEDULE = Command(
    what="resume_schedule",
    thing="schedule",
    label="Resume",
    about="It sends again. Times that it has missed are treated as its option says.",
    done="The schedule goes on.",
    section="schedules",
    of_all=False,
)
DRAIN_WORKER = Command(
    what="drain_worker",
    thing="worker",
    label="Drain",
    about="It finishes what it runs, takes nothing new, and stops.",
    done="The worker was asked to finish and stop.",
    section="workers",
    scopes=("admin",),
    of_all=False,
)
COMMANDS = (PAUSE_QUEUE, RESUME_QUEUE, PAUSE_SCHEDULE, RESUME_SCHEDULE, DRAIN_WORKER)

DONE.update({command.what: command.done for command in COMMANDS})

VIEWS = tuple(
    View(
        name=command.what.replace("_", " "),
        path=command.path,
        show=command.show,
        act=command.act,
        scopes=command.scopes,
        act_scopes=command.scopes,
        section=command.section,
    )
    for command in COMMANDS
)
