"""Data on stdout: a table for people, JSON or JSON lines for programs. Everything else belongs on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import click

FORMATS = ("table", "json", "jsonl")

Row = Mapping[str, Any]


def emit_rows(rows: Iterable[Row], columns: Sequence[str], output: str = "table") -> None:
    """Write a list: the named columns as a table, all keys as `json` (one array) or `jsonl` (one object a line)."""
    if output == "jsonl":
        for row in rows:
            click.echo(to_json(row))
    elif output == "json":
        click.echo(to_json(list(rows), indent=2))
    else:
        _emit_table(list(rows), columns)


def emit_object(row: Row, output: str = "table") -> None:
    """Write one thing: a line per key as a table, else one JSON object."""
    if output == "table":
        _emit_table([{"name": name, "value": value} for name, value in row.items()], ("name", "value"))
    else:
        click.echo(to_json(row, indent=2 if output == "json" else None))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the API writes it: times in RFC 3339, durations in seconds, ids as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=_json_default)


def _json_default(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _emit_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    if sys.stdout.isatty():
        _emit_rich(cells, columns)
    else:
        _emit_plain(cells, columns)


def cell(value: Any) -> str:
    """A value as people read it, on one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.3f} s"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, dict | list):
        return to_json(value)
    return " ".join(str(value).split())


def _emit_plain(cells: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _emit_rich(cells: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    # Imported here: 60 ms that pipes and JSON need not pay. It honours NO_COLOR by itself.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)
