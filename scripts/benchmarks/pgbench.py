"""pgbench: single statements from C, so that a client's own time hides nothing."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.places import program

_RATE = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)
_FAILED = re.compile(r"number of failed transactions: ([0-9]+)")


class PgbenchFailed(RuntimeError):
    """pgbench ended with an error, or some of its transactions failed."""


def statements_per_second(dsn: str, statement: str, *, clients: int, statements: int, timeout: float = 300) -> float:
    """Run one statement `statements` times over all clients, prepared, each a transaction of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.sql")
        script.write_text(statement + ";\n")
        answer = subprocess.run(
            [
                program("pgbench"), "--no-vacuum", "--protocol=prepared", f"--client={clients}",
                f"--jobs={min(clients, 2)}", f"--transactions={max(1, statements // clients)}", f"--file={script}", dsn,
            ],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    failed = _FAILED.search(answer.stdout)
    rate = _RATE.search(answer.stdout)
    if answer.returncode != 0 or rate is None or (failed is not None and failed[1] != "0"):
        raise PgbenchFailed(f"pgbench failed ({answer.returncode}):\n{answer.stdout}\n{answer.stderr}")
    return float(rate[1])
