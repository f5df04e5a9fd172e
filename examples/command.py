"""What the commands of the examples share: send a job, run a worker until it has ended, and show how far it is.

In an application these are two programs: one sends, `jobqueue worker the.app` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from jobqueue import App, JobqueueError, JobRecord

POLL_SECONDS = 0.2

Show = Callable[[JobRecord], object]

console = Console(stderr=True)


def run_job(app: App, name: str, send: Callable[[], Awaitable[object]]) -> JobRecord | None:
    """Send a job of a handler, run it here and return how it ended; None, with the reason on stderr, if it cannot be run.

    `send`: sends it and returns its id.
    """
    try:
        return asyncio.run(_run(app, name, send))
    except (JobqueueError, OSError) as error:
        complain(f"{error}\n{getattr(error, 'hint', None) or ''}".rstrip())
    except KeyboardInterrupt:
        complain("Stopped; the job goes on from here when a worker runs again.")
    return None


def completed(record: JobRecord | None) -> bool:
    """Whether the job is completed; if not, stderr says why."""
    if record is None:
        return False
    if record.status != "completed":
        complain(f"The job is {record.status}{f': {record.error_message}' if record.error_message else ''}")
    return record.status == "completed"


def complain(text: str) -> None:
    """Say on stderr what is wrong."""
    console.print(text, style="red", markup=False, highlight=False)


async def _run(app: App, name: str, send: Callable[[], Awaitable[object]]) -> JobRecord:
    async with app:
        job_id = str(await send())
        worker = asyncio.create_task(app.run_worker(queues=[app.registry[name].queue], until_idle=True))
        try:
            with _display() as show:
                return await _follow(app, job_id, worker, show)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _follow(app: App, job_id: str, worker: asyncio.Task[None], show: Show) -> JobRecord:
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
