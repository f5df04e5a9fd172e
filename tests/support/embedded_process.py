"""A process that drives an embedded server on request, as root or as an ordinary user, and can be killed.

It imports everything before it changes the user: the interpreter itself may lie where that user has no access.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobqueue.database.embedded import EmbeddedServer, EmbeddedServerError

REPOSITORY = Path(__file__).parents[2]


class ServerProcess:
    """The testing side: one request at a time, each answered by one line."""

    def __init__(self, account: str, data_dir: Path, **options: Any) -> None:
        if isinstance(options.get("bin_dir"), Path):
            options["bin_dir"] = str(options["bin_dir"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.embedded_process", account, str(data_dir), json.dumps(options)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, verb: str, **arguments: Any) -> None:
        """Send a request without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Return the answer; an EmbeddedServerError over there is raised here, with its class's name in front."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has died"
        reply = json.loads(line)
        if "error" in reply:
            raise EmbeddedServerError(reply["error"])
        return reply["value"]

    def call(self, verb: str, **arguments: Any) -> Any:
        """Ask and wait."""
        self.ask(verb, **arguments)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, as the kernel's memory shortage would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._close_pipes()

    def leave(self) -> None:
        """Let it end regularly."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


def programs_with_slow_initdb(folder: Path, bin_dir: Path, gate: Path) -> Path:
    """The programs, but that initdb does not end before there is a file `gate`."""
    folder.mkdir()
    for program in bin_dir.iterdir():
        (folder / program.name).symlink_to(program)
    slow = folder / "initdb"
    slow.unlink()
    slow.write_text(f'#!/bin/sh\n"{bin_dir / "initdb"}" "$@"\nwhile [ ! -e "{gate}" ]; do sleep 0.05; done\n')
    slow.chmod(0o755)
    return folder


def become(account: str) -> None:
    """Change to an account for good, if we are root and it is another one."""
    if os.geteuid() != 0 or account == "root":
        return
    entry = pwd.getpwnam(account)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = "/nonexistent"


def _answer(server: EmbeddedServer, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        if verb == "status":
            return {"value": {**asdict(server.status()), "data_dir": None}}
        if verb in ("dsn", "tcp_dsn"):
            return {"value": getattr(server, verb)}
        return {"value": getattr(server, verb)(**arguments)}
    except EmbeddedServerError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _main(account: str, data_dir: str, options: str) -> None:
    settings = json.loads(options)
    if settings.get("bin_dir"):
        settings["bin_dir"] = Path(settings["bin_dir"])
    become(account)
    server = EmbeddedServer(Path(data_dir), **settings)
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        print(json.dumps(_answer(server, verb, arguments)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
