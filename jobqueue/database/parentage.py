"""Let a child process die with its parent, however the parent dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

from jobqueue.database.binaries import EmbeddedServerError

_PR_SET_PDEATHSIG = 1


def die_with_parent(
    *, parent: int | None = None, with_signal: signal.Signals = signal.SIGINT
) -> Callable[[], None] | None:
    """Return what a child runs before exec, so that the kernel sends it SIGINT (PostgreSQL: shut down now, cleanly)
    when this process dies, even by SIGKILL. None where the system has no such thing (not Linux).

    Args:
        parent: the process id to die with; default: this process.
        with_signal: what the kernel sends.

    Raises:
        EmbeddedServerError: not called from the main thread. The kernel watches the *thread* that forked, and the end
            of any other thread would end the child.
    """
    if sys.platform != "linux":
        return None
    if threading.current_thread() is not threading.main_thread():
        raise EmbeddedServerError(
            "start an ephemeral server from the main thread: it dies with the one that started it"
        )
    # PyDLL keeps the interpreter's lock: nothing may be waited for between fork and exec.
    prctl = ctypes.PyDLL(None).prctl
    expected = os.getpid() if parent is None else parent

    def arm() -> None:
        # The parent may have died before the request: then nobody would ever send the signal.
        if prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0) != 0 or os.getppid() != expected:
            os._exit(127)

    return arm
