"""The child's side of `process.py`: runs one handler after another in the main thread.

A second thread reads the socket, so that an order reaches a handler that is in the middle of its work.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from jobqueue.errors import ConfigurationError
from jobqueue.worker.process import HEADER, portable

_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """Raised in the handler by SIGTERM, so that its `finally` blocks run; no Exception, so that it is not swallowed."""


def die_with_parent(parent: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux; elsewhere nothing)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    # It may have died before the request: then nobody would ever send the signal.
    if os.getppid() != parent:
        os._exit(1)


def load_target(reference: str) -> Callable[..., Any]:
    """Import `module:qualname`. Raises ConfigurationError that names what cannot be imported."""
    module, _, qualname = reference.partition(":")
    if module == "__main__" or "<" in qualname or not qualname:
        raise ConfigurationError(
            f"{reference} cannot be imported by another process",
            hint="Define the handler at the top level of a module that can be imported.",
        )
    try:
        found: Any = importlib.import_module(module)
        for name in qualname.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"{reference} cannot be imported by another process: {error}",
            hint="Define the handler at the top level of a module that can be imported.",
        ) from error
    if not callable(found):
        raise ConfigurationError(f"{reference} is not a function")
    return found  # type: ignore[no-any-return]


class Link:
    """The way from a running handler to its parent: `current_link()` in the child."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._number = 0
        self._replies: dict[int, queue.SimpleQueue[tuple[Any, BaseException | None]]] = {}
        self.work: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.order: str | None = None
        """The last order for the running job (cancel, pause), None without one."""
        self.on_order: Callable[[str], object] = lambda order: None
        """Called in another thread when an order comes."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Ask the parent and wait for the answer; raises what it raised. From any thread of the child."""
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        with self._lock:
            self._number += 1
            number = self._number
            self._replies[number] = answer
        try:
            self.send(("call", number, name, args, kwargs))
            value, error = answer.get()
        finally:
            self._replies.pop(number, None)
        if error is not None:
            raise error
        return value

    def send(self, frame: tuple[Any, ...]) -> None:
        """Send one frame."""
        body = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.sendall(HEADER.pack(len(body)) + body)

    def read(self) -> None:
        """Distribute what the parent sends, until it is gone; then end the process, whatever it does."""
        try:
            with self._connection.makefile("rb") as stream:
                while len(head := stream.read(HEADER.size)) == HEADER.size:
                    (length,) = HEADER.unpack(head)
                    self._take(pickle.loads(stream.read(length)))  # noqa: S301 - our own parent
        finally:
            os._exit(0)

    def _take(self, frame: tuple[Any, ...]) -> None:
        kind, *content = frame
        if kind == "run":
            self.order = None
            self.work.put((content[0], content[1]))
        elif kind == "tell":
            self.order = content[0]
            self.on_order(content[0])
        elif (waiting := self._replies.get(content[0])) is not None:
            waiting.put((content[1], content[2]))


_link: Link | None = None


def current_link() -> Link:
    """Return the child's link to its parent. Raises RuntimeError outside of such a child."""
    if _link is None:
        raise RuntimeError("this process was not started by a ProcessPool")
    return _link


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _run_one(link: Link, reference: str, arguments: tuple[Any, ...]) -> None:
    try:
        link.send(("done", load_target(reference)(*arguments)))
    except Stopped:
        raise
    except BaseException as error:
        stack = "".join(traceback.format_exception(error))
        link.send(("failed", portable(error), stack))


def main(descriptor: int, parent: int) -> None:
    """Serve until the parent closes the socket."""
    global _link
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = _link = Link(socket.socket(fileno=descriptor))
    threading.Thread(target=link.read, name="jobqueue-link", daemon=True).start()
    try:
        while True:
            _run_one(link, *link.work.get())
    except Stopped:
        os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # As the module that others import: `current_link` must mean this process's one link.
    from jobqueue.worker import process_child

    process_child.main(int(sys.argv[1]), int(sys.argv[2]))
