"""Every example of the guide and of the README runs, and shows what it says it shows."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobqueue import App
from tests.docs.blocks import Block, blocks_of, normal, run_python, run_sql
from tests.docs.preludes import PRELUDES, WAIVED

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"
PAGES = [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=lambda page: page.stem)
async def test_the_examples_of_a_page_run(
    page: Path, dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBQUEUE_DSN", dsn)
    connection.execute("set time zone 'UTC'")
    names: dict[str, Any] = {"__name__": "the_page", "app": App(dsn), "dsn": dsn, "text": page.read_text()}
    async with asyncio.timeout(60):
        try:
            await _prepare(page, page.stem, names)
            for number, block in enumerate(blocks_of(page), 1):
                await _prepare(page, f"{page.stem} {number}", names)
                if block.skipped is None and f"{page.stem} {number}" not in WAIVED:
                    await _run(block, page, names, connection)
        finally:
            for value in {id(value): value for value in names.values() if isinstance(value, App)}.values():
                await value.close()
                value.close_sync()


def test_a_block_that_is_not_run_says_why() -> None:
    for page in PAGES:
        for match in re.finditer(r"^```(python|sql) (.*)$", page.read_text(), re.MULTILINE):
            reason = match[2].removeprefix("not run:")
            assert reason != match[2], f"{page.name}: ```{match[1]} {match[2]}"
            assert len(reason.split()) > 2, f"{page.name}: {match[0]}: say why it cannot be run"


def test_what_is_prepared_or_waived_is_there() -> None:
    blocks = {f"{page.stem} {number}" for page in PAGES for number, _ in enumerate(blocks_of(page), 1)}
    pages = {page.stem for page in PAGES}
    assert {key for key in PRELUDES if key not in pages} | WAIVED.keys() <= blocks


def test_the_index_names_every_page_once() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (GUIDE / "README.md").read_text())
    assert sorted(linked) == sorted(page.name for page in GUIDE.glob("*.md") if page.name != "README.md")


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*PAGES, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


async def _prepare(page: Path, key: str, names: dict[str, Any]) -> None:
    if key in PRELUDES:
        await run_python(Block("python", PRELUDES[key], 1, None, None), page, names)


async def _run(block: Block, page: Path, names: dict[str, Any], connection: psycopg.Connection[Any]) -> None:
    for short, full in names.get("substitutes", {}).items():
        block = replace(block, body=block.body.replace(short, full))
    try:
        if block.language == "python":
            shown = await run_python(block, page, names)
        else:
            shown = run_sql(block, connection)
    except Exception as error:
        error.add_note(f"in the example of {page.relative_to(ROOT)}, line {block.line}")
        raise
    if block.shown is not None:
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        assert normal(shown) == normal(block.shown), f"{where} shows:\n{shown}"
