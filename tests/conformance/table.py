"""docs/pg-boss.md from docs/pg-boss.toml, with the names of tests filled in."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs/pg-boss.toml"
DOCUMENT = ROOT / "docs/pg-boss.md"
SEPARATOR = " · "

HEAD = """\
<!-- Written by `python -m tests.conformance` from docs/pg-boss.toml. -->
# Coming from pg-boss

What pg-boss 12.38 does is here with the same meaning, in SQL, in Python and, where it makes sense, on the command line.
This page says under which name, and which test shows it. Where something is different or missing, it says why.
"""


@functools.cache
def load() -> dict[str, Any]:
    """Return the data of the document."""
    return tomllib.loads(SOURCE.read_text())


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Return every row of the areas and test files: theirs (empty in test files), text to check, tests, why."""
    for area in load()["area"]:
        for theirs, ours, tests, why in area["rows"]:
            yield theirs, ours, tests, why
    for behaviours in load()["files"].values():
        for _, tests, why in behaviours:
            yield "", "", tests, why


def theirs_of(text: str) -> set[str]:
    """Return the names in a first column: `send{id, group} · sendAfter` is send.id, send.group and sendAfter."""
    found: set[str] = set()
    for part in text.split(SEPARATOR):
        name, _, options = part.partition("{")
        found |= {f"{name}.{each.strip()}" for each in options.rstrip("}").split(",")} if options else {name}
    return found


@functools.cache
def tests_of(file: str) -> tuple[str, ...]:
    """Return the names of the test functions of tests/<folder>/test_<file>.py, given as folder/file."""
    folder, _, name = file.partition("/")
    path = ROOT / "tests" / folder / f"test_{name}.py"
    if not path.is_file():
        raise LookupError(f"{path} does not exist")
    body = ast.parse(path.read_text()).body
    return tuple(
        n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name[:5] == "test_"
    )


def full_name(short: str) -> str:
    """Return `tests/sql/test_limits.py::test_some_name` for `sql/limits::some_name`. Raises LookupError without such a test."""
    file, _, name = short.partition("::")
    if f"test_{name}" not in tests_of(file):
        raise LookupError(f"docs/pg-boss.toml names {short}: no such test")
    folder, _, stem = file.partition("/")
    return f"tests/{folder}/test_{stem}.py::test_{name}"


def render() -> str:
    """Return the whole document."""
    data = load()
    parts = [HEAD, "\n## How do I …\n\n", _table(("pg-boss", "here"), [(f"`{a}`", b) for a, b in data["quick"]])]
    parts += [
        "\n## Words\n\n",
        "Queue and job are the same. Data is the payload, output the result, a policy a policy.\n\n",
    ]
    parts.append(_table(("their state", "ours"), [(f"`{a}`", b) for a, b in data["states"]]))
    parts += ["\n## Policies\n\n", "Each counts per `singleton_key`, or per queue for jobs without one.\n"]
    parts.append("A send that is refused answers with the id of the job in its place, and reason policy.\n\n")
    policies = [(f"`{name}`", rule, note, _tests(tests)) for name, rule, note, tests in data["policies"]]
    parts.append(_table(("policy", "how many", "note", "shown by"), policies))
    parts.append("\n## What we do differently, and why\n\n")
    parts += [f"- **{what}.** {why}\n" for what, why in data["differences"]]
    for area in data["area"]:
        lines = [(_code(theirs), ours, _tests(tests), why) for theirs, ours, tests, why in area["rows"]]
        parts += [f"\n## {area['title']}\n\n", _table(("pg-boss", "here", "shown by", "difference"), lines)]
    parts += ["\n## What pg-boss's tests assert, by test file\n\n"]
    lines = [
        (f"`{file}`" if n == 0 else "", behaviour, _tests(tests), why)
        for file, behaviours in data["files"].items()
        for n, (behaviour, tests, why) in enumerate(behaviours)
    ]
    parts.append(_table(("file", "behaviour", "shown by", "difference"), lines))
    return "".join(parts)


def spans(text: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def _code(theirs: str) -> str:
    return ", ".join(f"`{part}`" for part in theirs.split(SEPARATOR))


def _tests(tests: str) -> str:
    return "<br>".join(f"`{full_name(short).removeprefix('tests/')}`" for short in tests.split())


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    rule = "|".join(["---"] * len(head))
    body = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    return f"| {' | '.join(head)} |\n|{rule}|\n{body}"
