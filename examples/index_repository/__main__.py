"""`python -m examples.index_repository [PATH]`: send the job, run a worker until it is done, and say what was found."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from examples.index_repository.app import QUEUE, app, index_repository
from examples.index_repository.git import is_url
from jobqueue import JobqueueError, JobRecord

POLL_SECONDS = 0.2

Show = Callable[[JobRecord], object]

console = Console(stderr=True)


def main() -> int:
    """Run from the command line; returns 0 if the repository was indexed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.index_repository", description=__doc__)
    parser.add_argument("path", nargs="?", default=".", help="folder or URL of a git repository (default: this folder)")
    parser.add_argument("--ref", default="HEAD", help="branch, tag or commit (default: HEAD)")
    given = parser.parse_args()
    path = given.path if is_url(given.path) else str(Path(given.path).resolve())
    try:
        record = asyncio.run(_run({"path": path, "ref": given.ref}))
    except JobqueueError as error:
        console.print(f"{error}\n{error.hint or ''}".rstrip(), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; the job goes on from here when a worker runs again.")
        return 1
    return _report(record)


async def _run(payload: dict[str, str]) -> JobRecord:
    async with app:
        sent = await app.send(index_repository, payload)
        worker = asyncio.create_task(app.run_worker(queues=[QUEUE], until_idle=True))
        try:
            with _display() as show:
                return await _follow(str(sent.id), worker, show)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _follow(job_id: str, worker: asyncio.Task[None], show: Show) -> JobRecord:
    """Show the job until it has ended, or the worker has: then it waits for a retry, or the worker failed."""
    while True:
        alone = worker.done()
        record = await app.get(job_id)
        show(record)
        if record.done:
            return record
        if alone:
            worker.result()
            return record
        await asyncio.wait([worker], timeout=POLL_SECONDS)


@contextlib.contextmanager
def _display() -> Iterator[Show]:
    """A bar on a terminal, else a line for every change."""
    if not console.is_terminal:
        yield _line_printer()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("waiting", total=100)
        yield lambda record: bar.update(task, completed=record.progress_pct, description=_text_of(record))


def _line_printer() -> Show:
    printed: list[str] = [""]

    def show(record: JobRecord) -> None:
        line = f"{record.progress_pct:3d} % {_text_of(record)}"
        if line != printed[0]:
            printed[0] = line
            console.print(line, markup=False, highlight=False)

    return show


def _text_of(record: JobRecord) -> str:
    return record.progress_message or record.current_stage or record.status


def _report(record: JobRecord) -> int:
    if record.status == "completed":
        found = record.result or {}
        print(
            f"{found['files_indexed']} files indexed, {found['files_skipped']} skipped, "
            f"{found['symbols_extracted']} symbols at commit {found['commit_sha']}"
        )
        return 0
    reason = f": {record.error_message}" if record.error_message else ""
    console.print(f"The job is {record.status}{reason}", style="red", markup=False, highlight=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
