"""Git as the index needs it: a path or URL becomes a commit, the commit its files, a file its content.

Files are read from the commit, never from the work tree: what is indexed is what the commit says, whatever is edited
meanwhile, and a repeated attempt sees the same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jobqueue import InvalidInput, PermanentError

PROTOCOLS = "https:http:ssh:git:file"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+@[\w.-]+:(?!/)")
_SYMLINK, _SUBMODULE = "120000", "160000"


class GitError(Exception):
    """Git could not do it now; another attempt may succeed (a network, a full disk)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit."""

    position: int
    """From 1, in git's order: the same in every attempt, because the commit is."""
    path: str
    """Bytes that are no UTF-8 are written as escapes."""
    mode: str
    blob: str
    size: int
    """In bytes; 0 for a submodule."""

    @property
    def is_symlink(self) -> bool:
        """Whether it only names another path."""
        return self.mode == _SYMLINK

    @property
    def is_submodule(self) -> bool:
        """Whether it stands for another repository."""
        return self.mode == _SUBMODULE


@dataclass(frozen=True, slots=True)
class Checkout:
    """A commit that can be read."""

    location: str
    """The absolute path, or the URL without its credentials."""
    directory: Path
    commit: str

    async def entries(self) -> list[Entry]:
        """Return the commit's files. Raises GitError."""
        listing = await _git("ls-tree", "-r", "-z", "-l", "--full-tree", self.commit, directory=self.directory)
        lines = [line for line in listing.split(b"\0") if line]
        return [_entry(position, line) for position, line in enumerate(lines, 1)]

    def blobs(self) -> Blobs:
        """Return a reader of file contents; a context manager."""
        return Blobs(self.directory)


class Blobs:
    """One `git cat-file --batch`: contents are asked for one after the other. Blocking; for threads."""

    def __init__(self, directory: Path) -> None:
        self._command = [*_command(directory), "cat-file", "--batch"]
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=_environment()
        )
        return self

    def __exit__(self, *_: object) -> None:
        # Killed first: a thread that still reads then sees the end of the file, and lets go of the pipe.
        self._process.kill()
        with self._lock:
            self._process.communicate()

    def read(self, blob: str) -> bytes:
        """Return the content. Raises GitError if the repository does not have it."""
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(f"{blob}\n".encode())
                self._process.stdin.flush()
                header = self._process.stdout.readline().split()
                if len(header) != 3:
                    raise GitError(f"the repository does not have the content {blob}")
                content = self._process.stdout.read(int(header[2]) + 1)
            except OSError as error:
                raise GitError(f"git cat-file ended: {error}") from error
            if len(content) != int(header[2]) + 1:
                raise GitError(f"git cat-file ended within the content {blob}")
            return content[:-1]


def is_url(location: str) -> bool:
    """Whether it names a repository elsewhere: `https://host/path`, `git@host:path`."""
    return _URL.match(location) is not None


def without_credentials(url: str) -> str:
    """Return a URL that can be shown: without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


@contextlib.asynccontextmanager
async def checkout(location: str, ref: str, *, pinned: str | None, workspace: str) -> AsyncIterator[Checkout]:
    """Open a repository: one in a folder as it is, one elsewhere as a shallow copy in a temporary folder.

    `pinned`: the commit of an earlier attempt, which is then taken instead of `ref`. `workspace`: how the names of the
    job's temporary folders begin; what a killed attempt left there is removed.
    Raises InvalidInput if there is no such repository, folder or ref; PermanentError if the pinned commit is gone or
    git is missing; GitError for anything that may pass.
    """
    if not is_url(location):
        directory = await _top_of_repository(location)
        yield Checkout(str(directory), directory, await _commit(directory, ref, pinned))
        return
    with _temporary_folder(workspace) as directory:
        yield Checkout(without_credentials(location), directory, await _fetch(location, ref, pinned, directory))


async def _top_of_repository(location: str) -> Path:
    directory = Path(location).expanduser().resolve()
    if not directory.is_dir():
        raise InvalidInput(f"{location} is not a folder on this machine; give the path of a git repository, or its URL")
    try:
        prefix = await _git("rev-parse", "--show-prefix", directory=directory)
    except GitError as error:
        if "not a git repository" not in str(error):
            raise
        raise InvalidInput(
            f"{directory} is a plain folder, not a git repository; "
            "run `git init`, `git add` and `git commit` there first, or give the path of a repository"
        ) from None
    if inside := os.fsdecode(prefix.removesuffix(b"\n")):
        top = str(directory).removesuffix(inside.rstrip("/")).rstrip("/")
        raise InvalidInput(f"{directory} lies inside the git repository {top}; give that path to index it")
    return directory


async def _commit(directory: Path, ref: str, pinned: str | None) -> str:
    try:
        name = f"{pinned or ref}^{{commit}}"
        found = await _git("rev-parse", "--verify", "--quiet", "--end-of-options", name, directory=directory)
    except GitError:
        if pinned is not None:
            raise _pin_is_gone(pinned) from None
        raise InvalidInput(f'there is no commit "{ref}" in {directory}; is the repository empty?') from None
    return found.decode().split()[-1]


async def _fetch(url: str, ref: str, pinned: str | None, directory: Path) -> str:
    # A shallow clone of exactly one commit: unlike `git clone --depth 1` it also takes a commit's id.
    await _git("init", "--quiet", "--bare", "--template=", directory=directory)
    try:
        await _git("fetch", "--quiet", "--depth=1", "--no-tags", "--", url, pinned or ref, directory=directory)
    except GitError as error:
        reason = str(error).replace(url, without_credentials(url))
        if not any(text in reason for text in ("couldn't find remote ref", "not our ref", "unadvertised object")):
            raise GitError(reason) from None
        if pinned is not None:
            raise _pin_is_gone(pinned) from None
        raise InvalidInput(f'there is no "{ref}" at {without_credentials(url)}') from None
    return (await _git("rev-parse", "--verify", "FETCH_HEAD^{commit}", directory=directory)).decode().strip()


def _pin_is_gone(commit: str) -> PermanentError:
    return PermanentError(
        f"commit {commit}, which an earlier attempt began with, is gone; restart the job to index the current one",
        code="COMMIT_GONE",
    )


@contextlib.contextmanager
def _temporary_folder(workspace: str) -> Iterator[Path]:
    for left in Path(tempfile.gettempdir()).glob(f"{workspace}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{workspace}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _entry(position: int, line: bytes) -> Entry:
    facts, _, path = line.partition(b"\t")
    mode, _, blob, size = facts.decode().split()
    name = path.decode("utf-8", "backslashreplace")
    return Entry(position, name, mode, blob, 0 if size == "-" else int(size))


async def _git(*arguments: str, directory: Path) -> bytes:
    """Run git and return what it prints; it is killed if the job is stopped. Raises GitError, PermanentError."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(directory),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
        )
    except FileNotFoundError:
        raise PermanentError("git is not installed on this worker's machine", code="GIT_MISSING") from None
    try:
        output, complaint = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        reason = " ".join(complaint.decode(errors="replace").split()) or f"exit code {process.returncode}"
        raise GitError(f"git {arguments[0]}: {reason}")
    return output


def _command(directory: Path) -> list[str]:
    # A worker often runs as another user than the owner of the checkout, which git refuses to read by default. Safe
    # here: nothing that is run below executes hooks, filters or other programs that the repository's own settings name.
    return ["git", "-c", "safe.directory=*", "-C", str(directory)]


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {
        **inherited,
        "LC_ALL": "C",
        "GIT_ALLOW_PROTOCOL": PROTOCOLS,
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_SSH_COMMAND": "ssh -o BatchMode=yes",
        "GIT_TERMINAL_PROMPT": "0",
    }
