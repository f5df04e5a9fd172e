"""The first commands of the README as an ordinary user, in a clone of his own; needs root, to become him."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "jobqueue-compat"


def run(tests: Sequence[str], source: Path) -> list[str]:
    """Make a user, clone `source` for him, run `./scripts/run --exit` twice and these tests, and remove him again."""
    if os.geteuid() != 0:
        return ["needs root, to become another user"]
    home = Path(tempfile.mkdtemp(prefix="jobqueue-user-", dir="/var/tmp"))
    subprocess.run(["useradd", "--system", "--no-create-home", "--home-dir", str(home), NAME], check=True)
    try:
        entry = pwd.getpwnam(NAME)
        clone = home / "jobqueue"
        subprocess.run(["git", "clone", "--quiet", str(source), str(clone)], check=True)
        for path in [home, *home.rglob("*")]:
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        commands = [["./scripts/run", "--exit"], ["./scripts/run", "--exit"]]
        if tests:
            commands.append(["./scripts/test", "-q", *tests])
        # One after another; what goes wrong in one of them is no reason to leave the others out.
        return [" ".join(command) for command in commands if not _succeeds(command, clone, entry)]
    finally:
        _stop_server(home)
        subprocess.run(["userdel", NAME], check=True)
        shutil.rmtree(home)


def _succeeds(command: list[str], clone: Path, entry: pwd.struct_passwd) -> bool:
    print(f"== as {NAME}: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=clone, env=_environ(entry), **_as(entry)).returncode == 0


def _environ(entry: pwd.struct_passwd) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TERM", "PIP_INDEX_URL", "CI")}
    return {
        **kept,
        "HOME": entry.pw_dir,
        "USER": NAME,
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/lib/postgresql/15/bin",
    }


def _as(entry: pwd.struct_passwd) -> dict[str, object]:
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": [], "stdin": subprocess.DEVNULL}


def _stop_server(home: Path) -> None:
    """The embedded server stays up after `scripts/run`, as it should."""
    command = [str(home / "jobqueue/.venv/bin/jobqueue"), "server", "stop"]
    if Path(command[0]).exists():
        subprocess.run(command, cwd=home, env=_environ(pwd.getpwnam(NAME)), **_as(pwd.getpwnam(NAME)))
