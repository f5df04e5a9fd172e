"""The real command line: in this process, or as one of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from jobqueue.cli import main

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 120.0


def command_line(*arguments: object) -> list[str]:
    """The program and its arguments."""
    return [sys.executable, "-m", "jobqueue", *map(str, arguments)]


def environment(dsn: str | None = None, **variables: str) -> dict[str, str]:
    """Ours without what would lead to another database, plus `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JOBQUEUE_", "PG"))}
    return {**kept, **({"JOBQUEUE_DSN": dsn} if dsn is not None else {}), "COLUMNS": "200", **variables}


def run(
    *arguments: object, dsn: str | None = None, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in this process, and return its exit code, stdout and stderr.

    A process of its own costs half a second of imports, more than all the rest of most tests. Those that depend on one
    use `run_process`. An exception that the program itself does not turn into an exit code is raised here.
    """
    wanted = environment(dsn, **variables)
    changes = {**dict.fromkeys(os.environ.keys() - wanted.keys()), **wanted}
    with contextlib.chdir(REPOSITORY):
        done = CliRunner().invoke(main, [*map(str, arguments)], input=stdin, env=changes, prog_name="jobqueue")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def run_process(
    *arguments: object, dsn: str | None = None, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own: for what replaces the process, starts others, or is about the process."""
    return subprocess.run(
        command_line(*arguments),
        cwd=REPOSITORY,
        env=environment(dsn, **variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def start(*arguments: object, dsn: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a command; stdout and stderr are pipes, `options` are those of Popen."""
    return subprocess.Popen(
        command_line(*arguments),
        **{"cwd": REPOSITORY, "env": environment(dsn), "stdin": subprocess.DEVNULL, "text": True, **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts its background jobs with SIGINT ignored, and a child would inherit that from the tests.
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
