"""The server process: sockets, uvicorn with one or several processes, and what systemd is told.

```
sockets: systemd's (LISTEN_FDS), a Unix socket, or host and port; bound here, shared by all processes
one process:  uvicorn.Server                      feeds the watchdog from its event loop
several:      uvicorn's Multiprocess ─► children  the parent feeds it, and replaces a child that ended or is stuck
```
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.supervisors import Multiprocess

from jobqueue.api.meter import FILES_VARIABLE
from jobqueue.database.parentage import die_with_parent
from jobqueue.errors import ConfigurationError
from jobqueue.telemetry.systemd import Notifier

if TYPE_CHECKING:
    from jobqueue.settings import Settings

logger = logging.getLogger(__name__)

FIRST_FD = 3
BACKLOG = 2048
DRAIN_SECONDS = 10
"""Time for requests under way at shutdown; long polls and streams end at once."""
CHILD_SECONDS = 30
"""How long one of several processes may be silent before it is replaced, at its start too. uvicorn's 5 s are less than a
process needs to start on a machine that is busy: it would be ended and started again for ever."""
HEAD_SECONDS = 15.0
"""For the head of a request; uvicorn waits for ever, so a byte a minute would hold a socket each."""
FIRST_HEAD_SECONDS = 1.0
"""How long a stopping server waits for the first request of a connection that it has accepted."""
FACTORY = "jobqueue.api.server:child_application"


class Announced:
    """ASGI wrapper that tells systemd when the application is ready and when it stops."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def announce(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                Notifier().ready("serving")

        await self.app(scope, receive, announce)


class HeadInTime(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's protocol; a connection whose next request's head is not whole within `HEAD_SECONDS` is closed.

    At shutdown uvicorn closes connections that have no request. On a new one it is on its way, and would be reset: it
    gets `FIRST_HEAD_SECONDS`, so that a restart behind a systemd socket fails nobody.
    """

    _too_late: asyncio.TimerHandle | None = None
    _is_last = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_at_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_last and self.cycle is not None:
            self.cycle.keep_alive = False
        self._look_at_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def shutdown(self) -> None:
        if self.cycle is not None:
            super().shutdown()
        elif not self._is_last:
            self._is_last = True
            self.loop.call_later(FIRST_HEAD_SECONDS, self._end_unused)

    def _end_unused(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            super().shutdown()

    def _look_at_head(self) -> None:
        if not self._reads_head():
            self._forget()
        elif self._too_late is None:
            self._too_late = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _reads_head(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _give_up(self) -> None:
        self._too_late = None
        if self._reads_head() and not self.transport.is_closing():
            self.transport.abort()

    def _forget(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None


class _Processes(Multiprocess):
    """Several processes; the watchdog hears from this one, which replaces children that are stuck."""

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        Notifier().watchdog()


def serve(settings: Settings, dsn: str, sockets: list[socket.socket], processes: int = 1) -> None:
    """Serve until SIGTERM or SIGINT, on bound sockets.

    With several `processes` each makes its own application, and reads what was given here from its environment.
    """
    from jobqueue.api import create_app

    notifier = Notifier()
    several = processes > 1
    if several:
        os.environ["JOBQUEUE_DSN"] = dsn
    counted = common_numbers() if several else contextlib.nullcontext()
    config = uvicorn.Config(
        FACTORY if several else Announced(create_app(settings, dsn=dsn)),
        factory=several,
        workers=processes,
        http=HeadInTime,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        callback_notify=None if several else _feed,
        timeout_notify=max(1, int((notifier.watchdog_seconds or 60.0) / 2)),
        timeout_worker_healthcheck=child_patience(notifier.watchdog_seconds),
    )
    for listening in sockets:
        logger.info("serving on %s", address_of(listening), extra={"event": "api.serving"})
    # uvicorn raises the signal again that ended it.
    with contextlib.suppress(KeyboardInterrupt), counted:
        if several:
            _Processes(config, sockets).run()
        else:
            uvicorn.Server(config).run(sockets)
    notifier.stopping("stopped")


def child_patience(watchdog_seconds: float | None) -> int:
    """Return how many seconds a child may be silent.

    No more than half of what systemd allows the parent, which feeds the watchdog only while it does not wait for a child.
    """
    return max(1, int(min(CHILD_SECONDS, (watchdog_seconds or 2 * CHILD_SECONDS) / 2)))


@contextlib.contextmanager
def common_numbers() -> Iterator[None]:
    """A directory in which processes that start now count requests together, for `/metrics` (meter.py)."""
    if FILES_VARIABLE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="jobqueue-metrics-") as directory:
        os.environ[FILES_VARIABLE] = directory
        try:
            yield
        finally:
            del os.environ[FILES_VARIABLE]


def child_application() -> ASGIApp:
    """Make the application of one of several processes; it ends with the process that started it, even by SIGKILL."""
    from jobqueue.api import create_app
    from jobqueue.settings import load_settings
    from jobqueue.telemetry.log import configure_logging

    if arm := die_with_parent(parent=os.getppid(), with_signal=signal.SIGTERM):
        arm()
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    return Announced(create_app(settings))


async def _feed() -> None:
    Notifier().watchdog()


# -- Sockets ----------------------------------------------------------------------------------------------------------


def inherited_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the sockets that systemd opened for this process (sd_listen_fds(3)); none: not started by a socket unit.

    The variables are taken away, so that no child takes the sockets for its own.
    """
    meant = environ.get("LISTEN_PID") == str(os.getpid())
    count = environ.get("LISTEN_FDS", "0")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if not meant or not count.isdecimal():
        return []
    return [socket_of(descriptor) for descriptor in range(FIRST_FD, FIRST_FD + int(count))]


def socket_of(descriptor: int) -> socket.socket:
    """Return the socket behind a file descriptor. Raises ConfigurationError if it is none."""
    try:
        # Family and type are asked of the kernel: with a wrong one asyncio would leave Nagle's algorithm on.
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigurationError(f"file descriptor {descriptor} is no socket: {error.strerror}") from error
    found.set_inheritable(False)
    return found


def tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """Bind to every address of a host; `port` 0: any free one, the same for all. Raises ConfigurationError."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(f"there is no address {host}: {error.strerror}") from error
    bound: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(places):
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        chosen = bound[0].getsockname()[1] if bound and port == 0 else port
        try:
            opened.bind((address[0], chosen, *address[2:]))
        except OSError as error:
            opened.close()
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} and len(places) > 1:
                continue
            _close(bound)
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}", hint="Choose another port (--port, JOBQUEUE_PORT)."
            ) from error
        bound.append(opened)
    if not bound:
        raise ConfigurationError(f"{host} is no address of this machine")
    return bound


def unix_socket(path: str, mode: int) -> socket.socket:
    """Bind to a Unix socket; `mode`: its rights. One that a killed server left behind is replaced.

    Raises ConfigurationError if somebody answers there, or if something else than a socket has the name.
    """
    _remove_stale(path)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        opened.bind(path)
    except OSError as error:
        opened.close()
        raise ConfigurationError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        os.umask(before)
    return opened


def remove_socket(path: str) -> None:
    """Delete a Unix socket at the end."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def address_of(listening: socket.socket) -> str:
    """Return where a socket listens, as people write it."""
    name: Any = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


def _remove_stale(path: str) -> None:
    try:
        found = Path(path).stat()
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigurationError(f"{path} exists and is no socket", hint="Choose another name for --uds.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(path) == 0:
            raise ConfigurationError(f"somebody serves on {path} already", hint="Stop it, or choose another name.")
    os.unlink(path)


def _close(sockets: list[socket.socket]) -> None:
    for opened in sockets:
        opened.close()
