"""A stopping server waits for its requests to end, and long polls would let it wait for half a minute."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jobqueue.api.hub import end_all_waits

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def waits_end_at_signals() -> Iterator[None]:
    """While inside, SIGTERM and SIGINT end all waits first and then do what the server had them do.

    In front of the server's own handlers, and so the same under every server and with any number of worker processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: _in_front_of(handler) for number, handler in before.items() if callable(handler)}
    for number, handler in ours.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, before[number])


def _in_front_of(handler: Any) -> Any:
    def end_waits_then_go_on(number: int, frame: FrameType | None) -> None:
        end_all_waits()
        handler(number, frame)

    return end_waits_then_go_on
