"""`python -m examples.import_dataset [FILE]`: upload a CSV or Excel file, run a worker until it is imported, say what it is.

Without a file: makes "readings.csv", 20,000 rows, in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import sys
import tempfile
from pathlib import Path

from psycopg import AsyncConnection

from examples.command import completed, run_job
from examples.import_dataset.app import app, receive
from examples.import_dataset.store import TABLES


def main() -> int:
    """Run from the command line; returns 0 if the file was imported, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.import_dataset", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a .csv or .xlsx file (default: one that is made now)")
    given = parser.parse_args()
    path: Path = given.file or _sample()
    record = run_job(app, "import_dataset", lambda: _upload(path))
    if record is None or not completed(record):
        return 1
    found = record.result or {}
    if found["duplicate"]:
        print(f"has been imported before: dataset {found['dataset']}")
        return 0
    columns = ", ".join(f"{column['name']} ({column['kind']})" for column in (record.stats or {})["columns"])
    print(f"{found['rows']} rows, {len(found['rejected'])} rejected: {columns}; dataset {found['dataset']}")
    return 0


async def _upload(path: Path) -> str:
    dsn = await asyncio.to_thread(app.resolve_dsn)
    content = await asyncio.to_thread(path.read_bytes)
    async with TABLES.open(dsn), await AsyncConnection.connect(dsn) as connection:
        return str(await receive(connection, path.name, content, getpass.getuser()))


def _sample() -> Path:
    from examples.import_dataset.sample import make_csv

    folder = Path(tempfile.gettempdir()) / "import_dataset"
    folder.mkdir(exist_ok=True)
    return make_csv(folder / "readings.csv")


if __name__ == "__main__":
    sys.exit(main())
