"""A small git repository with everything that is awkward about files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

MODULES = 90
PYTHON = '''\
import os

LIMIT = {n}


class Letter:
    """Written."""

    @property
    def text(self):
        return "ü"

    async def send(self):
        def inner():
            pass


def main():
    return LIMIT
'''
FILES: dict[str, bytes] = {
    "web/app.js": b"export const MAX_SIZE = 3;\nexport class Page {\n  open() {\n    return 1;\n  }\n}\n",
    "web/types.ts": b"export interface Shape {\n  area(): number;\n}\n",
    "server/main.go": b"package main\n\nfunc main() {\n}\n",
    "bin/tool": b"#!/usr/bin/env bash\nbuild() {\n  true\n}\n",
    "schema.sql": b"create table t (id int);\n",
    "README.md": b"# no line end",
    "empty.txt": b"",
    "logo.png": b"\x89PNG\0\0",
    "broken.py": b"def broken(:\n    pass\n",
    "broken.js": b"function fine() {}\n\nfunction (((\n",
    "latin.py": b"# -*- coding: latin-1 -*-\nNAME = '\xe4'\n",
    "grüße/日本語.py": "KÄSE = 1\n".encode(),
    'with "quotes"\tand\nlines.py': b"def f(): pass\n",
    "huge.csv": b"1,2,3\n" * 20_000,
}
MAX_FILE_BYTES = 100_000


def git(directory: Path, *arguments: str) -> str:
    """Run git without the settings of whoever runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    names = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", *arguments],
        cwd=directory,
        env={**own, **names, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def make_repository(directory: Path, modules: int = MODULES) -> str:
    """Create the repository and return its commit."""
    for number in range(modules):
        write(directory, f"package/module_{number:03d}.py", PYTHON.replace("{n}", str(number)).encode())
    for name, content in FILES.items():
        write(directory, name, content)
    (directory / os.fsdecode(b"caf\xe9.py")).write_bytes(b"def g(): pass\n")
    (directory / "link").symlink_to("README.md")
    git(directory, "init", "--quiet", "--initial-branch=main")
    return commit(directory)


def write(directory: Path, name: str, content: bytes) -> None:
    """Write a file of the work tree."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def commit(directory: Path) -> str:
    """Commit the work tree and return the commit."""
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--message", "work")
    return git(directory, "rev-parse", "HEAD")
