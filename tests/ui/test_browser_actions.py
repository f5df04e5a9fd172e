"""What people do with the dashboard in a real browser: by keyboard, without scripts, in two tabs, while the network fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.sql.engine import PERMANENT, Engine
from tests.ui.browser import PATIENCE, Site, in_one_loop, needs_chromium, serving, visiting

pytestmark = [needs_chromium, in_one_loop]

MOST_STOPS = 80
NAME_OF_FOCUS = (
    "(e => (e.getAttribute('aria-label') || e.innerText || e.id || e.tagName).trim())(document.activeElement)"
)
expect.set_options(timeout=PATIENCE)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(dsn: str, connection: psycopg.Connection[tuple[Any, ...]]) -> AsyncIterator[Engine]:
    """The database behind the dashboard, with the queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    opened = Engine(connection, dsn)
    yield opened
    opened.close()


@pytest_asyncio.fixture(loop_scope="session")
async def site(dsn: str, engine: Engine) -> AsyncIterator[Site]:
    """The dashboard."""
    async with serving(dsn) as running:
        yield running


async def tab_to(page: Page, label: str) -> None:
    """Leave the navigation by its skip link, and press Tab until the focus is on what people read as `label`."""
    await page.locator("body").press("Tab")
    stops: list[str] = [await page.evaluate(NAME_OF_FOCUS)]
    if stops == ["Skip to the content"]:
        await page.keyboard.press("Enter")
    for _ in range(MOST_STOPS):
        await page.keyboard.press("Tab")
        stops.append((await page.evaluate(NAME_OF_FOCUS)).rstrip("…"))
        if stops[-1] == label:
            return
    raise AssertionError(f"no Tab leads to {label!r}, only to {stops}")


async def act(page: Page, label: str, reason: str = "because", **fields: str) -> None:
    """Do an action by keyboard alone: to its button, the fields of the dialogue, Enter; the focus comes back."""
    await tab_to(page, label)
    await page.keyboard.press("Enter")
    dialog = page.locator("#dialog")
    await expect(dialog.locator(":focus")).to_have_count(1)
    given = {**fields, "reason": reason}
    for _ in range(5):
        at = await page.evaluate("document.activeElement.id")
        if at in given:
            await page.keyboard.press("Control+A")
            await page.keyboard.type(given.pop(at))
        if not given:
            break
        await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_hidden()
    await expect(page.locator(".said")).to_be_visible()
    assert await page.evaluate("document.activeElement !== document.body"), f"{label}: the focus is lost"


async def test_every_action_is_done_by_keyboard_alone(browser: Browser, site: Site, engine: Engine) -> None:
    running = engine.claimed()
    actions = {
        "Retry": (engine.in_status("failed"), "pending"),
        "Restart": (engine.in_status("failed"), "pending"),
        "Skip": (engine.in_status("failed"), "skipped"),
        "Resume": (engine.in_status("paused"), "pending"),
        "Cancel": (engine.in_status("pending"), "cancelled"),
        "Run now": (engine.send(delay=3600), "pending"),
        "Pause": (engine.send(delay=3600), "paused"),
        "Prioritize": (engine.send(), "pending"),
    }
    async with visiting(browser, site) as visitor:
        page = await visitor.open("/queues")
        for label, (job, status) in actions.items():
            await page.goto(f"{site.url}/jobs/{job}")
            await act(page, label, **({"priority": "7"} if label == "Prioritize" else {}))
            assert engine.status(job) == status, label
            assert engine.audit(job)[-1]["reason"] == "because", label
        assert engine.job(actions["Prioritize"][0])["priority"] == 7

        ended = actions["Skip"][0]
        await page.goto(f"{site.url}/jobs/{ended}")
        await act(page, "Delete")
        assert engine.values("select 1 from jobqueue.job where id = %s", ended) == []
        assert page.url.split("?")[0] == f"{site.url}/jobs", "a deleted job has no page"

        await page.goto(f"{site.url}/jobs/{running.id}")
        await act(page, "Cancel")
        assert engine.job(running.id)["requested_action"] == "cancel"
        await expect(page.locator("main")).to_contain_text("cancel")


async def test_queues_schedules_workers_and_groups_of_failures_are_handled_by_keyboard_alone(
    browser: Browser, site: Site, engine: Engine
) -> None:
    failed = [engine.in_status("failed") for _ in range(2)]
    engine.run("select jobqueue.schedule('nightly', 'q', '0 3 * * *', '{}', '{}')")
    async with visiting(browser, site) as visitor:
        page = await visitor.open("/queues")
        await act(page, "Pause", "a fire")
        await expect(page.locator("tbody")).to_contain_text("a fire")
        await act(page, "Resume", "it is out")
        assert engine.values("select reason from jobqueue.audit where target = 'q' order by id") == [
            "a fire",
            "it is out",
        ]

        await page.goto(site.url + "/schedules")
        await expect(page.locator("tbody")).to_contain_text("at 03:00")
        await act(page, "Pause")
        assert engine.value("select state from jobqueue.schedules") == "paused"

        await page.goto(site.url + "/workers")
        await act(page, "Drain", "an upgrade")
        assert engine.value("select drain_reason from jobqueue.worker") == "an upgrade"

        await page.goto(site.url + "/failures")
        await act(page, "Retry", "mended")
        assert {engine.status(job) for job in failed} == {"pending"}
        await expect(page.locator("main")).to_contain_text("No job has failed")
        await page.goto(site.url + "/bulks")
        await expect(page.locator("tbody tr")).to_contain_text(["mended"])


async def test_single_letters_lead_everywhere_and_can_be_switched_off(
    browser: Browser, site: Site, engine: Engine
) -> None:
    newest = [engine.in_status("failed") for _ in range(3)][-1]
    async with visiting(browser, site) as visitor:
        page = await visitor.open("/")
        for key, heading in (("f", "Failures"), ("q", "Queues"), ("w", "Workers"), ("o", "Overview"), ("j", "Jobs")):
            await page.keyboard.press("g")
            await page.keyboard.press(key)
            await expect(page.locator("h1")).to_have_text(heading)
        await page.goto(site.url + "/jobs?status=failed")
        await page.keyboard.press("j")
        assert await row(page) == newest, "the first row is the newest job"
        await page.keyboard.press("x")
        await expect(page.locator("[data-selected]")).to_have_text("1 selected")
        await page.keyboard.press("j")
        await page.keyboard.press("k")
        await page.keyboard.press("r")
        await expect(page.locator("#dialog")).to_be_visible()
        assert engine.status(newest) == "failed", "a letter asks, it never acts"
        await page.keyboard.press("Escape")
        assert await row(page) == newest, "the focus is back on the row"
        await page.keyboard.press("/")
        await expect(page.get_by_role("searchbox")).to_be_focused()
        await page.keyboard.type("pt?")
        await expect(page.get_by_role("searchbox")).to_have_value("pt?")
        await page.keyboard.press("Tab")
        for _ in range(3):
            await page.keyboard.press("t")
        await page.keyboard.press("p")
        await expect(page.locator("#live-switch")).to_have_text("Resume updates")
        await page.keyboard.press("?")
        await page.get_by_label("Single-letter keys are on").uncheck()
        await page.keyboard.press("Escape")
        await page.keyboard.press("p")
        await page.keyboard.press("?")
        await expect(page.locator("#live-switch")).to_have_text("Resume updates")
        await expect(page.locator("#help")).to_be_hidden()


async def row(page: Page) -> UUID | None:
    """The job in whose row the focus is."""
    found = await page.evaluate("document.activeElement.closest('tr')?.id")
    return UUID(found.removeprefix("job-")) if found else None


async def test_without_scripts_a_job_is_found_and_retried(browser: Browser, site: Site, engine: Engine) -> None:
    job = engine.in_status("failed")
    async with visiting(browser, site, java_script_enabled=False) as visitor:
        page = await visitor.open("/")
        await page.get_by_role("link", name="Jobs", exact=True).click()
        await page.get_by_role("searchbox").fill(str(job))
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(f"{site.url}/jobs/{job}")
        await page.get_by_role("link", name="Retry").click()
        await page.get_by_role("button", name="Retry").click()
        assert await page.get_by_label("Reason").evaluate("e => e.validity.valueMissing"), "no action without a reason"
        await page.get_by_label("Reason").fill("no scripts here")
        await page.get_by_role("button", name="Retry").click()
        await expect(page.locator(".said")).to_be_visible()
        assert page.url.split("?")[0] == f"{site.url}/jobs/{job}"
        await expect(page.locator("main .status").first).to_contain_text("pending")
        await page.goto(site.url + "/failures")
        await expect(page.locator("main")).to_contain_text("No job has failed")
    assert engine.audit(job)[-1]["reason"] == "no scripts here"


async def test_what_one_tab_does_the_other_shows_by_itself(browser: Browser, site: Site, engine: Engine) -> None:
    job = engine.in_status("failed")
    async with visiting(browser, site) as visitor:
        watching = await visitor.open(f"/jobs/{job}")
        acting = await visitor.open("/jobs?status=failed")
        await connected(watching)
        await acting.get_by_role("link", name="Retry").first.click()
        await acting.get_by_label("Reason").fill("again")
        await acting.keyboard.press("Enter")
        await expect(acting.locator(".said")).to_be_visible()
        await watching.bring_to_front()
        await expect(watching.locator("main .status").first).to_contain_text("pending")
        (claim,) = engine.claim(1)
        engine.call("progress", claim.id, claim.token, 42, "Processing chunk 5/12")
        await expect(watching.locator("main")).to_contain_text("Processing chunk 5/12")
        await expect(watching.locator("main progress").first).to_have_attribute("value", "42")
        engine.fail(claim, PERMANENT)
        await expect(watching.locator("main .status").first).to_contain_text("failed")


async def connected(page: Page) -> None:
    """Wait until the stream of a page stands: from then on nothing is missed."""
    await expect(page.locator("#updated")).to_be_visible()
    await expect(page.locator("#stream")).to_have_count(1)


async def test_a_stream_that_breaks_is_told_polled_around_and_taken_up_again(
    browser: Browser, site: Site, engine: Engine
) -> None:
    job = engine.send(display_name="Waits")
    async with visiting(browser, site) as visitor:
        visitor.expect_problems("net::ERR", "htmx:sse:error")
        page = await visitor.open("/jobs")
        await connected(page)
        await page.route("**/ui/live", lambda route: route.abort())
        assert site.cut_streams() == 1
        await expect(page.locator("#offline")).to_be_visible()
        await expect(page.locator("#offline")).to_contain_text("every 5 seconds")
        engine.call("cancel", job, "nobody hears of it")
        engine.send(display_name="Sent meanwhile")
        await expect(page.locator("tbody")).to_contain_text("Sent meanwhile")
        await expect(page.locator("tbody")).not_to_contain_text("Waits")
        await page.unroute("**/ui/live")
        await expect(page.locator("#offline")).to_be_hidden()
        engine.send(display_name="Heard at once")
        await expect(page.locator("tbody")).to_contain_text("Heard at once")


async def test_ten_thousand_jobs_are_retried_after_a_dry_run_and_the_number_typed(
    browser: Browser, site: Site, engine: Engine
) -> None:
    engine.run(
        "insert into jobqueue.job (queue, job_type, status, completed_at, failed_at, error_class, error_code, error_message) "
        "select 'q', 'q', 'failed', now(), now(), 'transient', 'E', 'x' from generate_series(1, 10000)"
    )
    async with visiting(browser, site) as visitor:
        page = await visitor.open("/jobs?status=failed")
        await page.get_by_label("All 10,000 that match").check()
        await page.locator("#selection").get_by_role("button", name="Retry").click()
        dialog = page.locator("#dialog")
        await expect(dialog).to_contain_text("10,000 would be done")
        await dialog.get_by_label("Reason").fill("the service is back")
        await dialog.get_by_label("Type the number").fill("9999")
        await page.keyboard.press("Enter")
        assert await dialog.get_by_label("Type the number").evaluate("e => e.validity.patternMismatch")
        assert engine.count("bulk_operation") == 0
        await dialog.get_by_label("Type the number").fill("10000")
        await page.keyboard.press("Enter")
        await expect(dialog).to_be_hidden()
        for _ in range(2):
            engine.call("run_bulk", None, 500)
        await page.goto(site.url + "/bulks")
        line = page.locator("tbody tr")
        await expect(line).to_contain_text(["retry 10,000 jobs"])
        await expect(line).to_contain_text(["the service is back"])
        await expect(line.locator("progress")).to_have_attribute("value", "10")
    assert engine.value("select count(*) from jobqueue.job where status = 'pending' and queue = 'q'") == 1_000
