"""A job's progress on stderr: a bar on a terminal, else a line per change."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from jobqueue.records import JobRecord

LINE_SECONDS = 1.0
"""Least time between two plain lines of the same stage: a log is no animation."""


@contextmanager
def progress_view(*, bar: bool | None = None) -> Iterator[Callable[[JobRecord], None]]:
    """Give a function that shows a job; `bar`: True, False, or None for "if stderr is a terminal"."""
    if not (sys.stderr.isatty() if bar is None else bar):
        yield PlainLines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress).show


class Bar:
    """A rich progress bar with name, percentage, time, stage and message."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def show(self, record: JobRecord) -> None:
        """Draw the job as it is now."""
        if self._task is None:
            self._task = self._progress.add_task(title_of(record), total=100, state="")
        self._progress.update(self._task, completed=record.progress_pct, state=state_of(record))


class PlainLines:
    """`12:00:01   42 %  scan (2/3): 120 of 300 files`, for pipes and logs."""

    def __init__(self) -> None:
        self._shown: tuple[str, str | None, str | None] | None = None
        self._at = 0.0

    def show(self, record: JobRecord) -> None:
        """Write a line, unless it would be the second one of the same stage within a second."""
        key = (record.status, record.requested_action, record.current_stage)
        if key == self._shown and time.monotonic() < self._at + LINE_SECONDS:
            return
        if self._shown is None:
            click.echo(f"{record.id} {title_of(record)}", err=True)
        self._shown, self._at = key, time.monotonic()
        click.echo(f"{time.strftime('%H:%M:%S')}  {record.progress_pct:3d} %  {state_of(record)}", err=True)


def title_of(record: JobRecord) -> str:
    """What people call the job."""
    return record.display_name or record.job_type


def state_of(record: JobRecord) -> str:
    """Where the job stands, in one line: `scan (2/3): 120 of 300 files`, `failed: disk full`."""
    if record.status != "processing":
        why = record.error_message if record.status == "failed" else None
        return record.status + (f": {' '.join(why.split())}" if why else "")
    state = f"{record.requested_action} asked; " if record.requested_action else ""
    if record.current_stage:
        state += record.current_stage
        if record.total_stages:
            state += f" ({min((record.completed_stages or 0) + 1, record.total_stages)}/{record.total_stages})"
    else:
        state += "processing"
    return state + (f": {record.progress_message}" if record.progress_message else "")
