"""Messages to systemd: ready, status, watchdog, stopping. Outside of systemd all of this does nothing.

The protocol is one datagram of `NAME=value` lines to the socket in `$NOTIFY_SOCKET`: sd_notify(3),
sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping

STATUS_EVERY = 5.0
EXTEND_EVERY = 2.0
EXTENSION_SECONDS = 10.0
"""Each extension of the stop time-out must arrive within the one before it."""


class Notifier:
    """Sends messages to the service manager. It never raises: a service must not die because nobody listens."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # @ stands for the zero byte of Linux's abstract sockets; anything else than those and a path is not supported.
        self._address = "\0" + address[1:] if address.startswith("@") else address if address.startswith("/") else None
        self.watchdog_seconds = _watchdog_seconds(environ) if self._address else None

    @property
    def active(self) -> bool:
        """Whether somebody listens."""
        return self._address is not None

    def send(self, **values: str | int) -> bool:
        """Send variables in one message, `send(READY=1, STATUS="idle")`; returns whether it was sent."""
        if self._address is None:
            return False
        message = "\n".join(f"{name}={_one_line(value)}" for name, value in values.items())
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
        ):
            out.sendto(message.encode(), self._address)
            return True
        return False

    def ready(self, status: str = "") -> bool:
        """Say that start-up is complete."""
        return self.send(READY=1, **({"STATUS": status} if status else {}))

    def status(self, text: str) -> bool:
        """Show a line in `systemctl status`."""
        return self.send(STATUS=text)

    def watchdog(self) -> bool:
        """Say that this process is not stuck."""
        return self.send(WATCHDOG=1)

    def reloading(self) -> bool:
        """Say that the configuration is being read again; `ready` ends it."""
        return self.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def stopping(self, status: str = "") -> bool:
        """Say that the service shuts down."""
        return self.send(STOPPING=1, **({"STATUS": status} if status else {}))

    def extend_timeout(self, seconds: float = EXTENSION_SECONDS) -> bool:
        """Ask for more time than TimeoutStopSec (or TimeoutStartSec) leaves, counted from now."""
        return self.send(EXTEND_TIMEOUT_USEC=round(seconds * 1_000_000))


class Reporter:
    """Keeps systemd informed while a service runs. `status` returns the line for `systemctl status`.

    The watchdog is fed from the event loop, twice per interval: a loop that is stuck gets the process killed. Whether
    the database can be reached does not matter to it; restarting would not bring it back.
    """

    def __init__(self, notifier: Notifier, status: Callable[[], str]) -> None:
        self._notifier = notifier
        self._status = status
        self._ready = False
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to feed the watchdog, also during a slow start; needs a running event loop."""
        if not self._notifier.active:
            return
        self._tasks = [asyncio.create_task(self._show_status())]
        if self._notifier.watchdog_seconds is not None:
            self._tasks.append(asyncio.create_task(self._feed(self._notifier.watchdog_seconds / 2)))

    async def stop(self) -> None:
        """Fall silent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ready(self) -> None:
        """The service is ready."""
        self._ready = True
        self._notifier.ready(self._status())

    def stopping(self) -> None:
        """The service drains: from now on the stop time-out is extended for as long as the event loop runs."""
        self._stopping = True
        self._notifier.stopping(self._status())
        self._notifier.extend_timeout()

    async def _feed(self, every: float) -> None:
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(every)

    async def _show_status(self) -> None:
        shown = 0.0
        while True:
            await asyncio.sleep(EXTEND_EVERY)
            if self._stopping:
                self._notifier.extend_timeout()
            if self._stopping or (self._ready and time.monotonic() - shown >= STATUS_EVERY):
                shown = time.monotonic()
                self._notifier.status(self._status())


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """The interval in which the manager wants to hear from this process, in seconds; None: it does not."""
    for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    interval = environ.get("WATCHDOG_USEC", "")
    return int(interval) / 1_000_000 if for_us and interval.isdecimal() and int(interval) > 0 else None


def _one_line(value: str | int) -> str:
    return " ".join(str(value).splitlines())
