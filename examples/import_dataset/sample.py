"""Makes files that the example is tried with: the readings of a harbour's tide gauges, as CSV and as Excel."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

from openpyxl import Workbook

HEADER = ["reading", "station", "day", "height_m", "storm", "remark"]
STATIONS = ["Port Lacey", "Saltmere", "North Quay"]
REMARKS = [None, None, None, "gauge cleaned", "ice, no reading; estimated", 'observer wrote "about"']
FIRST_DAY = date(2020, 1, 1)


def make_csv(path: Path, rows: int = 20_000) -> Path:
    """Write the readings as CSV, the same ones every time. `rows`: default 20,000."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(readings(rows))
    return path


def make_excel(path: Path, rows: int = 2_000) -> Path:
    """Write the readings as Excel. `rows`: default 2,000."""
    book = Workbook(write_only=True)
    sheet = book.create_sheet("readings")
    sheet.append(HEADER)
    for row in readings(rows):
        sheet.append(row)
    book.save(path)
    return path


def readings(rows: int) -> Iterator[list[object]]:
    """Yield that many readings."""
    chance = random.Random(rows)
    for number in range(1, rows + 1):
        day = FIRST_DAY + timedelta(days=number // 3)
        height = round(chance.uniform(-1.5, 4.5), 2)
        storm = "yes" if height > 4 else "no"
        yield [number, chance.choice(STATIONS), day, height, storm, chance.choice(REMARKS)]
