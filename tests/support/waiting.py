"""Wait for a condition with a bound, instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, what: str, timeout: float = 60.0) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: it did not within `timeout` seconds.
    """
    deadline, pause = time.monotonic() + timeout, 0.005
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(pause)
        # Who waits long asks less often: a condition is a statement or a look at processes, and the machine is shared.
        pause = min(pause * 1.2, 0.05)
