"""Values as JSON text that PostgreSQL can store as jsonb: the one place where Python values leave for the database."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

# A NUL in the text of JSON is this escape, unless its backslash is itself escaped.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
RAW: tuple[type, ...] = (bytes, memoryview, bytearray)
"""Types of JSON text as a connection received it; the value of a JSON text itself is never one of them."""
_NUL_OR_SURROGATE = re.compile("[\x00\ud800-\udfff]")


class NotStorable(ValueError):
    """A value that jsonb cannot hold; the message says why, without repeating the value."""


def to_json_text(value: Any) -> str:
    """Return a value as JSON text.

    Beyond JSON's own types: pydantic models, dataclasses, enums, UUID, date and time, Decimal (as a string), paths,
    tuples and sets; a timedelta becomes seconds. Raises NotStorable for anything else, for NaN and infinity, NUL
    characters, lone surrogates, circular and too deeply nested values.
    """
    try:
        text = _ENCODER.encode(value)
        text.encode()
    except NotStorable:
        raise
    except UnicodeEncodeError:
        raise NotStorable("it contains a lone surrogate, which is no valid Unicode") from None
    except RecursionError:
        raise NotStorable("it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise NotStorable(f"it is not JSON: {error}") from None
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raise NotStorable if JSON text contains a NUL character, which jsonb refuses."""
    if "\\u0000" in text and _NUL.search(text):
        raise NotStorable("it contains a NUL character, which PostgreSQL cannot store")


def from_json(value: Any) -> Any:
    """Return a JSON column as a Python value; what was not decoded yet comes as one of the RAW types."""
    return json.loads(bytes(value)) if type(value) in RAW else value


def clean_text(text: str, limit: int) -> str:
    """Return text that can always be stored: NUL and lone surrogates replaced, cut to `limit` bytes of UTF-8."""
    clean = _NUL_OR_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
    data = clean.encode()
    if len(data) <= limit:
        return clean
    return data[: limit - 3].decode(errors="ignore") + "…"


def _to_json_type(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json", by_alias=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for kind, convert in _CONVERSIONS:
        if isinstance(value, kind):
            return convert(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


_CONVERSIONS: tuple[tuple[type | tuple[type, ...], Any], ...] = (
    (UUID, str),
    ((datetime, date, time), lambda value: value.isoformat()),
    (timedelta, timedelta.total_seconds),
    (Enum, lambda value: value.value),
    ((Decimal, PurePath), str),
    (Mapping, dict),
    ((set, frozenset), list),
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_to_json_type)
