"""JSON out, by orjson if it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

dump_json: Callable[[Any], bytes]
"""Return compact UTF-8 JSON."""

try:
    import orjson
except ImportError:

    def _dump(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    dump_json = _dump
else:
    dump_json = orjson.dumps


def with_members(json_object: str, members: dict[str, Any]) -> bytes:
    """Return a JSON object, given as text, with members added at its end; the text is not parsed."""
    if not members:
        return json_object.encode()
    head = json_object[:-1].rstrip()
    return head.encode() + (b"," if len(head) > 1 else b"") + dump_json(members)[1:]
