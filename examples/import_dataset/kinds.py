"""Which kind of values a column has: the narrowest that fits all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_BOOLEAN = frozenset({"true", "false", "yes", "no"})


def kind_of(value: str) -> str:
    """Return integer, number, date, boolean or text."""
    if _INTEGER.fullmatch(value):
        # 007 is somebody's number, not a quantity.
        return "text" if len(value.lstrip("+-")) > 1 and value.lstrip("+-").startswith("0") else "integer"
    if _NUMBER.fullmatch(value):
        return "number"
    if _DATE.fullmatch(value):
        return "date" if _is_date(value) else "text"
    return "boolean" if value.casefold() in _BOOLEAN else "text"


def common_kind(kinds: Iterable[str]) -> str:
    """Return the kind of a column that has values of all these kinds; text for none."""
    found = set(kinds)
    if len(found) == 1:
        return found.pop()
    return "number" if found == {"integer", "number"} else "text"


def _is_date(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True
