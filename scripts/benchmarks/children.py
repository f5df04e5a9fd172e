"""Processes that are measured. Each says `ready` when it has imported and connected what it can, and waits for `go`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
READY, GO, STOP = "ready", "go", "stop"


class ChildFailed(RuntimeError):
    """A measured process ended with an error; the message has the end of what it wrote."""


class Child:
    """`python -m benchmarks.<module> '<json>'`; a context manager, so that it never outlives the measurement."""

    def __init__(self, module: str, arguments: Mapping[str, Any]) -> None:
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until it says that it is ready."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != READY:
            raise ChildFailed(self._ending())

    def tell(self, word: str) -> None:
        """Say `go`, or `stop`."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait until it has ended and return what it measured. Raises ChildFailed."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise ChildFailed(f"benchmarks.{self._module} did not end within {timeout:g} s\n{self._ending()}") from None
        if self._process.returncode != 0:
            raise ChildFailed(self._ending())
        measured: dict[str, Any] = json.loads(output)
        return measured

    def _ending(self) -> str:
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        return f"benchmarks.{self._module} failed ({self._process.returncode}):\n{self._log.read()[-4000:]}"

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with suppress(OSError, ValueError):
            self._process.communicate()
        self._log.close()


def run_together(module: str, arguments: Sequence[Mapping[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Run one process per element, let all begin at the same moment, and return what each measured."""
    children: list[Child] = []
    try:
        children += [Child(module, given) for given in arguments]
        for child in children:
            child.wait_ready()
        for child in children:
            child.tell(GO)
        return [child.result(timeout) for child in children]
    finally:
        for child in children:
            child.__exit__(None, None, None)


# -- the child's side --------------------------------------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    """In the child: what it was given."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def say_ready() -> None:
    """In the child: say that it is ready."""
    print(READY, flush=True)


def wait_for_word() -> str:
    """In the child: wait for `go` or `stop`; the end of the parent counts as `stop`."""
    return sys.stdin.readline().strip() or STOP


def answer(measured: Mapping[str, Any]) -> None:
    """In the child: hand over what was measured. The last thing it prints."""
    print(json.dumps(measured), flush=True)
