"""The payload of every benchmark, and the clock in it."""

from __future__ import annotations

import time
from typing import Any

QUEUE = "mail"


def payload(i: int) -> dict[str, Any]:
    """About 60 bytes. `t`: seconds of a clock that all processes of one machine share."""
    return {"i": i, "t": time.monotonic(), "to": "user@example.com"}
