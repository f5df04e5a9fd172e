"""The schemas of the past: what `sql/` was in the commits of this repository, as far as its steps are those of today."""

from __future__ import annotations

import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = "sql/migrations"


@dataclass(frozen=True, slots=True)
class Release:
    """A commit after which `sql/` changed."""

    commit: str
    version: int
    """Its newest step."""

    def unpack(self, folder: Path) -> Path:
        """Write its `sql/` into a folder and return where it is."""
        archive = git("archive", self.commit, "sql")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return folder / "sql"


def git(*arguments: str) -> bytes:
    """What git says about this repository."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def releases() -> list[Release]:
    """The oldest and the newest commit of each version of the schema, oldest first.

    A commit counts if its steps have no gap and are all files of today: an edited one was never released.
    """
    today = {path.name: path.read_bytes() for path in (ROOT / STEPS).glob("*.up.sql")}
    found: dict[int, list[Release]] = {}
    for commit in git("log", "--reverse", "--format=%h", "--", "sql").decode().split():
        names = [name for name in git("ls-tree", "-r", "--name-only", commit, STEPS).decode().split() if ".up." in name]
        steps = {Path(name).name: git("show", f"{commit}:{name}") for name in names}
        complete = [int(name[:4]) for name in sorted(steps)] == list(range(1, len(steps) + 1))
        if steps and complete and all(today.get(name) == text for name, text in steps.items()):
            found.setdefault(len(steps), []).append(Release(commit, len(steps)))
    pairs = ([commits[0], commits[-1]] if len(commits) > 1 else commits for _, commits in sorted(found.items()))
    return [release for pair in pairs for release in pair]
