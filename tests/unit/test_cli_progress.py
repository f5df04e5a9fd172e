"""How a job's progress reads, on a terminal and in a log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from jobqueue.cli.following import exit_code_of
from jobqueue.cli.progress import PlainLines, progress_view, state_of
from jobqueue.records import JobRecord

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def record(**columns: Any) -> JobRecord:
    known = {
        "id": UUID(int=1),
        "queue": "q",
        "job_type": "t",
        "status": "processing",
        "priority": 0,
        "tenant": "default",
    }
    times = {"run_at": NOW, "created_at": NOW, "updated_at": NOW}
    numbers = {"progress_pct": 0, "attempt": 1, "retry_count": 0, "resume_count": 0, "version": 1}
    return JobRecord.model_validate({**known, **times, **numbers, **columns})


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"status": "pending"}, "pending"),
        ({}, "processing"),
        ({"progress_message": "7 of 9"}, "processing: 7 of 9"),
        ({"current_stage": "scan"}, "scan"),
        ({"current_stage": "scan", "total_stages": 3, "completed_stages": 1}, "scan (2/3)"),
        ({"current_stage": "scan", "total_stages": 3, "completed_stages": 3}, "scan (3/3)"),
        ({"requested_action": "cancel", "current_stage": "scan"}, "cancel asked; scan"),
        ({"status": "failed", "error_message": "disk\nfull"}, "failed: disk full"),
        ({"status": "completed", "error_message": "of an earlier attempt"}, "completed"),
    ],
)
def test_the_state_in_one_line(columns: dict[str, Any], text: str) -> None:
    assert state_of(record(**columns)) == text


def test_plain_lines_say_every_new_stage_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    for step in range(50):
        lines.show(record(current_stage="scan", progress_pct=step, display_name="Indexing: ."))
    lines.show(record(current_stage="store", progress_pct=50))
    lines.show(record(status="completed", progress_pct=100))
    out, err = capsys.readouterr()
    texts = [line[10:] for line in err.splitlines()[1:]]
    assert out == ""
    assert err.splitlines()[0] == f"{UUID(int=1)} Indexing: ."
    assert (texts[0], texts[-2:]) == ("  0 %  scan", [" 50 %  store", "100 %  completed"])
    assert len(texts) < 10


def test_a_bar_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_view(bar=True) as show:
        show(record(display_name="Export [bold]", progress_pct=40, progress_message="a [/b] c"))
    err = capsys.readouterr().err
    assert "Export [bold]" in err
    assert "40%" in err


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("failed", 1), ("cancelled", 1), ("skipped", 1)])
def test_the_exit_code_of_an_end(status: str, code: int) -> None:
    assert exit_code_of(record(status=status)) == code
