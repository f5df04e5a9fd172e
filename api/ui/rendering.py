"""Templates, and what they can say: times, durations, numbers, statuses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from jobqueue.api.ui.navigation import NAVIGATION, SHORTCUTS

TEMPLATES = Path(__file__).parent / "templates"

NOTHING = "\N{EN DASH}"
"""Where there is no value."""

FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
"""What stands for all times before and after those that Python knows."""

_COUNTS = re.compile(r"(?:[a-z]{1,20}:\d{1,9})(?:,[a-z]{1,20}:\d{1,9}){0,9}")

STATUS_ICONS: Mapping[str, str] = {
    "blocked": "◇",
    "pending": "○",
    "processing": "◐",
    "paused": "‖",
    "completed": "✓",
    "failed": "✗",
    "cancelled": "⊘",
    "skipped": "↷",
}
"""Beside the word: a status is never told by its colour alone."""

DONE: dict[str, str] = {
    "cancel": "Cancelled, or asked of its worker.",
    "pause": "Paused, or asked of its worker.",
    "resume": "Resumed.",
    "retry": "It will be tried again.",
    "restart": "It will run again from its beginning.",
    "skip": "Skipped.",
    "run_now": "It may run now.",
    "prioritize": "The priority was changed.",
    "delete": "Deleted.",
    "bulk": "The action on these jobs was carried out.",
    "bulk_none": "Nothing was done: none of these jobs is there any more.",
    "bulk_begun": "The action on these jobs has begun; Bulk shows how far it is.",
    "login": "You are logged in.",
    "logout": "You are logged out.",
}
"""What a page says after an action: `goto(…, done=name)`. Views add their own."""


@cache
def environment() -> Environment:
    """Return the templates of the dashboard; every value is escaped, an unknown name is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        when=when,
        duration=duration,
        took=took,
        number=number,
        bounded=bounded,
        status=status_mark,
        words=words,
        size=size,
        pretty=pretty,
        counts=counts,
    )
    made.globals.update(done_texts=DONE, status_icons=STATUS_ICONS, navigation=NAVIGATION, shortcuts=SHORTCUTS)
    return made


def render(template: str, values: Mapping[str, Any], *, only_main: bool = False) -> str:
    """Return a page. `only_main`: its title and the element `main`, for a page that is shown already."""
    layout = "part.html" if only_main else "frame.html"
    return environment().get_template(template).render({**values, "layout": layout})


def when(value: str | datetime | None, missing: str = NOTHING) -> Markup:
    """Return a time as `<time>`: how long ago it was, or how far ahead it lies, with UTC in its title.

    app.js keeps the words current and adds the reader's own time. `value`: a datetime, or ISO 8601 as JSON has it.
    """
    if value is None:
        return Markup("<span>{}</span>").format(missing)
    at = time_of(value) if isinstance(value, str) else value.astimezone(UTC)
    if at in (FIRST, LAST):
        return Markup("<span>{}</span>").format(value)
    seconds = (datetime.now(UTC) - at).total_seconds()
    text = f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds"), f"{at:%Y-%m-%d %H:%M:%S} UTC", text
    )


def time_of(text: str) -> datetime:
    """Return a time as JSON has it. PostgreSQL knows more: what lies before the year 1 or after 9999 is FIRST or LAST."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return FIRST if text.startswith(("-", "0001")) or text.endswith("BC") else LAST


def duration(seconds: float | None, missing: str = NOTHING) -> str:
    """Return a duration in its two largest units: `3 min 2 s`. Under ten seconds: tenths."""
    if seconds is None:
        return missing
    if 0 < seconds < 9.95 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    whole = max(0, round(seconds))
    for size, name, smaller, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def took(began: str | datetime | None, ended: str | datetime | None, missing: str = NOTHING) -> str:
    """Return the duration between two times, under a tenth of a second in milliseconds; `missing` if one is not known."""
    if began is None or ended is None:
        return missing
    first, last = (time_of(value) if isinstance(value, str) else value for value in (began, ended))
    seconds = max(0.0, (last - first).total_seconds())
    return f"{seconds * 1000:.0f} ms" if seconds < 0.095 else duration(seconds)


def number(value: float | None, missing: str = NOTHING) -> str:
    """Return a number with commas between thousands."""
    return missing if value is None else f"{value:,}"


def bounded(value: int | None, most: int = 10_000, *, is_open: bool = False) -> str:
    """Return a count that was not counted further than `most`: `10,000+` stands for more. `is_open`: there may be more."""
    if value is None:
        return "?"
    return f"{min(value, most):,}" + ("+" if is_open or value > most else "")


def status_mark(status: str) -> Markup:
    """Return a status as icon and word."""
    return Markup('<span class="status status-{0}"><span aria-hidden="true">{1}</span> {0}</span>').format(
        status, STATUS_ICONS.get(status, "·")
    )


def words(name: str) -> str:
    """Return a name of the program as words: `run_now` is `run now`."""
    return name.replace("_", " ").replace("-", " ")


def counts(text: str) -> str:
    """Return counts by outcome, `done:38,refused:2`, as people read them; nothing for any other text."""
    if not _COUNTS.fullmatch(text):
        return ""
    pairs = (pair.split(":") for pair in text.split(","))
    return ", ".join(f"{int(count):,} {outcome}" for outcome, count in pairs) + "."


def size(count: int | None, missing: str = NOTHING) -> str:
    """Return bytes in their largest unit (1 kB = 1,024 bytes)."""
    if count is None:
        return missing
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1024 or unit == "GB":
            return f"{amount:,.0f} {unit}" if unit == "bytes" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def pretty(value: Any) -> str:
    """Return small JSON for people to read; of jobs' own values use jsonb_pretty, which keeps numbers exact."""
    return json.dumps(value, indent=2, ensure_ascii=False)
