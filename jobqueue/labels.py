"""Labels: the names of jobs for people, `Indexing: {payload.path}`, rendered here as the database does it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Label = str | Callable[[Any, dict[str, Any]], str]

MAX_LENGTH = 300
_FIELD = re.compile(r"\{((?:payload|metadata)(?:\.[A-Za-z0-9_-]+)*)\}")


def check_label(label: Label | None, job_type: str) -> None:
    """Raise TypeError for a label that the database could not render."""
    if label is None or callable(label):
        return
    if "{" in _FIELD.sub("", label):
        raise TypeError(
            f"the label of {job_type} has a field that is not known: {label!r}; "
            "fields are {payload.name} and {metadata.name}, for anything else give a function of payload and metadata"
        )


def render_label(label: str, payload: Any, metadata: Any) -> str | None:
    """Fill in a format string; what is missing is left out, an empty result is None."""
    values = {"payload": payload, "metadata": metadata}
    text = _FIELD.sub(lambda match: _text_of(_look_up(values, match[1].split("."))), label)
    return shorten(text)


def shorten(text: str) -> str | None:
    """Cut a name to what is shown, 300 characters; an empty one is None."""
    clean = text.replace("\0", "").strip()
    return (clean if len(clean) <= MAX_LENGTH else clean[: MAX_LENGTH - 1] + "…") or None


def _look_up(value: Any, path: list[str]) -> Any:
    for name in path:
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
