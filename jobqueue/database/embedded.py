"""A PostgreSQL server of our own: started by one call, found again by any process that knows its data directory.

```
                 lock free                     lock taken
start()   ─►  clean up, initdb if new,   ─►  wait until it says "ready" and answers, use it
              start postgres, wait           (or until the lock is free again: begin anew)
stop()    ─►  nothing to do              ─►  SIGINT to the postmaster, wait until the lock is free
```

There is no manager process. A **persistent** server outlives the process that started it. An **ephemeral** one (tests,
benchmarks) is shut down by the kernel when that process dies, however it dies, and writes without fsync.

Files, the lock and what "alive" means: `cluster.py`. Which programs run, and as whom: `binaries.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobqueue.database import cluster, launch
from jobqueue.database.binaries import (
    Account,
    AccountMissing,
    Binaries,
    BinariesNotFound,
    EmbeddedServerError,
    find_binaries,
    require_account_entry,
    server_account,
)
from jobqueue.database.cluster import DataDirUnreachable, Home, InitialisationFailed, PidFile
from jobqueue.database.parentage import die_with_parent

__all__ = [
    "AccountMissing",
    "BinariesNotFound",
    "DataDirUnreachable",
    "EmbeddedServer",
    "EmbeddedServerError",
    "ForeignServer",
    "InitialisationFailed",
    "ServerNotStarted",
    "ServerNotStopped",
    "ServerStatus",
    "VersionMismatch",
    "default_data_dir",
]

_POLL = 0.005
_ORPHAN_GRACE = 1.0
"""Seconds that backends get to notice that their postmaster has died, before they are told to quit."""
_PORT_ATTEMPTS = 5
_SETTING_NAME = re.compile(r"[a-z_][a-z0-9_.]*")
_EPHEMERAL_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class VersionMismatch(EmbeddedServerError):
    """The data were written by another major version of PostgreSQL than the one found."""


class ForeignServer(EmbeddedServerError):
    """A server that was not started by this class runs on the data."""


class ServerNotStarted(EmbeddedServerError):
    """The server ended while starting, or was not ready in time; the message has the end of its log."""


class ServerNotStopped(EmbeddedServerError):
    """Something of the server is still alive after the time given."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What is known of a server from outside."""

    running: bool
    """It answers on its socket."""
    pid: int | None
    """The postmaster; None if it does not run."""
    version: str | None
    """The running server's version (`18.6`), else the major version of the data (`18`), None if there are none."""
    dsn: str | None
    """How to reach it through its socket; None if it does not run."""
    data_dir: Path


def default_data_dir() -> Path:
    """`JOBQUEUE_DATA_DIR`, else for root `/var/lib/jobqueue` (root's home is closed to the account of the server), else
    `$XDG_DATA_HOME/jobqueue`, by default `~/.local/share/jobqueue`."""
    if named := os.environ.get("JOBQUEUE_DATA_DIR"):
        return Path(named).expanduser()
    if os.geteuid() == 0:
        return Path("/var/lib/jobqueue")
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "jobqueue"


class EmbeddedServer:
    """One PostgreSQL server on one data directory.

    Args:
        data_dir: its folder; created by the first start.
        ephemeral: the server dies with this process, does not wait for the disk (fsync, synchronous_commit and
            full_page_writes are off unless `settings` say otherwise), and `stop` deletes the data. Linux does this for
            any death of the process; elsewhere only a regular exit stops the server.
        bin_dir: a folder with `postgres` and `initdb`; default: see `binaries.find_binaries`.
        settings: server settings (`{"work_mem": "64MB"}`) for this start; they go before the configuration file.
            A server that runs already keeps its own.
        tcp: also listen on 127.0.0.1, on a free port, with a random password in `HOME/pgpass` (0600).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        ephemeral: bool = False,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        tcp: bool = False,
    ) -> None:
        self._home = Home(data_dir.resolve())
        self._ephemeral = ephemeral
        self._bin_dir = bin_dir
        self._settings = {**(_EPHEMERAL_SETTINGS if ephemeral else {}), **(settings or {})}
        self._tcp = tcp
        self._process: subprocess.Popen[bytes] | None = None
        for name in self._settings:
            if not _SETTING_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a server setting")

    @property
    def dsn(self) -> str:
        """The conninfo through the socket, user postgres, database postgres.

        Raises:
            EmbeddedServerError: the server does not run.
        """
        return launch.socket_dsn(self._running_pid_file())

    @property
    def tcp_dsn(self) -> str:
        """The conninfo through 127.0.0.1; it names the password file, not the password.

        Raises:
            EmbeddedServerError: the server does not run, or not with TCP.
        """
        pid_file = self._running_pid_file()
        if not pid_file.listens_on:
            raise EmbeddedServerError(
                f"the server in {self._home.path} has no TCP port: stop it, start it with tcp=True"
            )
        return launch.tcp_dsn(self._home, pid_file)

    def start(self, *, timeout: float = 60.0) -> str:
        """Start the server, or find it running, and return its conninfo.

        Any number of processes may do this at once: one starts it, all get the same answer.

        Args:
            timeout: seconds until it must accept connections.

        Raises:
            EmbeddedServerError: one of its subclasses says what is in the way.
        """
        deadline = time.monotonic() + timeout
        account = server_account(self._home.data)
        cluster.make_home(self._home, account)
        while True:
            lock = cluster.try_lock(self._home)
            if lock is not None:
                try:
                    self._launch(account, lock, deadline)
                finally:
                    os.close(lock)
            pid_file = self._home.read_pid_file()
            if pid_file is not None and pid_file.ready and launch.server_version(launch.socket_dsn(pid_file)):
                return self._adopt(pid_file)
            if time.monotonic() > deadline:
                raise ServerNotStarted(self._not_ready_message(timeout))
            self._end_orphans(since=deadline - timeout)
            time.sleep(_POLL)

    def stop(self, *, timeout: float = 60.0) -> None:
        """Shut the server down (open transactions are rolled back), whoever started it; do nothing if it does not run.

        The data of an ephemeral server are deleted.

        Args:
            timeout: seconds until everything of it must be gone; after half of them it is told to quit without a
                checkpoint, so that the next start replays its log.

        Raises:
            ServerNotStopped: something is still alive then, or belongs to somebody else.
        """
        atexit.unregister(self.stop)
        begun = time.monotonic()
        signalled: set[tuple[int, signal.Signals]] = set()
        while cluster.is_locked(self._home):
            waited = time.monotonic() - begun
            if waited > timeout:
                raise ServerNotStopped(
                    f"the server in {self._home.path} is still alive after {timeout:g} s: see {self._home.log}"
                )
            kind = signal.SIGINT if waited < timeout / 2 else signal.SIGQUIT
            pid_file = self._home.read_pid_file()
            if pid_file is not None and (pid_file.pid, kind) not in signalled and self._signal(pid_file.pid, kind):
                signalled.add((pid_file.pid, kind))
            self._end_orphans(since=begun)
            time.sleep(_POLL)
        self._reap()
        if self._ephemeral:
            self._delete()

    def status(self) -> ServerStatus:
        """Say whether the server runs, without changing anything.

        Raises:
            DataDirUnreachable: the directory belongs to another user.
        """
        self._reap(wait=False)
        version: str | None = None
        pid_file: PidFile | None = None
        try:
            if cluster.is_locked(self._home):
                pid_file = self._home.read_pid_file()
            if pid_file is not None and pid_file.ready:
                version = launch.server_version(launch.socket_dsn(pid_file))
            major = self._home.data_major()
        except PermissionError as error:
            raise DataDirUnreachable(f"no permission for {error.filename}: it belongs to another user") from error
        if pid_file is None or version is None:
            return ServerStatus(False, None, str(major) if major else None, None, self._home.path)
        return ServerStatus(True, pid_file.pid, version, launch.socket_dsn(pid_file), self._home.path)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _launch(self, account: Account, lock: int, deadline: float) -> None:
        """With the lock: nothing of ours is alive. Make the cluster if there is none, start postgres, wait."""
        in_child = die_with_parent() if self._ephemeral else None
        account, binaries = self._prepare(account)
        self._remove_stale_pid_file()
        if self._home.data_major() is None:
            require_account_entry(account)
            cluster.initialise(
                self._home,
                binaries,
                account,
                lock=lock,
                durable=not self._ephemeral,
                environment=launch.environment(),
                in_child=in_child,
            )
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            log = cluster.open_log(self._home)
            offset = os.fstat(log).st_size
            try:
                self._process = subprocess.Popen(
                    self._command(binaries, cluster.make_socket_dir(self._home, account), first=attempt == 1),
                    cwd="/",
                    env=launch.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                    preexec_fn=in_child,
                    **account.process_options,
                )
            finally:
                os.close(log)
            if self._wait_until_ready(deadline):
                return
            ending = cluster.log_since(self._home, offset)
            # Somebody took the free port between our look and the server's bind.
            if attempt < _PORT_ATTEMPTS and self._port_is_ours_to_choose and "Address already in use" in ending:
                continue
            raise ServerNotStarted(
                f"PostgreSQL {binaries.version} ended while starting; {self._home.log} says:\n{ending}"
            )

    def _prepare(self, account: Account) -> tuple[Account, Binaries]:
        # Again under the lock: another starter may have made the data, as another account, since the first look.
        account = server_account(self._home.data) if self._home.data.exists() else account
        major = self._home.data_major()
        binaries = find_binaries(self._bin_dir, account, major=major)
        if major is not None and major != binaries.major:
            raise VersionMismatch(
                f"{self._home.data} was written by PostgreSQL {major}, and {binaries.bin_dir} is PostgreSQL "
                f"{binaries.version}: name the programs of {major} in JOBQUEUE_PG_BIN, or convert the data with "
                "pg_upgrade, or begin anew with another JOBQUEUE_DATA_DIR"
            )
        return account, binaries

    def _remove_stale_pid_file(self) -> None:
        pid_file = self._home.read_pid_file()
        if pid_file is not None and cluster.runs_in(pid_file.pid, self._home.data):
            raise ForeignServer(
                f"PostgreSQL was started by other means on {self._home.data} (process {pid_file.pid}): "
                f"stop it (`pg_ctl stop -D {self._home.data}`), or use it through JOBQUEUE_DSN"
            )
        (self._home.data / "postmaster.pid").unlink(missing_ok=True)

    def _command(self, binaries: Binaries, socket_dir: Path, *, first: bool) -> list[str]:
        port = launch.choose_port(self._home, remembered=first) if self._port_is_ours_to_choose else None
        address = "127.0.0.1" if self._tcp else ""
        settings = launch.access_settings(socket_dir, address, port or cluster.DEFAULT_PORT) | self._settings
        return launch.server_command(binaries, self._home.data, settings)

    @property
    def _port_is_ours_to_choose(self) -> bool:
        return self._tcp and "port" not in self._settings

    def _wait_until_ready(self, deadline: float) -> bool:
        """True when it says so, or when the time is over (recovery may take longer: it goes on); false if it ended."""
        process = self._process
        while process is not None and process.poll() is None:
            pid_file = self._home.read_pid_file()
            if pid_file is not None and pid_file.pid == process.pid and pid_file.ready:
                return True
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL)
        return False

    def _adopt(self, pid_file: PidFile) -> str:
        dsn = launch.socket_dsn(pid_file)
        if self._tcp:
            if not pid_file.listens_on:
                raise ServerNotStarted(f"the server in {self._home.path} runs without TCP: stop it first")
            launch.prepare_tcp(self._home, dsn, pid_file)
        if self._ephemeral and self._process is not None:
            atexit.unregister(self.stop)
            atexit.register(self._stop_at_exit, os.getpid())
        return dsn

    def _not_ready_message(self, timeout: float) -> str:
        pid_file = self._home.read_pid_file()
        state = f"process {pid_file.pid} says {pid_file.state or 'nothing'}" if pid_file else "no server process yet"
        return f"the server in {self._home.path} was not ready after {timeout:g} s ({state}): see {self._home.log}"

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _running_pid_file(self) -> PidFile:
        pid_file = self._home.read_pid_file()
        if pid_file is None or not pid_file.ready or not cluster.is_locked(self._home):
            raise EmbeddedServerError(f"no server runs in {self._home.path}: start it (`jobqueue server start`)")
        return pid_file

    def _signal(self, pid: int, kind: signal.Signals) -> bool:
        """Send the signal if the process is the server's; return whether it was sent."""
        if not cluster.runs_in(pid, self._home.data):
            return False
        try:
            os.kill(pid, kind)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise ServerNotStopped(
                f"the server in {self._home.path} runs as another user: stop it as that user"
            ) from error
        return True

    def _end_orphans(self, *, since: float) -> None:
        """Backends that compute do not notice that their postmaster was killed, and keep the lock and the memory."""
        if time.monotonic() - since < _ORPHAN_GRACE:
            return
        pid_file = self._home.read_pid_file()
        if pid_file is not None and not cluster.runs_in(pid_file.pid, self._home.data):
            for pid in cluster.processes_in(self._home.data, server_account(self._home.data)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)

    def _reap(self, *, wait: bool = True) -> None:
        """Collect our child, so that it does not stay a zombie."""
        if self._process is not None and (wait or self._process.poll() is not None):
            self._process.wait()
            self._process = None

    def _stop_at_exit(self, owner: int) -> None:
        if os.getpid() == owner:
            self.stop()

    def _delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            lock = cluster.try_lock(self._home, create=False)
            if lock is not None:
                try:
                    cluster.remove(self._home)
                finally:
                    os.close(lock)
