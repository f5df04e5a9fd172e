"""The navigation, and the keys of the keyboard."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of the navigation. `key`: the letter that follows `g`; none: only the mouse goes there. `scopes`: it is
    shown to those who have any of them; none: to all."""

    name: str
    path: str
    title: str
    key: str = ""
    scopes: tuple[str, ...] = ()


NAVIGATION: tuple[Section, ...] = (
    Section("overview", "/", "Overview", "o"),
    Section("jobs", "/jobs", "Jobs", "j"),
    Section("failures", "/failures", "Failures", "f"),
    Section("queues", "/queues", "Queues", "q"),
    Section("workers", "/workers", "Workers", "w", ("jobs:act",)),
    Section("schedules", "/schedules", "Schedules"),
    Section("groups", "/groups", "Flows"),
    Section("bulks", "/bulks", "Bulk"),
    Section("audit", "/audit", "Audit"),
    Section("system", "/system", "System", "", ("admin",)),
)

SHORTCUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("/",), "search"),
    (("g", "o"), "overview"),
    (("g", "j"), "jobs"),
    (("g", "f"), "failures"),
    (("g", "q"), "queues"),
    (("g", "w"), "workers"),
    (("j",), "next row"),
    (("k",), "row before"),
    (("x",), "select the row"),
    (("Enter",), "open the row"),
    (("r",), "retry: asks first"),
    (("c",), "cancel: asks first"),
    (("s",), "skip: asks first"),
    (("p",), "pause updates, or go on"),
    (("t",), "theme: light, dark, the system's"),
    (("?",), "these keys"),
)
"""As the help shows them; app.js obeys `data-go`, `data-key` and the fixed ones."""
