"""The tests of tests/pooler, with each PgBouncer at hand and each way to prepare statements that it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.pgbouncer import program

ROOT = Path(__file__).resolve().parents[2]
PREPARES_SINCE = (1, 21)
"""The first PgBouncer that follows prepared statements from session to session."""


def run(programs: tuple[Path, ...]) -> list[str]:
    """Run the tests with these programs (default: the one that is installed), and return what fails."""
    found = [str(path) for path in programs] or [path for path in (program(),) if path]
    if not found:
        return ["no pgbouncer: apt-get install pgbouncer"]
    faults = []
    for path in found:
        for settings in ("max_prepared_statements=0", "max_prepared_statements=200") if _prepares(path) else ("",):
            what = f"{path} {version(path)} {settings}".strip()
            print(f"== {what}", flush=True)
            environ = {**os.environ, "JOBQUEUE_TEST_PGBOUNCER": path, "JOBQUEUE_TEST_PGBOUNCER_SETTINGS": settings}
            if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/pooler"], cwd=ROOT, env=environ).returncode:
                faults.append(what)
    return faults


def version(path: str) -> str:
    """The version that a program says it has."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return (re.search(r"\d+\.\d+(\.\d+)?", said) or [""])[0]


def _prepares(path: str) -> bool:
    return tuple(map(int, version(path).split(".")[:2])) >= PREPARES_SINCE
