"""The fixture of the engine's tests: a database of its own with a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.sql.engine import Engine


@pytest.fixture
def engine(connection: psycopg.Connection[tuple[Any, ...]], dsn: str) -> Iterator[Engine]:
    """The engine of the test's database, reached as superuser."""
    opened = Engine(connection, dsn)
    yield opened
    opened.close()
