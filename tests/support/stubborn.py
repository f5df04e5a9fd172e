"""A handler for a process that does not stop when it is told to."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def stubborn(payload: dict[str, str]) -> bool:
    """The first run goes on whatever it is told; a later one returns whether the first one's process is gone."""
    place = Path(payload["place"])
    if not place.exists():
        place.write_text(str(os.getpid()))
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)
    try:
        os.kill(int(place.read_text()), 0)
    except ProcessLookupError:
        return True
    return False
