"""What was measured: medians over the runs, the limits of the same runs, and the median of the ratios of the pairs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Bar:
    """What the product must reach: `of` (the ratio to the limit, or the median) at least or at most `bound`."""

    bound: float
    at_most: bool = False
    of: str = "ratio"

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self.bound:g}" + (" of limit" if self.of == "ratio" else "")

    def is_met(self, figure: float) -> bool:
        """Whether a figure reaches the bar."""
        return figure <= self.bound if self.at_most else figure >= self.bound


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: a value per run, and the limit measured beside each, if there is one."""

    name: str
    unit: str
    values: Sequence[float]
    limits: Sequence[float] = ()
    bars: Sequence[Bar] = ()
    note: str = ""

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.values)

    @property
    def ratios(self) -> list[float]:
        """Measured by limit, run by run."""
        return [value / limit for value, limit in zip(self.values, self.limits, strict=True)] if self.limits else []

    @property
    def ratio(self) -> float | None:
        """The median of the ratios; None without a limit."""
        return statistics.median(self.ratios) if self.limits else None

    def met(self) -> bool | None:
        """Whether all bars are reached; None if there is none."""
        if not self.bars:
            return None
        figures = {"ratio": self.ratio, "median": self.median}
        return all(bar.is_met(figure) for bar in self.bars if (figure := figures[bar.of]) is not None)

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "values": list(self.values),
            "limit": statistics.median(self.limits) if self.limits else None,
            "limits": list(self.limits),
            "ratio": self.ratio,
            "ratios": self.ratios,
            "bars": [str(bar) for bar in self.bars],
            "met": self.met(),
            "note": self.note,
        }


@dataclass(slots=True)
class Report:
    """The result of one benchmark. `facts`: how it was run."""

    benchmark: str
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as it stands in the file."""
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
        return {
            "benchmark": self.benchmark,
            "facts": self.facts,
            "machine": machine,
            "rows": [row.as_json() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")

    def show(self) -> None:
        """Print the table."""
        table = Table(
            title=f"bench {self.benchmark}", title_justify="left", box=None, header_style="bold", pad_edge=False
        )
        for column in ("measured", "unit", "median", "low", "high", "limit", "ratio", "bar", "met", ""):
            table.add_column(
                column, justify="right" if column in ("median", "low", "high", "limit", "ratio") else "left"
            )
        for row in self.rows:
            table.add_row(*_cells(row))
        facts = "  ".join(f"{name}={value}" for name, value in self.facts.items())
        console = Console() if os.isatty(1) else Console(width=180)
        console.print(table)
        console.print(facts, style="dim")


def _cells(row: Row) -> list[str]:
    met = {True: "yes", False: "NO", None: ""}[row.met()]
    return [
        row.name,
        row.unit,
        number(row.median),
        number(min(row.values)),
        number(max(row.values)),
        number(statistics.median(row.limits)) if row.limits else "",
        f"{row.ratio:.2f}" if row.ratio is not None else "",
        ", ".join(map(str, row.bars)),
        met,
        row.note,
    ]


def number(figure: float) -> str:
    """A figure with as many digits as mean something."""
    if abs(figure) >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.3g}"
