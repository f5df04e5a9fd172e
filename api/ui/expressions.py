"""Cron expressions and recurrence rules in words.

What cannot be said plainly is not said: the page shows the expression anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

LONGEST = 200
"""Longer expressions are not read: no text of a user costs more than this."""

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NICKNAMES: Mapping[str, str] = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FREQUENCIES: Mapping[str, str] = {
    "YEARLY": "year",
    "MONTHLY": "month",
    "WEEKLY": "week",
    "DAILY": "day",
    "HOURLY": "hour",
    "MINUTELY": "minute",
    "SECONDLY": "second",
}
_ITEM = re.compile(r"(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d{1,4}))?")
_SAID_RULES = {"FREQ", "INTERVAL", "BYDAY", "BYMONTHDAY", "BYMONTH", "BYHOUR", "BYMINUTE", "BYSECOND", "WKST"}


def in_words(expression: str) -> str | None:
    """Return an expression as a phrase: `at 03:00, Monday to Friday`. None if there are no plain words for it."""
    text = expression.strip()
    if len(text) > LONGEST:
        return None
    try:
        if "FREQ=" in text.upper():
            return _rule(text.upper())
        return _cron(NICKNAMES.get(text.lower(), text).split())
    except (ValueError, IndexError, KeyError):
        return None


# -- Cron -------------------------------------------------------------------------------------------------------------


def _cron(fields: Sequence[str]) -> str:
    if len(fields) not in {5, 6}:
        raise ValueError
    second, minute, hour, day, month, weekday = fields if len(fields) == 6 else ["0", *fields]
    parts = [_time(second, minute, hour), _days(day, weekday)]
    if month != "*":
        parts.append("in " + _list(month, lambda value: _named(value, MONTHS, 1)))
    return ", ".join(part for part in parts if part)


def _time(second: str, minute: str, hour: str) -> str:
    seconds = "" if second == "0" else _often(second, "second")
    if second == "*" or (not second.isdigit() and minute == hour == "*"):
        return seconds + ("" if minute == hour == "*" else f" of {_time('0', minute, hour)}")
    numbers = [minute, *hour.split(",")]
    if all(number.isdigit() for number in numbers):
        tail = f":{int(second):02d}" if second.isdigit() and second != "0" else ""
        return "at " + _and([f"{int(one):02d}:{int(minute):02d}{tail}" for one in hour.split(",")])
    said = _often(minute, "minute")
    if hour != "*":
        said += " of hour " + _list(hour, str) if "/" not in hour else f" of {_often(hour, 'hour')}"
    elif minute.isdigit() or "," in minute:
        said += " of every hour"
    return said if not seconds else f"{seconds} of {said}"


def _often(field: str, unit: str) -> str:
    """`*/5` is every 5 minutes, `7` is minute 7."""
    if field == "*":
        return f"every {unit}"
    match = re.fullmatch(r"(?:\*|0)/(\d+)", field)
    if match:
        return f"every {int(match[1])} {unit}s" if int(match[1]) > 1 else f"every {unit}"
    return f"{unit} {_list(field, str)}"


def _days(day: str, weekday: str) -> str:
    said = []
    if day != "*":
        every = re.fullmatch(r"\*/(\d+)", day)
        said.append(
            f"every {int(every[1])} days of the month" if every else "on day " + _list(day, str) + " of the month"
        )
    if weekday != "*":
        said.append(_list(weekday, lambda value: _named(value, (*DAYS, "Sunday"), 0)))
    # as cron does: either one is enough, unless one of them begins with *
    return (" and " if day.startswith("*") or weekday.startswith("*") else " or ").join(said)


def _list(field: str, say: Callable[[str], str]) -> str:
    return _and([_item(item, say) for item in field.split(",")])


def _item(item: str, say: Callable[[str], str]) -> str:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ValueError
    star, first, last, step = match.groups()
    if star:
        return f"every {step}" if step else "any"
    said = say(first) + (f" to {say(last)}" if last else "")
    return f"{said} every {step}" if step else said


def _named(value: str, names: Sequence[str], least: int) -> str:
    if value.isdigit():
        if int(value) < least:
            raise ValueError
        return names[int(value) - least]
    return {name[:3].lower(): name for name in names}[value.lower()]


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# -- Recurrence rules -------------------------------------------------------------------------------------------------


def _rule(text: str) -> str:
    line = next(line for line in text.splitlines() if "FREQ=" in line)
    parts = dict(part.split("=", 1) for part in line.removeprefix("RRULE:").split(";"))
    every, unit = int(parts.get("INTERVAL", "1")), _FREQUENCIES[parts["FREQ"]]
    said = [f"every {unit}" if every == 1 else f"every {every} {unit}s"]
    if "BYMONTH" in parts:
        said.append("in " + _and([MONTHS[int(month) - 1] for month in parts["BYMONTH"].split(",")]))
    if "BYMONTHDAY" in parts:
        said.append("on " + _and([_month_day(int(day)) for day in parts["BYMONTHDAY"].split(",")]))
    if "BYDAY" in parts:
        said.append("on " + _and([_week_day(day) for day in parts["BYDAY"].split(",")]))
    if "BYHOUR" in parts:
        minutes = parts.get("BYMINUTE", "0").split(",")
        said.append("at " + _and([f"{int(h):02d}:{int(m):02d}" for h in parts["BYHOUR"].split(",") for m in minutes]))
    elif "BYMINUTE" in parts:
        said.append("at minute " + _and(parts["BYMINUTE"].split(",")))
    left = [f"{name}={value}" for name, value in parts.items() if name not in _SAID_RULES]
    return " ".join(said) + (f" ({'; '.join(left).lower()})" if left else "")


def _month_day(day: int) -> str:
    if day > 0:
        return f"day {day}"
    return "the last day" if day == -1 else f"day {-day} from the end"


def _week_day(text: str) -> str:
    match = re.fullmatch(r"([+-]?\d+)?(SU|MO|TU|WE|TH|FR|SA)", text)
    if match is None:
        raise ValueError
    name = next(day for day in DAYS if day[:2].upper() == match[2])
    if match[1] is None:
        return name
    nth = int(match[1])
    return (
        f"the last {name}" if nth == -1 else f"{name} number {nth}" if nth > 0 else f"{name} number {-nth} from the end"
    )
