"""A PgBouncer in transaction mode in front of the test's database, and what clients need to use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobqueue import App
from jobqueue.settings import load_settings
from tests.support.pgbouncer import PgBouncer, pgbouncer, program


@pytest.fixture
def pooler(dsn: str) -> Iterator[PgBouncer]:
    """PgBouncer; its `dsn` leads through it, the fixture `dsn` around it."""
    if program() is None:
        pytest.skip("needs pgbouncer")
    with pgbouncer(dsn) as running:
        yield running


@pytest.fixture(params=[True, False], ids=["listening directly", "polling"])
def settings(request: pytest.FixtureRequest, dsn: str, pooler: PgBouncer) -> dict[str, Any]:
    """The settings of a program behind the pooler, with and without a direct connection for notifications."""
    return {"dsn": pooler.dsn, "pooler": True, "listen_dsn": dsn if request.param else None, "poll_interval": 0.2}


@pytest.fixture
def app(settings: dict[str, Any]) -> App:
    """An application behind the pooler."""
    return App(settings=load_settings(**settings))
