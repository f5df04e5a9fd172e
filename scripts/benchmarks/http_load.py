"""A client of the HTTP benchmark: keep-alive connections that ask again as soon as they are answered, or that all wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from functools import partial
from typing import Any

import uvloop

from benchmarks.children import answer, arguments, say_ready, wait_for_word
from benchmarks.http_server import allow_many_sockets

CONNECT_AT_ONCE = 100


class Client(asyncio.Protocol):
    """One connection. `answers`: how many of each status; `etags`: those that all connections of a side know."""

    def __init__(self, given: dict[str, Any], etags: dict[str, str], first: int) -> None:
        paths = given["paths"]
        self.paths = itertools.islice(itertools.cycle(paths), first % len(paths), None)
        self.head = "".join(f"{name}: {value}\r\n" for name, value in given["headers"].items())
        self.conditional = given["conditional"]
        self.etags = etags
        self.answers: dict[int, int] = {}
        self.path = ""
        self.buffer = b""
        self.wanted = 0
        self.status = 0
        self.again = False
        self.idle = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.idle.done():
            self.idle.set_result(None)

    def begin(self) -> None:
        """Ask, and again after each answer as long as `again` holds; `idle` is then the last answer."""
        self.again, self.idle = True, asyncio.get_running_loop().create_future()
        self.ask()

    def ask(self, query: str = "") -> None:
        """Send the next request."""
        self.path = next(self.paths)
        condition = f"If-None-Match: {self.etags[self.path]}\r\n" if self.path in self.etags else ""
        self.transport.write(
            f"GET {self.path}{query} HTTP/1.1\r\nHost: localhost\r\n{self.head}{condition}\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.wanted and not self._read_head():
            return
        if len(self.buffer) < self.wanted:
            return
        self.buffer, self.wanted = self.buffer[self.wanted :], 0
        self.answers[self.status] = self.answers.get(self.status, 0) + 1
        if self.again:
            self.ask()
        elif not self.idle.done():
            self.idle.set_result(None)

    def _read_head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self.buffer[:end].lower()
        self.status, length = int(head[9:12]), 0
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            length = int(head[at + 17 : at + 30].split(b"\r", 1)[0])
        at = self.buffer.lower().find(b"\r\netag:", 0, end) if self.conditional else -1
        if at >= 0:
            self.etags[self.path] = self.buffer[at + 7 : end].split(b"\r", 1)[0].strip().decode()
        self.wanted = end + 4 + length
        return True


async def load(given: dict[str, Any]) -> dict[str, Any]:
    """Ask each side in turn, a slice of time each, so that all meet the same machine; answers per second by status."""
    sides = {name: await _connect(side) for name, side in given["sides"].items()}
    say_ready()
    await asyncio.to_thread(wait_for_word)
    found: dict[str, dict[int, int]] = {name: {} for name in sides}
    took = dict.fromkeys(sides, 0.0)
    for turn in range(given["slices"] + 1):
        for name, clients in sides.items():
            before = _answers(clients)
            seconds = await _slice(clients, given["slice_seconds"])
            if turn == 0:
                # Connections, plans, ETags.
                continue
            took[name] += seconds
            for status, count in _answers(clients).items():
                found[name][status] = found[name].get(status, 0) + count - before.get(status, 0)
    for clients in sides.values():
        for client in clients:
            client.transport.abort()
    return {name: {str(status): n / took[name] for status, n in of.items()} for name, of in found.items()}


async def _slice(clients: list[Client], seconds: float) -> float:
    began = time.perf_counter()
    for client in clients:
        client.begin()
    await asyncio.sleep(seconds)
    for client in clients:
        client.again = False
    await asyncio.wait([client.idle for client in clients], timeout=30)
    return time.perf_counter() - began


async def polls(given: dict[str, Any]) -> dict[str, Any]:
    """Open many long polls, each with the ETag that it has; once told, wait for all answers."""
    clients = await _connect(given)
    for client in clients:
        client.ask("?wait=30")
    say_ready()
    await asyncio.to_thread(wait_for_word)
    began = time.perf_counter()
    await asyncio.wait([client.idle for client in clients], timeout=60)
    took = time.perf_counter() - began
    answers = {str(status): float(count) for status, count in _answers(clients).items()}
    for client in clients:
        client.transport.abort()
    return {"seconds": took, **answers}


async def _connect(given: dict[str, Any]) -> list[Client]:
    loop = asyncio.get_running_loop()
    etags: dict[str, str] = given["etags"]
    clients: list[Client] = []
    while len(clients) < given["connections"]:
        last = min(len(clients) + CONNECT_AT_ONCE, given["connections"])
        opening = (
            loop.create_connection(partial(Client, given, etags, number), "127.0.0.1", given["port"])
            for number in range(len(clients), last)
        )
        clients += [client for _, client in await asyncio.gather(*opening)]
    return clients


def _answers(clients: list[Client]) -> dict[int, int]:
    total: dict[int, int] = {}
    for client in clients:
        for status, count in client.answers.items():
            total[status] = total.get(status, 0) + count
    return total


if __name__ == "__main__":
    allow_many_sockets()
    settings = arguments()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answer(runner.run(polls(settings) if settings["polls"] else load(settings)))
