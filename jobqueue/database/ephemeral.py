"""Homes of ephemeral servers: made in /var/tmp, and swept there when their server died with a killed process."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from jobqueue.database import cluster
from jobqueue.database.cluster import Home

PREFIX = "jobqueue-ephemeral-"
PARENT = Path("/var/tmp")  # noqa: S108
"""Not pytest's tmp_path: for root that is 0700, and the server does not run as root."""


def make_ephemeral_home(parent: Path = PARENT) -> Path:
    """Create an empty folder for an ephemeral server that the server's account can enter."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    if os.geteuid() == 0:
        path.chmod(0o711)
    return path


def sweep_ephemeral_homes(parent: Path = PARENT, *, older_than: float = 60.0) -> list[Path]:
    """Delete our own abandoned homes and return them.

    Args:
        parent: the folder to look in.
        older_than: seconds since the folder was made; a younger one may belong to a process that has not locked it yet.
    """
    swept = []
    for path in parent.glob(f"{PREFIX}*"):
        try:
            facts = path.lstat()
            if facts.st_uid == os.geteuid() and time.time() - facts.st_mtime >= older_than and _sweep(Home(path)):
                swept.append(path)
        except OSError:
            # Another process sweeps the same folder.
            continue
    return swept


def _sweep(home: Home) -> bool:
    lock = cluster.try_lock(home)
    if lock is None:
        return False
    try:
        cluster.remove(home)
    finally:
        os.close(lock)
    return True
