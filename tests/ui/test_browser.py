"""Every page of the dashboard in a real browser: no violation of accessibility, no error, nothing of a user's text runs."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.support.api_keys import create_key
from tests.ui.browser import AXE, Site, Visitor, in_one_loop, needs_chromium, serving, violations, visiting
from tests.ui.seeds import NASTY, Seeds, seed

pytestmark = [needs_chromium, in_one_loop]

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest_asyncio.fixture(loop_scope="session")
async def seeds(dsn: str, connection: Connection) -> Seeds:
    """A database in which every page has something to show."""
    return seed(connection, dsn)


@pytest_asyncio.fixture(loop_scope="session")
async def site(dsn: str, seeds: Seeds) -> AsyncIterator[Site]:
    """The dashboard of that database."""
    async with serving(dsn) as running:
        yield running


def pages(seeds: Seeds) -> dict[str, str]:
    """Every page, by its heading; what is shown of a job as a running, a failed and a nasty one."""
    return {
        "Overview": "/",
        "Jobs": "/jobs?status=all",
        "Processing: The Man": f"/jobs/{seeds.running}",
        "Processing: scan-": f"/jobs/{seeds.failed}",
        NASTY: f"/jobs/{seeds.nasty}",
        "Retry": f"/jobs/{seeds.failed}/retry",
        "Failures": "/failures",
        "Queues": "/queues",
        "ocr": "/queue?name=ocr&range=6h",
        "Workers": "/workers",
        "Schedules": "/schedules",
        "Flows and batches": "/groups?id=nonsense",
        "Flow": f"/flows/{seeds.flow}",
        "Batch Import of March": f"/batches/{seeds.batch}",
        "Bulk operations": "/bulks",
        "Audit": "/audit",
        "System": "/system",
        "acme": "/t/acme",
    }


async def seen(page: Page) -> list[str]:
    """What is wrong with a page in light, and in the dark at 360 pixels: there colours, sizes and places are others."""
    wrong = [f"light: {one}" for one in await violations(page)]
    await page.emulate_media(color_scheme="dark")
    await page.set_viewport_size({"width": 360, "height": 740})
    others = ("color-contrast", "link-in-text-block", "target-size", "scrollable-region-focusable")
    wrong += [f"dark, 360 px: {one}" for one in await violations(page, *others)]
    if (wide := await page.evaluate("document.documentElement.scrollWidth")) > 360:
        wrong.append(f"360 px: it is {wide} px wide")
    if await page.evaluate("document.querySelectorAll('img[src=x], main script, [onerror]').length"):
        wrong.append("a user's text became elements")
    return wrong


async def test_every_page_is_free_of_violations_in_light_in_dark_and_narrow_and_of_errors(
    browser: Browser, site: Site, seeds: Seeds
) -> None:
    found: dict[str, list[str]] = {}
    async with visiting(browser, site) as visitor:
        # Once for all pages: to send half a megabyte to each took as long as to search it.
        await visitor.context.add_init_script(path=AXE)
        page = await visitor.open("/jobs")
        page.on(
            "dialog", lambda dialog: visitor.problems.append(f"{page.url}: a script of a user ran: {dialog.message}")
        )
        for heading, path in pages(seeds).items():
            await page.emulate_media(color_scheme="light")
            await page.set_viewport_size({"width": 1280, "height": 900})
            await page.goto(site.url + path)
            assert (await page.locator("h1").inner_text()).startswith(heading), path
            if wrong := await seen(page):
                found[path] = wrong
    assert found == {}


async def test_what_users_write_is_shown_letter_by_letter(browser: Browser, site: Site, seeds: Seeds) -> None:
    async with visiting(browser, site) as visitor:
        page = await visitor.open(f"/jobs/{seeds.nasty}")
        text = await page.locator("main").inner_text()
        assert text.count(NASTY) >= 3
        assert "9007199254740993" in await page.locator("main").text_content()  # type: ignore[operator]
        for path in ("/jobs", "/failures", "/t/acme"):
            await page.goto(site.url + path)
            assert NASTY in await page.locator("main").inner_text(), path


async def test_the_policy_lets_nothing_in_and_all_files_come_from_here(browser: Browser, site: Site) -> None:
    async with visiting(browser, site) as visitor:
        visitor.expect_problems("Content Security Policy")
        page = await visitor.open("/queues")
        await page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<p id=planted style=\"color:red\" onclick=\"x=1\">x</p>');"
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
        )
        await page.locator("#planted").click()
        assert await page.evaluate("[window.ran, window.x, getComputedStyle(planted).color !== 'rgb(255, 0, 0)']") == [
            None,
            None,
            True,
        ]
        urls = await page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert {url.split("/ui/")[0] for url in urls} == {site.origin}


async def test_a_reader_sees_no_button_that_acts_and_the_reasons_why(
    browser: Browser, dsn: str, connection: Connection, seeds: Seeds
) -> None:
    key = create_key(connection, tenants=["*"], scopes=["jobs:read"])
    async with serving(dsn) as site, visiting(browser, site) as visitor:
        page = await log_in(visitor, key.text)
        for path in ("/", "/jobs?status=all", f"/jobs/{seeds.failed}", "/failures", "/queue?name=ocr", "/t/acme"):
            await page.goto(site.url + path)
            assert await page.locator("main a[data-dialog]").count() == 0, path
            assert await page.locator("main form[method=post] button:enabled").count() == 0, path
            assert await page.locator("#selection button:enabled:visible").count() == 0, path
        assert (
            "your key lacks the scope jobs:act" in await (await visitor.open("/failures")).locator("tbody").inner_text()
        )
        assert await page.get_by_role("link", name="Workers").count() == 0
        visitor.expect_problems("403")
        for path in ("/workers", f"/jobs/{seeds.failed}/retry"):
            answer = await page.goto(site.url + path)
            assert answer is not None
            assert answer.status == 403, path
        answer = await visitor.context.request.post(
            f"{site.url}/jobs/{seeds.failed}/retry",
            form={"reason": "by hand"},
            headers={"Sec-Fetch-Site": "same-origin"},
        )
        assert answer.status == 403
    assert seeds.engine.status(seeds.failed) == "failed"


async def test_who_logs_out_is_out(browser: Browser, dsn: str, connection: Connection, seeds: Seeds) -> None:
    key = create_key(connection, tenants=["*"], scopes=["admin"])
    async with serving(dsn) as site, visiting(browser, site, java_script_enabled=False) as visitor:
        visitor.expect_problems("401")
        page = await log_in(visitor, "jq_not_a_key")
        assert "not let in" in await page.locator("main").inner_text()
        await page.get_by_label("API key").fill(key.text)
        await page.get_by_role("button", name="Log in").click()
        assert await page.locator("h1").inner_text() == "Queues", "it goes on to the page that was asked for"
        cookies = await visitor.context.cookies()
        assert [(one["httpOnly"], one["sameSite"]) for one in cookies] == [(True, "Strict")]
        await page.get_by_role("button", name="Log out").click()
        await page.goto(site.url + "/jobs")
        assert await page.locator("h1").inner_text() == "Log in"
        await visitor.context.add_cookies(cookies)  # type: ignore[arg-type]
        await page.goto(site.url + "/jobs")
        assert await page.locator("h1").inner_text() == "Log in", "the session has ended on the server as well"


async def log_in(visitor: Visitor, key: str) -> Page:
    """Log in by a key on the way to the list of queues."""
    page = await visitor.open("/queues")
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Log in").click()
    return page


async def test_axe_is_what_its_makers_released() -> None:
    listed = tomllib.loads((AXE.parent / "VENDOR.toml").read_text())["axe"]["files"]
    found = {name: hashlib.sha256((AXE.parent / name).read_bytes()).hexdigest() for name in listed}
    assert found == {name: one["sha256"] for name, one in listed.items()}
