"""How requests travel: with an event loop, or blocking behind the same coroutines, which then never wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from jobqueue.http.problems import ServiceUnavailable

STREAM_SILENCE = 45.0
"""A stream says something every 15 s; after three times as long it counts as lost."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers (lower case) and body of an answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True, slots=True)
class Lines:
    """A stream that has begun: its status and headers, its text line by line, or its whole body if it is an error."""

    status: int
    headers: Mapping[str, str]
    lines: AsyncIterator[str]
    content: bytes


class Transport(Protocol):
    """What `Calls` needs of the world. Both raise ServiceUnavailable if the API cannot be reached."""

    async def request(self, method: str, path: str, **options: Any) -> Answer: ...
    def stream(self, path: str, headers: Mapping[str, str]) -> Any: ...
    async def sleep(self, seconds: float) -> None: ...
    def now(self) -> float: ...


class AsyncTransport:
    """On an event loop."""

    def __init__(self, client: httpx2.AsyncClient, headers: Mapping[str, str]) -> None:
        self.client = client
        self.headers = headers

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> Answer:
        """Send a request and read the whole answer."""
        try:
            answer = await self.client.request(method, path, headers=self._with(headers), **options)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error
        return Answer(answer.status_code, _lower(answer.headers), answer.content)

    @asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[Lines]:
        """Open a stream."""
        try:
            timeout = _patient(self.client.timeout)
            async with self.client.stream("GET", path, headers=self._with(headers), timeout=timeout) as answer:
                content = await answer.aread() if answer.status_code != 200 else b""
                yield Lines(answer.status_code, _lower(answer.headers), answer.aiter_lines(), content)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def now(self) -> float:
        """Return a monotonic time in seconds."""
        return time.monotonic()

    def _with(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        return {**self.headers, **(headers or {})}


class BlockingTransport:
    """In the calling thread; nothing is ever awaited."""

    def __init__(self, client: httpx2.Client, headers: Mapping[str, str]) -> None:
        self.client = client
        self.headers = headers

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> Answer:
        """Send a request and read the whole answer."""
        try:
            answer = self.client.request(method, path, headers=self._with(headers), **options)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error
        return Answer(answer.status_code, _lower(answer.headers), answer.content)

    @asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[Lines]:
        """Open a stream."""
        try:
            timeout = _patient(self.client.timeout)
            with self.client.stream("GET", path, headers=self._with(headers), timeout=timeout) as answer:
                content = answer.read() if answer.status_code != 200 else b""
                yield Lines(answer.status_code, _lower(answer.headers), _one_by_one(answer), content)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251

    def now(self) -> float:
        """Return a monotonic time in seconds."""
        return time.monotonic()

    def _with(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        return {**self.headers, **(headers or {})}


async def _one_by_one(answer: httpx2.Response) -> AsyncIterator[str]:
    for line in answer.iter_lines():
        yield line


def _patient(usual: httpx2.Timeout) -> httpx2.Timeout:
    return httpx2.Timeout(connect=usual.connect, read=STREAM_SILENCE, write=usual.write, pool=usual.pool)


def _lower(headers: httpx2.Headers) -> dict[str, str]:
    return {name.lower(): text for name, text in headers.items()}


def _unreachable(error: Exception) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"the API cannot be reached: {type(error).__name__} {error}".rstrip(),
        hint="Is the address right, and does the API run (jobqueue api)?",
    )
