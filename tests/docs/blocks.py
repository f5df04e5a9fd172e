"""The code blocks of a page of documentation, and how they are run: in order, in one namespace, against one database."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

RUNNABLE = ("python", "sql")
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    `skipped`: the reason in its info string (```sql not run: needs two servers); `shown`: the text block right after it.
    """

    language: str
    body: str
    line: int
    skipped: str | None
    shown: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """Return the runnable blocks of a page."""
    text = page.read_text()
    found = list(FENCE.finditer(text))
    for n, match in enumerate(found):
        language, _, rest = match["info"].strip().partition(" ")
        if language in RUNNABLE:
            following = found[n + 1] if n + 1 < len(found) else None
            shown = following["body"] if following and following["info"].strip() == "text" else None
            if following and text[match.end() : following.start()].strip():
                shown = None
            skipped = rest.removeprefix("not run:").strip() if rest.startswith("not run:") else None
            yield Block(language, match["body"], text.count("\n", 0, match.start()) + 2, skipped, shown)


async def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    """Run a block that may await at its top level; what it prints."""
    padded = "\n" * (block.line - 1) + block.body
    code = compile(padded, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = eval(code, names)
        if inspect.isawaitable(result):
            await result
    return printed.getvalue()


def run_sql(block: Block, connection: psycopg.Connection[Any]) -> str:
    """Run the statements of a block; the rows of the last one that has any columns, as psql shows them."""
    shown = ""
    with connection.cursor() as cursor:
        cursor.execute(block.body.encode())
        while True:
            if cursor.description is not None:
                lines = [[column.name for column in cursor.description], *cursor.fetchall()]
                shown = "\n".join(" | ".join(map(_cell, line)) for line in lines)
            if not cursor.nextset():
                return shown


def normal(text: str) -> list[list[str]]:
    """Return the cells of a text, without the rule under the head and without the padding."""
    lines = [line for line in text.splitlines() if not re.fullmatch(r"[-+]+", line.strip())]
    while lines and not lines[-1].strip():
        lines.pop()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return {True: "t", False: "f"}[value] if isinstance(value, bool) else str(value)
