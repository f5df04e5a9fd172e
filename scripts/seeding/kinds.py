"""What the seeded jobs are: queues, job_types, how long they take, how often they fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """One job_type. `share`: of all jobs; `seconds`: its typical run; `failing`: the share that ends as failed."""

    queue: str
    job_type: str
    share: float
    seconds: float
    failing: float
    label: str
    subject: str
    stages: tuple[str, ...] = ()


KINDS = (
    Kind("documents", "process_document", 0.50, 40.0, 0.03, "Processing: {}.pdf", "document", ("read", "chunk", "merge")),
    Kind("documents", "make_thumbnail", 0.20, 0.4, 0.01, "Thumbnail of {}.pdf", "document"),
    Kind("exports", "export", 0.12, 25.0, 0.05, "Export: {} documents", "export"),
    Kind("mail", "send_mail", 0.15, 0.2, 0.08, "Mail {}", "user"),
    Kind("indexing", "index_repository", 0.0295, 90.0, 0.04, "Indexing: {}", "repository", ("scan", "parse", "store")),
    Kind("reports/yearly", "report", 0.0005, 600.0, 0.10, "Report {}", "report"),
)  # fmt: skip
"""The last one is rare, as one queue of a real database often is: lists of it are the hard ones."""


def kinds_of(queues: Sequence[str]) -> list[dict[str, Any]]:
    """Return the kinds as JSON, each with `upto`, the upper end of its share; with queues of these names, if any are given."""
    kinds: Sequence[Kind] = KINDS
    if queues:
        models = [KINDS[i % len(KINDS)] for i in range(len(queues))]
        kinds = [
            replace(model, queue=name, job_type=name, share=1 / len(queues))
            for name, model in zip(queues, models, strict=True)
        ]
    rows, upto = [], 0.0
    for kind in kinds:
        upto += kind.share
        rows.append({**asdict(kind), "above": upto - kind.share, "upto": upto})
    return [*rows[:-1], {**rows[-1], "upto": 1.0}]
