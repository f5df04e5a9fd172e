"""How a worker's connections read rows: tuples made once per row, uuids as text, JSON by the fastest reader there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from psycopg import AsyncConnection
from psycopg.abc import Buffer
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader


def json_loads() -> Callable[[str | bytes], Any]:
    """Return orjson's reader if it is installed (the extra `fast`), else the standard library's."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads


def prepare_rows(connection: AsyncConnection[Any], row_type: type[tuple[Any, ...]] | None = None) -> None:
    """Make a connection return rows as `row_type` (a NamedTuple; plain tuples unless told) with uuids as text."""
    connection.adapters.register_loader("uuid", TextLoader)
    set_json_loads(cast("Callable[[str | bytes], Any]", json_loads()), connection)
    connection.prepare_threshold = min(connection.prepare_threshold or 0, 1) if connection.prepare_threshold else None
    if row_type is not None:
        make = row_type._make  # type: ignore[attr-defined]

        def row_factory(cursor: Any) -> Callable[[Sequence[Any]], Any]:
            return cast("Callable[[Sequence[Any]], Any]", make)

        connection.row_factory = row_factory


__all__ = ["Buffer", "json_loads", "prepare_rows"]
