"""docs/pg-boss.md cannot rot: what it names exists, nothing of pg-boss is missing, and it is as its source says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest

import jobqueue
from jobqueue import App, Job, testing
from jobqueue.cli import main
from jobqueue.settings import Settings
from tests.conformance import inventory, table

SQL = "\n".join(path.read_text() for path in sorted((table.ROOT / "sql").glob("functions/*.sql")))
ROUTES = json.loads((table.ROOT / "docs/openapi.json").read_text())["paths"]
SQL_NAMES = """
    select proname from pg_proc where pronamespace = 'jobqueue'::regnamespace
    union select relname from pg_class where relnamespace = 'jobqueue'::regnamespace
"""
SQL_WORDS = """
    select attname from pg_attribute where attrelid in ('jobqueue.jobs'::regclass, 'jobqueue.queues'::regclass)
    union select unnest(jobqueue.job_options() || jobqueue.queue_options() || jobqueue.schedule_options()
        || jobqueue.redrive_options())
    union select unnest(proargnames) from pg_proc where pronamespace = 'jobqueue'::regnamespace
"""
PYTHON_WORDS = {"batch_size", "max_connections", "encode_options", "connection", "search_path", "name", "includeQueued"}
"""Arguments in Python, and words of PostgreSQL and of pg-boss."""


def test_every_test_that_is_named_exists() -> None:
    named = [short for *_, tests, _ in table.rows() for short in tests.split()]
    named += [short for *_, tests in table.load()["policies"] for short in tests.split()]
    assert len(named) > 300
    for short in named:
        folder, test = table.full_name(short).split("::")
        assert Path(table.ROOT / folder).is_file()
        assert test.startswith("test_")


def test_nothing_of_pg_boss_is_missing_and_nothing_is_invented() -> None:
    named = set().union(*(table.theirs_of(theirs) for theirs, *_ in table.rows() if theirs))
    assert inventory.names() - named == set()
    assert named - inventory.names() == set()
    assert tuple(row[0] for row in table.load()["policies"]) == inventory.POLICIES
    assert tuple(row[0] for row in table.load()["states"]) == inventory.STATES
    assert sorted(table.load()["files"]) == sorted(inventory.test_files())
    assert len(table.load()["quick"]) >= 30
    for call, _ in table.load()["quick"]:
        assert re.split(r"\W", call.removeprefix("boss."))[0] in inventory.FUNCTIONS, call


def test_every_row_has_a_test_or_a_reason() -> None:
    for theirs, ours, tests, why in table.rows():
        assert tests or why, (theirs, ours)


def test_what_is_named_of_ours_exists(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    objects = {name for (name,) in connection.execute(SQL_NAMES)}
    words = {word for (word,) in connection.execute(SQL_WORDS)} | set(inventory.POLICIES) | PYTHON_WORDS
    unknown = [span for text in _texts() for span in table.spans(text) if not _is_known(span, objects, words)]
    assert unknown == []


def test_the_document_is_fresh() -> None:
    assert table.DOCUMENT.read_text() == table.render(), "python -m tests.conformance writes it anew"


@pytest.mark.parametrize(
    "span",
    [
        "jobqueue.sent",
        "app.sendt(name)",
        "jobqueue jobs lst",
        "singelton_key",
        "jobqueue send --x",
        "GET /job",
        "scripts/no",
    ],
)
def test_a_name_that_does_not_exist_is_found(span: str) -> None:
    assert not _is_known(span, {"send"}, {"singleton_key"})


def _texts() -> list[str]:
    data = table.load()
    texts = [each for _, ours in (*data["quick"], *data["states"]) for each in (ours,)]
    texts += [why for _, why in data["differences"]] + [note for _, _, note, _ in data["policies"]]
    return texts + [cell for _, ours, _, why in table.rows() for cell in (ours, why)]


def _is_known(span: str, objects: set[str], words: set[str]) -> bool:
    if span.startswith("jobqueue "):
        return _is_command(span.split()[1:])
    if tool := re.fullmatch(r"jobqueue\.testing\.(\w+)", span):
        return hasattr(testing, tool[1])
    settings = re.findall(r"\bJOBQUEUE_([A-Z_]+)", span)
    names = re.findall(r"\bjobqueue\.(\w+)", span)
    methods = re.findall(r"\b(app|job)\.(\w+)", span)
    if re.fullmatch(r"\w+=?", span) and not settings:
        word = span.removesuffix("=")
        return word in words | objects or f"'{word}'" in SQL or hasattr(jobqueue, word)
    if route := re.fullmatch(r"(GET|POST|PATCH|DELETE) (/\S+)", span):
        return route[1].lower() in ROUTES.get(route[2], {})
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", span):
        return (table.ROOT / span).exists()
    return (
        all(name.lower() in Settings.model_fields for name in settings)
        and all(name in objects for name in names)
        and all(hasattr(App if owner == "app" else Job, name) for owner, name in methods)
    )


def _is_command(given: list[str]) -> bool:
    command: click.Command | None = main
    for word in given:
        if word.startswith("--"):
            return command is not None and any(word in parameter.opts for parameter in command.params)
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), word)
            if command is None:
                return False
    return command is not None
