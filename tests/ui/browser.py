"""A real browser on a real server: the system's Chromium, and the API on a loopback port, in the loop of the tests."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.async_api import Browser, BrowserContext, Page, Request

from jobqueue.api import create_app
from jobqueue.settings import load_settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt-get install --no-install-recommends chromium"
)
in_one_loop = pytest.mark.asyncio(loop_scope="session")
"""Of tests with a browser: it lives in the loop of the session."""

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
PATIENCE = 60_000
"""Milliseconds that a page has for whatever is waited for; a busy machine takes some."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: those are pytest's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class Site:
    """A running server. `url`: of the dashboard, without a slash at its end."""

    server: uvicorn.Server
    origin: str
    url: str

    def cut_streams(self) -> int:
        """Break the connections of live updates, as a network does; how many there were."""
        cut = 0
        for connection in list(self.server.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and cycle.scope["path"].endswith("/ui/live") and not cycle.response_complete:
                connection.transport.abort()
                cut += 1
        return cut


@asynccontextmanager
async def serving(dsn: str, **settings: Any) -> AsyncIterator[Site]:
    """Serve the API and its dashboard from a database, on a port of its own."""
    given = load_settings(dsn=dsn, start_timeout=60.0, api_access_log=False, **settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(
        uvicorn.Config(create_app(given), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Site(server, origin, origin + given.api_prefix + "/ui")
    finally:
        server.should_exit = True
        await task
        listener.close()


@dataclass(slots=True)
class Visitor:
    """Somebody with a browser of their own. `problems`: what the console and the pages complained of."""

    site: Site
    context: BrowserContext
    problems: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    async def open(self, path: str = "/") -> Page:
        """Open a page of the dashboard in a new tab."""
        page = await self.context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._hear(page, message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(f"{page.url}: {error}"))
        page.on("requestfailed", lambda request: self._failed(request))
        await page.goto(self.site.url + path)
        return page

    def expect_problems(self, *parts: str) -> None:
        """Say that messages with these words are part of the test."""
        self.expected = parts

    def unexpected(self) -> list[str]:
        """The problems that nobody expected."""
        return [text for text in self.problems if not any(part in text for part in self.expected)]

    def _hear(self, page: Page, kind: str, text: str) -> None:
        if kind in {"error", "warning"}:
            self.problems.append(f"{page.url}: {text}")

    def _failed(self, request: Request) -> None:
        # a stream or a reading that ends because its page is left
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"{request.url}: {request.failure}")


@asynccontextmanager
async def visiting(browser: Browser, site: Site, **options: Any) -> AsyncIterator[Visitor]:
    """A visitor whose pages must have no errors: in the console, in scripts, in requests."""
    context = await browser.new_context(
        **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
    )
    visitor = Visitor(site, context)
    try:
        yield visitor
    finally:
        await context.close()
    assert not visitor.unexpected(), visitor.unexpected()


async def violations(page: Page, *rules: str) -> list[str]:
    """What axe-core finds wrong with a page, by all of its rules or by some. Its text goes in by the developer tools: the
    policy of the page would let no other script in."""
    if not await page.evaluate("typeof window.axe === 'object'"):
        await page.evaluate(AXE.read_text(encoding="utf-8"))
    # Preloaded are styles and media for rules that are experimental or about sound.
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    found = await page.evaluate("options => window.axe.run(document, options)", options)
    return [
        f"{one['id']}: {node['target']} {node.get('failureSummary', '')}"
        for one in found["violations"]
        for node in one["nodes"]
    ]
