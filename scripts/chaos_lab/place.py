"""Where it happens: a durable server of our own in a temporary folder, on a small disk if that is to be filled."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from chaos_lab.records import ROLE, Connection
from jobqueue.database.binaries import server_account
from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.ephemeral import make_ephemeral_home, sweep_ephemeral_homes
from jobqueue.database.migrations import migrate_up

DATABASE = "chaos"
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "1GB",
    "max_connections": "120",
    "log_line_prefix": "%m [%p] %a ",
}
WAL_SETTINGS = {"max_wal_size": "128MB", "min_wal_size": "32MB", "wal_recycle": "off", "wal_init_zero": "on"}
"""So that the log needs new files all the time, which a full disk refuses."""
DISK_MIB = {"data": 6144, "wal": 512}
GONE_SECONDS = 30.0


class NotHere(RuntimeError):
    """This machine or this server cannot be tormented in this way; the message says what is missing."""


class Disk:
    """A file system of its own, in memory: it can be made full at any moment, and given room again."""

    def __init__(self, mebibytes: int) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="jobqueue-chaos-disk-", dir="/var/tmp"))
        self.path.chmod(0o711)
        self._mebibytes = mebibytes
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0711", "jobqueue-chaos", str(self.path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            self.path.rmdir()
            raise NotHere(f"a file system cannot be mounted (it takes root): {done.stderr.strip()}")

    def fill(self) -> None:
        """Leave no room: the file system ends where its last page is."""
        facts = os.statvfs(self.path)
        used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize
        self._resize(f"{used // 1024}k")

    def free(self) -> None:
        """Give the room back."""
        self._resize(f"{self._mebibytes}m")

    def remove(self) -> None:
        """Unmount it; what is in it is gone."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)
        with suppress(OSError):
            self.path.rmdir()

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)


@dataclass(slots=True)
class Place:
    """A database with the schema. `admin`: the DSN of a superuser, `dsn`: of the product's role."""

    admin: str
    dsn: str
    server: EmbeddedServer | None
    disk: Disk | None

    def connect(self, **options: Any) -> Connection:
        """An autocommit connection of the superuser, who has connections in reserve."""
        return psycopg.connect(self.admin, autocommit=True, application_name="chaos", **options)

    def value(self, query: str, *parameters: Any) -> Any:
        """The first value of a query."""
        with self.connect() as connection:
            row = connection.execute(query.encode(), parameters).fetchone()
            return None if row is None else row[0]

    def wait_until_up(self, seconds: float = 120.0) -> None:
        """Wait until it answers. Raises psycopg.OperationalError if it does not in that time."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.value("select 1")
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def crash(self) -> None:
        """An immediate shutdown: every process of the server ends without a word to the disk. Returns when it is gone."""
        server = self.own_server()
        pid = server.status().pid
        assert pid is not None
        os.kill(pid, signal.SIGQUIT)
        self.wait_until_down()

    def wait_until_down(self, seconds: float = GONE_SECONDS) -> bool:
        """Wait until it does not answer any more, and return whether that came."""
        deadline = time.monotonic() + seconds
        while self.own_server().status().running:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def use_up_log(self) -> None:
        """Make the server ask for new files for its log until it gets none and goes down. Raises NotHere."""
        deadline = time.monotonic() + 2 * GONE_SECONDS
        while self.own_server().status().running:
            if time.monotonic() > deadline:
                raise NotHere("the server needed no new file for its log")
            with suppress(psycopg.OperationalError):
                self.value("select pg_switch_wal()")
            time.sleep(0.2)

    def revive(self) -> None:
        """Start the server if its postmaster has ended, as a service manager does; it recovers."""
        self.own_server().start(timeout=120.0)
        self.wait_until_up()

    def own_server(self) -> EmbeddedServer:
        """The server, if it is ours. Raises NotHere."""
        if self.server is None:
            raise NotHere("only a server of our own is crashed or filled: leave --dsn out")
        return self.server


@contextmanager
def open_place(dsn: str | None, small: str | None = None) -> Iterator[Place]:
    """Yield a new database: on the server that `dsn` names, else on one of our own.

    `small`: what of it lies on a disk that can be filled, `data` (without its log) or `wal`. Raises NotHere.
    """
    if dsn is not None:
        if small is not None:
            raise NotHere("only a server of our own is filled: leave --dsn out")
        with _database(dsn, f"chaos_{secrets.token_hex(6)}", None, None) as place:
            yield place
        return
    sweep_ephemeral_homes()
    # A server that panics would leave an image of its memory behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    disk = Disk(DISK_MIB[small]) if small is not None else None
    wal: Path | None = None
    try:
        home = make_ephemeral_home(disk.path) if disk is not None and small == "data" else make_ephemeral_home()
        settings = SETTINGS | (WAL_SETTINGS if small == "wal" else {})
        server = EmbeddedServer(home, ephemeral=True, settings=settings)
        try:
            own = server.start()
            if disk is not None:
                wal = (
                    disk.path
                    if small == "wal"
                    else Path(tempfile.mkdtemp(prefix="jobqueue-chaos-wal-", dir="/var/tmp"))
                )
                own = _move_wal(server, home / "data", wal)
            with _database(own, DATABASE, server, disk) as place:
                yield place
        finally:
            if disk is not None:
                disk.free()
            server.stop()
    finally:
        if disk is not None:
            disk.remove()
        if wal is not None:
            shutil.rmtree(wal, ignore_errors=True)


def _move_wal(server: EmbeddedServer, data: Path, to: Path) -> str:
    """Let the server write its log elsewhere. Its data stay: `stop` of an ephemeral server would delete them."""
    pid = server.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + GONE_SECONDS
    while server.status().running or (data / "postmaster.pid").exists():
        if time.monotonic() > deadline:
            raise NotHere("the server did not stop")
        time.sleep(0.05)
    account = server_account(data)
    to.chmod(0o711)
    target = to / "pg_wal"
    shutil.move(data / "pg_wal", target)
    for path in (target, *target.rglob("*")):
        os.chown(path, account.uid, account.gid)
    (data / "pg_wal").symlink_to(target)
    return server.start()


@contextmanager
def _database(own: str, name: str, server: EmbeddedServer | None, disk: Disk | None) -> Iterator[Place]:
    with psycopg.connect(own, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    admin = make_conninfo(own, dbname=name)
    try:
        migrate_up(admin)
        yield Place(admin, make_conninfo(admin, user=ROLE), server, disk)
    finally:
        if server is None:
            with psycopg.connect(own, autocommit=True) as connection:
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
