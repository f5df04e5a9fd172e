"""A hole between workers and server: a TCP proxy that can stop forwarding without closing anything.

Frozen, it goes on taking what fits into the sockets' buffers, as a network does that drops packets, and answers nobody
who connects. When it thaws, half of its connections go on where they were, with what had been sent before; the other
half stay silent for ever, and nobody is told. The server's side of those is closed after the time in which its own
keepalives would have noticed.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass

from psycopg.conninfo import conninfo_to_dict, make_conninfo

KEEPALIVE_SECONDS = 25.0
CHUNK = 65536


@dataclass(eq=False, slots=True)
class Link:
    """One connection through the proxy."""

    server: asyncio.StreamWriter
    dead: bool = False


class Proxy:
    """Forwards a port of 127.0.0.1 to the Unix socket that a DSN names."""

    def __init__(self, dsn: str) -> None:
        given = conninfo_to_dict(dsn)
        self._dsn = dsn
        self._socket = f"{given['host']}/.s.PGSQL.{given['port']}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._open = asyncio.Event()
        self._links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def start(self) -> str:
        """Begin to forward and return the DSN that leads through here."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return make_conninfo(self._dsn, host="127.0.0.1", port=self.port)

    def stop(self) -> None:
        """Close everything."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def freeze(self) -> None:
        """Forward nothing any more."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def thaw(self, silent: int = 2) -> None:
        """Forward again; every so many connections stay silent (2; 1: all that there are now)."""
        self._loop.call_soon_threadsafe(self._thaw, silent)

    async def _start(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _thaw(self, silent: int) -> None:
        for number, link in enumerate(self._links, start=1):
            if number % silent == 0 and not link.dead:
                link.dead = True
                self._loop.call_later(KEEPALIVE_SECONDS, link.server.close)
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            back, forth = await asyncio.open_unix_connection(self._socket)
            await self._forward(reader, writer, back, forth)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        forth: asyncio.StreamWriter,
    ) -> None:
        link = Link(forth)
        self._links.append(link)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link, reader, forth))
                group.create_task(self._pump(link, back, writer))
        except* (OSError, EOFError):
            pass
        finally:
            self._links.remove(link)
            with suppress(OSError):
                forth.close()

    async def _pump(self, link: Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while True:
            data = await source.read(CHUNK)
            await self._open.wait()
            if link.dead:
                # the client's end must not see that the server's has been closed
                if sink is not link.server:
                    await asyncio.Event().wait()
                if data:
                    continue
            if not data:
                raise EOFError
            sink.write(data)
            await sink.drain()
