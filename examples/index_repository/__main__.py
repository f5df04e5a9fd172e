"""`python -m examples.index_repository [PATH]`: send the job, run a worker until it is done, and say what was found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.command import completed, run_job
from examples.index_repository.app import app
from examples.index_repository.git import is_url


def main() -> int:
    """Run from the command line; returns 0 if the repository was indexed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.index_repository", description=__doc__)
    parser.add_argument("path", nargs="?", default=".", help="folder or URL of a git repository (default: this folder)")
    parser.add_argument("--ref", default="HEAD", help="branch, tag or commit (default: HEAD)")
    given = parser.parse_args()
    path = given.path if is_url(given.path) else str(Path(given.path).resolve())

    async def send() -> object:
        return (await app.send("index_repository", {"path": path, "ref": given.ref})).id

    record = run_job(app, "index_repository", send)
    if record is None or not completed(record):
        return 1
    found = record.result or {}
    print(
        f"{found['files_indexed']} files indexed, {found['files_skipped']} skipped, "
        f"{found['symbols_extracted']} symbols at commit {found['commit_sha']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
