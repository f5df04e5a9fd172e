"""What every loop of a worker needs to outlive its connection: growing waits, a clock, a way to cut a stuck socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection

from jobqueue.errors import DatabaseUnavailable

DATABASE_AWAY = (psycopg.OperationalError, psycopg.InterfaceError, OSError, DatabaseUnavailable)
"""What a statement or a connection attempt raises while the database cannot be reached; every loop tries again."""

ANSWER_SECONDS = 8.0
"""A claim or a flush that takes longer has lost its connection, as a rule: together with reconnecting it stays under 10 s."""
MOST_ANSWER_SECONDS = 120.0

logger = logging.getLogger(__name__)

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed_clock() -> float:
    """Seconds on a clock that never jumps, for durations only.

    It goes on while the machine is suspended, as the leases in the database do; the plain monotonic clock would stop.
    """
    return time.clock_gettime(_CLOCK)


class Backoff:
    """Seconds to wait before the next attempt: `first`, doubled each time up to `most`, of which a random half is cut.

    The default of at most 2 s keeps a worker under the 10 s in which it is to be back after an outage; the random part
    keeps a hundred workers from coming back in the same instant.
    """

    def __init__(self, first: float = 0.1, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    def next(self) -> float:
        """Return the wait that is due now; the following one is longer."""
        wait, self._next = self._next, min(self._next * 2, self._most)
        return wait * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin again with `first`."""
        self._next = self._first


class Plug:
    """A handle on a connection's socket by which any thread may cut it; a statement that waits on it then fails.

    The handle is a duplicate: libpq may close its own descriptor at any moment, and the number may be given away again.
    """

    def __init__(self, connection: Connection[Any] | AsyncConnection[Any]) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def pull(self) -> None:
        """Cut the connection; harmless if it is cut or closed already."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forget the connection without touching it."""
        self._socket.close()


def cut(connection: Connection[Any] | AsyncConnection[Any] | None) -> None:
    """Cut a connection that may be dead: whoever waits for its answer, or uses it next, learns that at once."""
    if connection is not None and not connection.closed:
        plug = Plug(connection)
        plug.pull()
        plug.close()


class AnswerWatch:
    """Cuts a connection on which a statement gets no answer, for a loop whose statements take milliseconds.

    A peer that takes everything and never answers (a proxy, a firewall that has forgotten the connection) is noticed by
    the kernel after 25 s, or never if a machine between acknowledges the bytes. `first`: seconds until then (8). A server
    that is only slow must not be asked the same again and again: each cut doubles the limit up to `most`, until an
    answer comes.
    """

    def __init__(self, first: float = ANSWER_SECONDS, most: float = MOST_ANSWER_SECONDS) -> None:
        self._first, self._most = first, most
        self._limit = first

    @contextlib.contextmanager
    def over(self, connection: AsyncConnection[Any]) -> Iterator[None]:
        """Watch the statement in this block."""
        timer = asyncio.get_running_loop().call_later(self._limit, self._expire, connection)
        try:
            yield
            self._limit = self._first
        finally:
            timer.cancel()

    def _expire(self, connection: AsyncConnection[Any]) -> None:
        logger.warning("no answer for %g s: reconnecting", self._limit, extra={"event": "db.silent"})
        self._limit = min(self._limit * 2, self._most)
        cut(connection)
