"""The table: one row per fault."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chaos_lab.checker import Violation, late_starts
from chaos_lab.history import History
from chaos_lab.plan import FINAL
from chaos_lab.recovery import Pace

COLUMNS = (
    *("fault", "injections", "jobs", "attempts", "ended", "before/s", "during"),
    *("recovery s", "rerun s", "api s", "late", "violations"),
)
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did. `kept`: where its history is, if something is wrong with it. `skipped`: why it was not tried."""

    fault: str
    says: str
    history: History | None
    paces: Sequence[Pace]
    violations: Sequence[Violation]
    kept: Path | None = None
    skipped: str = ""

    def figures(self) -> dict[str, Any]:
        """The row. `recovery`, `rerun`, `api`: the worst of all injections, in seconds; `during`: the lowest share of the
        rate before. `late`: handlers that went on after their claim had ended, which is refused."""
        history = self.history
        if history is None:
            return {"fault": self.fault, "skipped": self.skipped}
        before = self.paces[0].before if self.paces else None
        during = [pace.during / before for pace in self.paces if pace.during is not None and before]
        late = late_starts(history)
        return {
            "fault": self.fault,
            "injections": len(history.injections),
            "jobs": len(history.finals),
            "attempts": sum(move.became == "processing" for move in history.moves),
            "ended": sum(final.status in FINAL for final in history.finals),
            "before": before,
            "during": min(during, default=None),
            "recovery": _worst([pace.recovery for pace in self.paces]),
            "rerun": _worst([pace.rerun for pace in self.paces]),
            "api": _worst([pace.api for pace in self.paces]),
            "late": late["start"] + late["end"],
            "violations": len(self.violations),
        }


def _worst(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, and below it what is wrong."""
    table = Table(title="chaos", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "fault" else "right")
    for outcome in outcomes:
        figures = outcome.figures()
        if outcome.skipped:
            table.add_row(outcome.fault, f"not tried: {outcome.skipped}")
        else:
            table.add_row(*map(_cell, figures.values()))
    console = Console() if os.isatty(1) else Console(width=160)
    console.print(table)
    for outcome in outcomes:
        for violation in outcome.violations[:SHOWN]:
            console.print(
                f"{outcome.fault}: {violation.rule}: {violation.job} {violation.text}", style="red", highlight=False
            )
        if len(outcome.violations) > SHOWN:
            console.print(f"{outcome.fault}: and {len(outcome.violations) - SHOWN} more")
        if outcome.kept is not None:
            console.print(f"{outcome.fault}: the history is in {outcome.kept}", highlight=False)


def write(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([outcome.figures() for outcome in outcomes], indent=2) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.2f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}"
