"""`python -m examples.process_document [FILE.pdf]`: send the job, run a worker until it is done, and say what was found.

Without a file: makes "The Man Who Sold the World.pdf", 50 pages, in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from examples.command import completed, run_job
from examples.process_document.app import app


def main() -> int:
    """Run from the command line; returns 0 if the document was processed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.process_document", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a PDF file (default: one that is made now)")
    parser.add_argument("--strict", action="store_true", help="fail if a page cannot be read")
    given = parser.parse_args()
    path: Path = given.file or _sample()
    payload = {"path": str(path.resolve()), "mode": "strict" if given.strict else "smart"}

    async def send() -> object:
        return (await app.send("process_document", payload, subject=f"document:{path.name}"[:200])).id

    record = run_job(app, "process_document", send)
    if record is None or not completed(record):
        return 1
    found = record.result or {}
    print(
        f"{found['pages']} pages, {found['passages']} passages, {found['vectors']} vectors, {found['names']} names; "
        f"most often: {', '.join(found['mentioned_most'])}"
    )
    if found["unreadable_pages"]:
        print(f"could not be read: pages {', '.join(map(str, found['unreadable_pages']))}")
    return 0


def _sample() -> Path:
    from examples.process_document.sample import TITLE, make_pdf

    folder = Path(tempfile.gettempdir()) / "process_document"
    folder.mkdir(exist_ok=True)
    return make_pdf(folder / f"{TITLE}.pdf")


if __name__ == "__main__":
    sys.exit(main())
