"""The OpenAPI document: valid, complete, and the one that is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from openapi_spec_validator import validate

from jobqueue.api.app import OPERATIONS
from jobqueue.api.errors import STATUS_OF_CODE
from jobqueue.api.models import SendJob
from jobqueue.api.openapi import build_document, to_text
from tests.support.server import value

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document(OPERATIONS)


def test_it_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_the_committed_one_is_not_stale(document: dict[str, Any]) -> None:
    regenerate = "run: python -m jobqueue.api > docs/openapi.json"
    assert COMMITTED.read_text() == to_text(document), regenerate


def test_every_operation_is_in_it_and_names_known_errors(document: dict[str, Any]) -> None:
    for operation in OPERATIONS:
        shown = document["paths"][operation.path][operation.method.lower()]
        assert shown["operationId"] == operation.name
        assert set(operation.errors) <= STATUS_OF_CODE.keys()


def test_it_knows_the_options_that_the_database_knows(connection: Any) -> None:
    known = set(value(connection, "select jobqueue.job_options()"))
    assert set(SendJob.model_fields) - {"queue", "payload"} == known


async def test_the_served_one_is_the_same(client: httpx2.AsyncClient, document: dict[str, Any]) -> None:
    answer = await client.get("/openapi.json")
    assert answer.json() == document


async def test_answers_have_the_fields_it_says(client: httpx2.AsyncClient, document: dict[str, Any]) -> None:
    sent = (await client.post("/jobs", json={"queue": "q"})).json()
    schema = document["components"]["schemas"]["SentJob"]
    assert set(schema["required"]) <= set(sent) <= set(schema["properties"])
