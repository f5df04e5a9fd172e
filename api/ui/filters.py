"""Which jobs a list shows: the filter in its address, and what people type into its box.

The address is the whole state, so that links can be shared: `/jobs?status=failed&queue=ocr`. What is typed,
`queue:ocr error:timeout`, becomes such an address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID
from jobqueue.api.limits import unknown_name
from jobqueue.api.parameters import ERROR_CLASSES, STATUSES
from jobqueue.api.ui.visit import Visit

UNFINISHED = ("blocked", "pending", "processing", "paused")
TABS = ("unfinished", "all", *STATUSES)
PARAMETERS = (
    *("status", "queue", "job_type", "tenant", "subject", "error", "error_class", "error_code"),
    *("created_after", "created_before", "ended_after"),
)
"""Of the address; `status` is one of TABS, or several statuses with commas."""

NAMES: Mapping[str, str] = {
    **dict.fromkeys(("type", "job_type"), "job_type"),
    **{name: name for name in ("status", "queue", "tenant", "subject", "error", "id")},
}
"""What is typed before a colon, and the parameter that it becomes."""
EXAMPLE = "For example queue:ocr type:OCR error:timeout, or the id of a job."

_WORD = re.compile(r'(?:([A-Za-z_]+):)?(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True, slots=True)
class Chip:
    """A part of the filter as people see it, and the address without it."""

    text: str
    without: str


@dataclass(frozen=True, slots=True)
class JobFilter:
    """The filter of an address. `given`: its parameters, without the tab."""

    tab: str
    given: Mapping[str, str]

    @property
    def statuses(self) -> list[str] | None:
        """The statuses that are meant; None: any."""
        if self.tab == "all":
            return None
        return list(UNFINISHED) if self.tab == "unfinished" else self.tab.split(",")

    @property
    def address(self) -> dict[str, str]:
        """The parameters of the address; the tab that is shown without any is left out."""
        return {**({} if self.tab == "unfinished" else {"status": self.tab}), **self.given}

    def conditions(self, *, with_status: bool = True) -> dict[str, Any]:
        """Return the filter as jobqueue.http_conditions reads it."""
        found: dict[str, Any] = {name: value for name, value in self.given.items() if name != "error"}
        if "error" in self.given:
            error = self.given["error"]
            if error.lower() in ERROR_CLASSES:
                found["error_class"] = error.lower()
            else:
                # Own codes are written large, names of exceptions as they are.
                found["error_code"] = [error, error.upper()]
        if with_status and self.statuses is not None:
            found["status"] = self.statuses
        return found

    def chips(self, visit: Visit) -> list[Chip]:
        """Return the parts of the filter, but the tab, each with the way to drop it."""
        return [
            Chip(f"{'type' if name == 'job_type' else name}: {value}", visit.url("/jobs", **self._without(name)))
            for name, value in self.given.items()
        ]

    def _without(self, name: str) -> dict[str, str]:
        return {other: value for other, value in self.address.items() if other != name}


def filter_of(visit: Visit) -> JobFilter:
    """Return the filter of an address. Raises ApiError: 422 for an unknown status, 403 for a foreign tenant."""
    given = {name: visit.query[name].strip() for name in PARAMETERS if visit.query.get(name, "").strip()}
    tab = given.pop("status", "unfinished")
    for status in tab.split(","):
        if status not in STATUSES and tab not in TABS:
            raise ApiError("INVALID_ARGUMENT", **unknown_name("status", status, list(TABS)))
    tenant = given.get("tenant")
    if tenant is not None and not visit.call.principal.may_use(tenant):
        raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})
    return JobFilter(tab, given)


def read_box(text: str) -> dict[str, str]:
    """Return the parameters that a typed text means; `id` if it is, or names, the id of a job.

    Raises ApiError (422) that says what can be typed.
    """
    found: dict[str, str] = {}
    for name, quoted, plain in _WORD.findall(text):
        value = quoted or plain
        if not name and ID.fullmatch(value):
            found["id"] = value.lower()
        elif not name and (value in STATUSES or value in TABS):
            found["status"] = value
        elif name.lower() in NAMES and value:
            found[NAMES[name.lower()]] = value
        elif name:
            raise ApiError("INVALID_ARGUMENT", **unknown_name("word before a colon", name, list(NAMES)))
        else:
            raise ApiError("INVALID_ARGUMENT", f'It is not clear what "{value[:100]}" is.', hint=EXAMPLE)
    if "id" in found and not ID.fullmatch(found["id"]):
        raise ApiError("INVALID_ARGUMENT", f'"{found["id"][:100]}" is not the id of a job.', hint=EXAMPLE)
    return found
