"""The files of one embedded server, and what they say about its life.

```
HOME/lock         an flock that initdb, the postmaster and every backend inherit
HOME/data/        the cluster; it appears by one rename, so a killed first start never leaves half of it
HOME/run/         the socket, 0700 (elsewhere if the path is too long for a socket)
HOME/server.log   what the server prints          HOME/pgpass   the password for TCP, 0600, only with tcp=True
```

**Alive means: the lock is taken.** The kernel releases it when the last process that inherited it is gone, so zombies,
reused process ids and torn files cannot deceive. Whoever holds the lock may therefore remove a stale `postmaster.pid`,
except that a server started by other means (pg_ctl) does not hold it: that one is looked for in /proc.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobqueue.database.binaries import Account, Binaries, EmbeddedServerError

SUPERUSER = "postgres"
DEFAULT_PORT = 5432
SOCKET_PATH_LIMIT = 107
"""Bytes in the path of a Unix socket: `sun_path` has 108 on Linux, one of them for the final zero."""

_LONGEST_SOCKET_NAME = len("/.s.PGSQL.65535.lock")
_BUILTIN_LOCALE_SINCE = 17
_LOG_LIMIT = 10 * 1024 * 1024
_HBA = """\
# The socket's folder is 0700, so only its owner (and root) gets this far.
local  all          all                trust
local  replication  all                trust
host   all          all  127.0.0.1/32  scram-sha-256
"""


class DataDirUnreachable(EmbeddedServerError):
    """The data directory cannot be created or entered by an account that has to."""


class InitialisationFailed(EmbeddedServerError):
    """`initdb` failed."""


@dataclass(frozen=True, slots=True)
class PidFile:
    """The lines of `postmaster.pid` that are there; a file that is being written is short."""

    pid: int
    socket_dir: Path | None = None
    port: int | None = None
    listens_on: str = ""
    """The TCP address, empty without TCP."""
    state: str = ""
    """`starting`, `ready`, `standby` or `stopping`; empty until the server has written it."""

    @property
    def ready(self) -> bool:
        """Whether the server says that it accepts connections."""
        return self.state == "ready" and self.socket_dir is not None and self.port is not None


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one embedded server."""

    path: Path

    @property
    def data(self) -> Path:
        """The cluster, what PostgreSQL calls its data directory."""
        return self.path / "data"

    @property
    def lock(self) -> Path:
        """The lock that everything alive holds."""
        return self.path / "lock"

    @property
    def log(self) -> Path:
        """The server's output."""
        return self.path / "server.log"

    @property
    def passfile(self) -> Path:
        """A libpq password file with the superuser's password for TCP."""
        return self.path / "pgpass"

    @property
    def port_file(self) -> Path:
        """The TCP port of the last start, taken again if it is free."""
        return self.path / "port"

    @property
    def socket_dir(self) -> Path:
        """The folder of the socket: `run`, or one in /tmp named after the path if that is too long for a socket, or
        has a comma, which libpq takes for the end of a host."""
        inside = self.path / "run"
        if len(os.fsencode(inside)) + _LONGEST_SOCKET_NAME <= SOCKET_PATH_LIMIT and "," not in str(inside):
            return inside
        return Path("/tmp") / f"jobqueue-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}"  # noqa: S108

    def data_major(self) -> int | None:
        """The major version that wrote the data; None if there are none yet."""
        try:
            return int((self.data / "PG_VERSION").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise EmbeddedServerError(
                f"{self.data}/PG_VERSION is damaged: restore the directory from a backup"
            ) from error

    def read_pid_file(self) -> PidFile | None:
        """What `postmaster.pid` says now; None if it is absent or holds no process id yet."""
        try:
            lines = (self.data / "postmaster.pid").read_text(errors="replace").split("\n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not lines[0].isdigit():
            return None
        # A line counts only if its newline has been written: the last piece may be cut.
        fields = [line.strip() for line in lines[:-1]] + [""] * 8
        return PidFile(
            pid=int(lines[0]),
            socket_dir=Path(fields[4]) if fields[4] else None,
            port=int(fields[3]) if fields[3].isdigit() else None,
            listens_on=fields[5],
            state=fields[7],
        )


# --- the lock ---------------------------------------------------------------------------------------------------------


def try_lock(home: Home, *, create: bool = True) -> int | None:
    """Take the lock without waiting; return its descriptor, or None if somebody holds it.

    Raises:
        FileNotFoundError: `create` is false and there has never been a server.
        DataDirUnreachable: no permission for the file.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(home.lock, flags, 0o600)
    except PermissionError as error:
        raise DataDirUnreachable(
            f"no permission for {home.lock}: it belongs to another user; use that account, or another JOBQUEUE_DATA_DIR"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweeper may have removed the file between open and flock: a lock on it would exclude nobody.
        if os.fstat(descriptor).st_ino == home.lock.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_locked(home: Home) -> bool:
    """Whether something of this server is alive or starting."""
    try:
        descriptor = try_lock(home, create=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if descriptor is None:
        return home.lock.exists()
    os.close(descriptor)
    return False


# --- processes --------------------------------------------------------------------------------------------------------


def runs_in(pid: int, data: Path) -> bool:
    """Whether the process is a PostgreSQL one in this data directory (false for zombies and reused process ids)."""
    if sys.platform != "linux":
        command = subprocess.run(
            ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        return str(data) in command.stdout
    process = Path("/proc") / str(pid)
    try:
        if not _is_postgres(process):
            return False
        try:
            return (process / "cwd").readlink() == data
        except PermissionError:
            # Root without CAP_SYS_PTRACE (a container) may not look at other users' processes, but at their arguments.
            return os.fsencode(data) in (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_in(data: Path, account: Account) -> list[int]:
    """The PostgreSQL processes in this data directory, on Linux; elsewhere none is found."""
    # Asked as the account: root without CAP_SYS_PTRACE may not see where its processes are, the account itself may.
    script = 'for p in /proc/[0-9]*; do [ "$p/cwd" -ef "$1" ] && echo "${p#/proc/}"; done'
    answer = subprocess.run(
        ["/bin/sh", "-c", script, "sh", str(data)],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        **account.process_options,
    )
    return [int(pid) for pid in answer.stdout.split() if _is_postgres(Path("/proc") / pid)]


def _is_postgres(process: Path) -> bool:
    try:
        return (process / "comm").read_text().strip() in ("postgres", "postmaster")
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- making it --------------------------------------------------------------------------------------------------------


def make_home(home: Home, account: Account) -> None:
    """Create the home folder. Only folders that are created here get permissions; existing ones are never opened.

    Raises:
        DataDirUnreachable: it cannot be created, or the server's account cannot enter it.
    """
    try:
        for missing in reversed([step for step in (home.path, *home.path.parents) if not step.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
            if account.switch:
                missing.chmod(0o755)
    except OSError as error:
        raise DataDirUnreachable(
            f"cannot create {home.path}: {error.strerror}; set JOBQUEUE_DATA_DIR to a folder that you may write to"
        ) from error
    if not account.can_enter(home.path):
        raise DataDirUnreachable(
            f"PostgreSQL runs as user {account.uid}, who cannot enter {home.path}: set JOBQUEUE_DATA_DIR to a folder "
            "that other users can reach (not below /root), e.g. /var/lib/jobqueue, or `chmod go+x` the closed parent"
        )


def make_socket_dir(home: Home, account: Account) -> Path:
    """Create the socket's folder, or check that an existing one is ours, and remove stale sockets. Needs the lock.

    Raises:
        EmbeddedServerError: something else is in its place.
    """
    folder = home.socket_dir
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        account.take(folder)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != account.uid or stat.S_IMODE(facts.st_mode) != 0o700:
        raise EmbeddedServerError(f"{folder} is not a folder of user {account.uid} with mode 0700: remove it")
    for stale in folder.glob(".s.PGSQL.*"):
        stale.unlink(missing_ok=True)
    return folder


def initialise(
    home: Home,
    binaries: Binaries,
    account: Account,
    *,
    lock: int,
    durable: bool,
    environment: Mapping[str, str],
    in_child: Callable[[], None] | None,
) -> None:
    """Make the cluster in a folder beside, then rename it. Needs the lock, which initdb inherits.

    Raises:
        InitialisationFailed: with initdb's output.
    """
    for unfinished in home.path.glob("data.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    target = home.path / f"data.new-{os.getpid()}"
    target.mkdir(mode=0o700)
    account.take(target)
    outcome = subprocess.run(
        _initdb_command(binaries, target, durable=durable),
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        pass_fds=(lock,),
        start_new_session=True,
        preexec_fn=in_child,
        **account.process_options,
    )
    if outcome.returncode != 0:
        shutil.rmtree(target, ignore_errors=True)
        raise InitialisationFailed(f"initdb failed for {home.path} ({outcome.returncode}):\n{outcome.stdout[-2000:]}")
    _write_hba(target)
    try:
        target.rename(home.data)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise InitialisationFailed(f"{home.data} exists and is no cluster: move it away ({error.strerror})") from error


def _initdb_command(binaries: Binaries, target: Path, *, durable: bool) -> list[str]:
    command = [str(binaries.bin_dir / "initdb"), "-D", str(target), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8"]
    command += ["--no-instructions", "--data-checksums", "--locale=C"]
    if binaries.major >= _BUILTIN_LOCALE_SINCE:
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return command if durable else [*command, "--no-sync"]


def _write_hba(data: Path) -> None:
    descriptor = os.open(data / "pg_hba.conf", os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "w") as file:
        file.write(_HBA)


def open_log(home: Home) -> int:
    """Open the log for appending; one that has grown over 10 MB becomes `server.log.1` first."""
    with contextlib.suppress(FileNotFoundError):
        if home.log.lstat().st_size > _LOG_LIMIT:
            home.log.rename(home.path / "server.log.1")
    return os.open(home.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def log_since(home: Home, offset: int, *, lines: int = 20) -> str:
    """The last lines that the server printed after an offset of its log, for error messages."""
    try:
        with home.log.open("rb") as file:
            file.seek(offset)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def remove(home: Home) -> None:
    """Delete what this package put into the home folder, and the folder if nothing else is in it. Needs the lock."""
    shutil.rmtree(home.data, ignore_errors=True)
    shutil.rmtree(home.socket_dir, ignore_errors=True)
    for unfinished in home.path.glob("data.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for file in (home.log, home.path / "server.log.1", home.passfile, home.port_file, home.lock):
        file.unlink(missing_ok=True)
    try:
        home.path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
