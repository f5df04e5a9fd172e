"""How a worker's connections read rows: one tuple per row, uuids as text, JSON as bytes that are decoded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from psycopg import AsyncConnection, pq
from psycopg.types.string import ByteaBinaryLoader, TextLoader


class UndecodedJson(ByteaBinaryLoader):
    """Leave JSON as it came: most handlers read a part of it, many none, and a validator reads bytes faster than we do."""

    format = pq.Format.TEXT


def prepare_rows(connection: AsyncConnection[Any], row_type: type[tuple[Any, ...]] | None = None) -> None:
    """Make a connection return rows as `row_type` (a NamedTuple; plain tuples unless told), and prepare every statement."""
    connection.adapters.register_loader("uuid", TextLoader)
    if connection.prepare_threshold is not None:
        connection.prepare_threshold = 0
    if row_type is not None:
        connection.adapters.register_loader("jsonb", UndecodedJson)
        make = cast("Callable[[Sequence[Any]], Any]", row_type._make)  # type: ignore[attr-defined]
        connection.row_factory = lambda cursor: make
