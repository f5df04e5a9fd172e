"""Server-sent events: the format, and a response that ends with its client, its process, or a client that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobqueue.api.errors import ApiError
from jobqueue.api.feed import Feed

logger = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
"""Proxies cut connections that are silent for a minute."""
SEND_SECONDS = 30.0
"""A client that reads nothing for this long, with the buffers between full, is dropped."""
LONGEST_SECONDS = 3600.0
"""A stream ends after an hour; clients come back by themselves, with rights that are looked at anew."""
MOST_STREAMS = 5_000
"""Streams of a process; more are answered 503."""
MOST_OF_ONE = 1_000
"""Of one key or person, so that nobody takes all of them."""
RETRY_MILLISECONDS = 2_000

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
HEARTBEAT = b": hb\n\n"
GREETING = f"retry: {RETRY_MILLISECONDS}\n\n".encode()
BYE = b"event: bye\nretry: 1500\ndata: {}\n\n"


def event(name: str, data: bytes, number: int | None = None) -> bytes:
    """Return one event; `data` is JSON on one line, `number` becomes the client's Last-Event-ID."""
    own_id = b"" if number is None else b"id: %d\n" % number
    return own_id + b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events. No connection of the database belongs to it. `owner`: whose it is; None: nobody's."""

    def __init__(self, events: AsyncIterator[bytes], feed: Feed, owner: str | None) -> None:
        if feed.streams >= MOST_STREAMS:
            raise ApiError("UNAVAILABLE", "There are too many streams; poll, or try again later.")
        if owner is not None and feed.streams_of[owner] >= MOST_OF_ONE:
            raise ApiError("LIMIT_REACHED", f"You have {MOST_OF_ONE} streams open; close some, or poll.")
        super().__init__(events, headers=HEADERS, media_type=MEDIA_TYPE)
        self._feed = feed
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._count(1)
        pumping = asyncio.create_task(self._pump(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({pumping, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._count(-1)
            for task in (pumping, leaving):
                task.cancel()
            await asyncio.gather(pumping, leaving, return_exceptions=True)
        if not pumping.cancelled() and (error := pumping.exception()) is not None:
            raise error

    def _count(self, change: int) -> None:
        self._feed.streams += change
        if self._owner is not None:
            self._feed.streams_of[self._owner] += change
            if not self._feed.streams_of[self._owner]:
                del self._feed.streams_of[self._owner]

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self.body_iterator) as events:  # type: ignore[type-var]
                async for chunk in events:
                    async with asyncio.timeout(SEND_SECONDS):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.info("a stream was dropped: its client reads nothing")
        except OSError:
            # The client is gone.
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
