"""The API as a client meets it, on a database of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx2
import psycopg
import pytest
from starlette.applications import Starlette

from jobqueue.api import create_app, openapi
from jobqueue.settings import Settings, load_settings
from tests.support.server import value


@pytest.fixture(scope="session", autouse=True)
def schemas_made_once() -> Iterator[None]:
    """The schemas of the OpenAPI document follow from the code alone; to make them for every application took 100 ms and
    more, which was half of most tests here."""
    make, made = openapi.models_json_schema, dict[Any, Any]()

    def once(models: Any, **options: Any) -> Any:
        key = (*models, *options.items())
        if key not in made:
            made[key] = make(models, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openapi, "models_json_schema", once)
        yield


@cache
def _settings(environment: frozenset[tuple[str, str]], **given: Any) -> Settings:
    """What follows from an environment; to read it takes 10 ms, which was a tenth of most tests here."""
    return load_settings(**given)


@asynccontextmanager
async def serving(
    dsn: str, settings: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application that has been started; `client.app` is the application."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    given = _settings(frozenset(environment.items()), dsn=dsn, start_timeout=60.0, **(settings or {}))
    app = create_app(given, **options)
    transport = httpx2.ASGITransport(app=app)
    async with app.router.lifespan_context(app):
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client


@pytest.fixture
async def client(dsn: str, connection: psycopg.Connection[tuple[Any, ...]]) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the API with the queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as client:
        yield client


@pytest.fixture
def app(client: httpx2.AsyncClient) -> Starlette:
    """The application behind `client`."""
    return client.app  # type: ignore[attr-defined, no-any-return]


async def send(client: httpx2.AsyncClient, **options: Any) -> str:
    """Send a job and return its id."""
    answer = await client.post("/jobs", json={"queue": "q", **options})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["jobId"])


def keep_alive(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Let the jobs that run be alive for an hour: nobody beats for them, and their ETags are to stay as they are."""
    connection.execute("update jobqueue.job set heartbeat_at = now() + interval '1 hour' where status = 'processing'")


def job_count(connection: psycopg.Connection[tuple[Any, ...]]) -> int:
    """How many jobs the database holds."""
    return int(value(connection, "select count(*) from jobqueue.job"))


def start_job(connection: psycopg.Connection[tuple[Any, ...]]) -> tuple[str, str]:
    """Claim the next job of `q`; its id and claim token."""
    row = connection.execute(
        "select id::text, claim_token::text from jobqueue.claim(array['q'], gen_random_uuid(), 1)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]
