"""A server that stops answers who is connected already: behind a systemd socket a restart fails nobody."""

from __future__ import annotations

import asyncio

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from jobqueue.api import server as module
from jobqueue.api.server import HeadInTime, tcp_sockets

REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


class Stopping:
    """A server with one connection that has sent nothing, and that has begun to stop."""

    async def __aenter__(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
        sockets = tcp_sockets("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, http=HeadInTime, lifespan="off", log_config=None))
        self.task = asyncio.create_task(self.server.serve(sockets))
        async with asyncio.timeout(30):
            while not self.server.started:
                await asyncio.sleep(0.01)
            reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
            while not self.server.server_state.connections:
                await asyncio.sleep(0.01)
            self.server.should_exit = True
            while any(server.is_serving() for server in self.server.servers):
                await asyncio.sleep(0.01)
        return reader, self.writer

    async def __aexit__(self, *error: object) -> None:
        async with asyncio.timeout(30):
            await self.task
        self.writer.close()


async def test_a_connection_that_was_accepted_before_the_stop_gets_its_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FIRST_HEAD_SECONDS", 20.0)
    async with Stopping() as (reader, writer):
        writer.write(REQUEST)
        head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"here"


async def test_a_connection_without_a_request_does_not_hold_the_stop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_HEAD_SECONDS", 0.1)
    async with Stopping() as (reader, _):
        assert await asyncio.wait_for(reader.read(), 20) == b""
