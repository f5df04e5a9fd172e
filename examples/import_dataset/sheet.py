"""CSV and Excel files as the job needs them. Blocking, and busy: for threads."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from itertools import islice
from pathlib import PurePath
from typing import Any, Literal
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from openpyxl import load_workbook
from openpyxl.utils.exceptions import InvalidFileException

from examples.import_dataset.kinds import kind_of
from jobqueue import InvalidInput

MAX_COLUMNS = 1000
DELIMITERS = ",;\t|"
# What openpyxl and the libraries below it raise for a file that is no workbook, or half of one.
DAMAGED = (InvalidFileException, BadZipFile, zlib.error, ParseError, EOFError, LookupError, ValueError)

Row = list[str | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read a file."""

    format: Literal["csv", "excel"]
    columns: list[str]
    encoding: str | None = None
    delimiter: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows that follow each other."""

    number: int
    """From 1."""
    first_row: int
    """The number of its first row, from 1; the header does not count."""
    rows: list[Row]
    rejected: list[str]
    """Why rows were left out: `row 17 has 5 cells for 4 columns`."""

    def kinds(self) -> list[list[str]]:
        """Return, for each column, which kinds of values there are."""
        return [
            sorted({kind_of(cell) for cell in column if cell is not None}) for column in zip(*self.rows, strict=True)
        ]

    def filled(self) -> list[int]:
        """Return, for each column, how many cells are not empty."""
        return [sum(cell is not None for cell in column) for column in zip(*self.rows, strict=True)]


def recognize(name: str, content: bytes) -> Layout:
    """Return how to read a file. Raises InvalidInput if it is neither CSV nor Excel, or has no usable header."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in (".csv", ".xlsx"):
        raise InvalidInput(f"{name} is not a file that can be imported; give one that ends in .csv or .xlsx")
    if not content:
        raise InvalidInput(f"{name} is empty")
    if suffix == ".xlsx":
        return Layout("excel", _header(name, _excel_rows(name, content)))
    encoding = _encoding(content)
    delimiter = _delimiter(content.decode(encoding, "replace"))
    return Layout("csv", _header(name, _csv_rows(content, encoding, delimiter)), encoding, delimiter)


def read_batches(name: str, content: bytes, layout: Layout, size: int) -> Iterator[Batch]:
    """Yield the rows below the header, `size` at a time. Raises InvalidInput."""
    if layout.format == "excel":
        rows = _excel_rows(name, content)
    else:
        rows = _csv_rows(content, layout.encoding or "utf-8", layout.delimiter or ",")
    next(rows)
    read, number = 0, 0
    try:
        while part := list(islice(rows, size)):
            number += 1
            yield _batch(number, read + 1, part, len(layout.columns))
            read += len(part)
    except csv.Error as error:
        raise InvalidInput(f"{name} is not valid CSV after row {read}: {error}") from error


def _batch(number: int, first_row: int, rows: list[list[Any]], width: int) -> Batch:
    good: list[Row] = []
    rejected = []
    for position, row in enumerate(rows, first_row):
        cells = [_text_of(cell) for cell in row]
        while len(cells) > width and cells[-1] is None:
            cells.pop()
        if len(cells) > width:
            rejected.append(f"row {position} has {len(cells)} cells for {width} columns")
        elif any(cell is not None for cell in cells):
            good.append(cells + [None] * (width - len(cells)))
    return Batch(number, first_row, good, rejected)


def _header(name: str, rows: Iterable[list[Any]]) -> list[str]:
    columns = [_text_of(cell) or "" for cell in next(iter(rows), [])]
    while columns and not columns[-1]:
        columns.pop()
    if not columns:
        raise InvalidInput(f"{name} has no header; its first row must name the columns")
    if len(columns) > MAX_COLUMNS:
        raise InvalidInput(f"{name} has {len(columns)} columns; at most {MAX_COLUMNS} can be imported")
    for column in columns:
        if not column or columns.count(column) > 1:
            raise InvalidInput(f'{name}: each column needs a name of its own; "{column}" is not one')
    return columns


def _csv_rows(content: bytes, encoding: str, delimiter: str) -> Iterator[list[Any]]:
    text = io.TextIOWrapper(io.BytesIO(content), encoding, errors="replace", newline="")
    return iter(csv.reader(text, delimiter=delimiter))


def _excel_rows(name: str, content: bytes) -> Iterator[list[Any]]:
    """The rows of the first sheet."""
    try:
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        for row in book.worksheets[0].iter_rows(values_only=True):
            yield list(row)
    except DAMAGED as error:
        raise InvalidInput(f"{name} is not an Excel file that can be read: {error}") from error


def _encoding(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _delimiter(text: str) -> str:
    header = text.split("\n", 1)[0]
    return max(DELIMITERS, key=header.count)


def _text_of(cell: Any) -> str | None:
    if cell is None:
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, datetime) and cell.time() == time():
        return cell.date().isoformat()
    if isinstance(cell, date | datetime | time):
        return cell.isoformat()
    # PostgreSQL has no NUL in texts.
    return str(cell).replace("\0", "").strip() or None
