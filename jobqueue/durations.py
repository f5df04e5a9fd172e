"""Durations as people write them: `90`, `'1 min'`, `'1h 30m'`, `'00:01:30'`, `'PT1M30S'`, all in seconds."""

import re
from datetime import timedelta

DurationLike = float | int | str | timedelta

_UNIT_SECONDS = {
    "ms": 0.001,
    "millisecond": 0.001,
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "m": 60.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hr": 3600.0,
    "hour": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
    "w": 604800.0,
    "week": 604800.0,
}
_NUMBER = r"(\d+(?:\.\d+)?)"
_TERM = re.compile(_NUMBER + r"\s*([a-z]+)", re.IGNORECASE)
_CLOCK = re.compile(r"(\d+):([0-5]\d)(?::([0-5]\d(?:\.\d+)?))?")
_ISO = re.compile(
    rf"P(?=.)(?:{_NUMBER}W)?(?:{_NUMBER}D)?(?:T(?=.)(?:{_NUMBER}H)?(?:{_NUMBER}M)?(?:{_NUMBER}S)?)?",
    re.IGNORECASE,
)
_ISO_SECONDS = (604800.0, 86400.0, 3600.0, 60.0, 1.0)
_EXPECTED = "expected seconds (90), units ('1 min 30 s'), a clock ('00:01:30') or ISO 8601 ('PT1M30S')"


def parse_duration(value: DurationLike) -> float:
    """Return a duration in seconds.

    Numbers are seconds; strings may be a number, units from milliseconds to weeks, `hh:mm[:ss]`, or an ISO 8601
    duration without years and months (they have no fixed length).

    Raises ValueError for anything else, for negative durations and for values that are not finite.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, bool):
        raise ValueError(f"{value} is not a duration: {_EXPECTED}")
    elif isinstance(value, int | float):
        seconds = float(value)
    else:
        seconds = _parse_text(value.strip())
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{value} is not a duration: it must be finite and not negative")
    return seconds


def _parse_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    if match := _CLOCK.fullmatch(text):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600.0 + int(minutes) * 60.0 + float(seconds or 0)
    if match := _ISO.fullmatch(text):
        return sum(float(part) * unit for part, unit in zip(match.groups(), _ISO_SECONDS, strict=True) if part)
    return _parse_units(text)


def _parse_units(text: str) -> float:
    total, position = 0.0, 0
    for match in _TERM.finditer(text):
        name = match[2].lower()
        unit = _UNIT_SECONDS.get(name) or _UNIT_SECONDS.get(name.removesuffix("s"))
        if unit is None or text[position : match.start()].strip(" ,"):
            break
        total += float(match[1]) * unit
        position = match.end()
    if position == 0 or text[position:].strip():
        raise ValueError(f"{text!r} is not a duration: {_EXPECTED}")
    return total
