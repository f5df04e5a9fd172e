"""`--processes N`: one parent, N worker processes, restarted when they crash.

    supervisor ── SIGTERM (drain), again (release now) ──► workers
        ▲                                                    │
        └── READY, STATUS, WATCHDOG (a notify socket of its own) ──┘

To systemd the parent speaks for all: it is ready when all workers are, and feeds the watchdog as long as its own loop
runs; a worker that stops feeding *its* watchdog is killed and replaced alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobqueue.telemetry.systemd import Notifier, Reporter
from jobqueue.worker.resilience import Backoff, elapsed_clock

CONFIGURATION = 78
MOST_FAILED_STARTS = 3
"""Starts in a row that may fail before any worker was ready."""
STABLE_AFTER = 60.0
"""Seconds a worker must run for its next restart to be quick again."""
WATCHDOG_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Slot:
    number: int
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    status: str = "starting"
    fed_at: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(0.5, 30.0))


class Supervisor:
    """Runs `processes` copies of `command`. `watchdog`: seconds after which a silent worker is killed (30)."""

    def __init__(
        self,
        processes: int,
        command: Sequence[str],
        *,
        notifier: Notifier | None = None,
        environ: Mapping[str, str] = os.environ,
        watchdog: float = WATCHDOG_SECONDS,
    ) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._watchdog = watchdog
        self._slots = [_Slot(number) for number in range(processes)]
        self._notifier = notifier or Notifier(environ)
        self._reporter = Reporter(self._notifier, self.status)
        self._stops = 0
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._ever_ready = False
        self._failed_starts = 0

    def status(self) -> str:
        """One line for people: how many workers are ready, and what each says."""
        ready = sum(slot.ready for slot in self._slots)
        return f"{ready}/{len(self._slots)} processes ready · " + " | ".join(slot.status for slot in self._slots)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [slot.process.pid for slot in self._slots if slot.process and slot.process.returncode is None]

    async def run(self) -> int:
        """Run until all workers have ended; returns the exit code: 0, or that of a worker that cannot start at all."""
        folder = tempfile.mkdtemp(prefix="jobqueue-workers-")
        loop = asyncio.get_running_loop()
        receivers = [self._open_socket(Path(folder), slot) for slot in self._slots]
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            loop.add_signal_handler(number, self._forward, number)
        self._reporter.start()
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*(self._keep(slot, Path(folder)) for slot in self._slots))
        finally:
            watching.cancel()
            for receiver in receivers:
                loop.remove_reader(receiver)
                receiver.close()
            self._forward(signal.SIGKILL)
            await self._reporter.stop()
            shutil.rmtree(folder, ignore_errors=True)
        return self._exit_code

    def stop(self) -> None:
        """The first call lets the workers drain, the second has them give their jobs back at once."""
        self._stops += 1
        if self._stops == 1:
            self._reporter.stopping()
        self._stopping.set()
        self._forward(signal.SIGTERM)

    def _forward(self, number: int) -> None:
        for slot in self._slots:
            if slot.process is not None and slot.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    slot.process.send_signal(number)

    async def _keep(self, slot: _Slot, folder: Path) -> None:
        while not self._stopping.is_set():
            began = elapsed_clock()
            exit_code = await self._run_once(slot, folder)
            if exit_code == 0 or self._stopping.is_set():
                break
            if self._is_hopeless(exit_code, was_ready=slot.ready):
                self._give_up(exit_code)
                break
            if elapsed_clock() - began > STABLE_AFTER:
                slot.backoff.reset()
            wait = slot.backoff.next()
            logger.error("worker process %d ended with %d; again in %.1f s", slot.number, exit_code, wait)
            slot.ready, slot.status = False, f"ended with {exit_code}"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stopping.wait()
        slot.ready, slot.status = False, "ended"

    async def _run_once(self, slot: _Slot, folder: Path) -> int:
        environ = {
            **self._environ,
            "NOTIFY_SOCKET": str(folder / str(slot.number)),
            "WATCHDOG_USEC": str(round(self._watchdog * 1_000_000)),
        }
        environ.pop("WATCHDOG_PID", None)
        slot.ready, slot.status, slot.fed_at = False, "starting", elapsed_clock()
        # A session of its own: Ctrl-C in a terminal is to reach the workers through this process only, once.
        slot.process = await asyncio.create_subprocess_exec(*self._command, env=environ, start_new_session=True)
        if self._stopping.is_set():
            slot.process.terminate()
        return await slot.process.wait()

    def _is_hopeless(self, exit_code: int, *, was_ready: bool) -> bool:
        if was_ready:
            return False
        if exit_code == CONFIGURATION:
            return True
        self._failed_starts += 1
        return not self._ever_ready and self._failed_starts >= MOST_FAILED_STARTS

    def _give_up(self, exit_code: int) -> None:
        logger.error("a worker process cannot start (exit code %d): giving up", exit_code)
        self._exit_code = exit_code if exit_code > 0 else 1
        self.stop()

    def _open_socket(self, folder: Path, slot: _Slot) -> socket.socket:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        receiver.bind(str(folder / str(slot.number)))
        asyncio.get_running_loop().add_reader(receiver, self._receive, receiver, slot)
        return receiver

    def _receive(self, receiver: socket.socket, slot: _Slot) -> None:
        with contextlib.suppress(BlockingIOError):
            values = dict(line.partition("=")[::2] for line in receiver.recv(65536).decode().splitlines())
            slot.fed_at = elapsed_clock()
            slot.status = values.get("STATUS", slot.status)
            if values.get("READY") == "1":
                slot.ready = True
                self._failed_starts = 0
                self._tell_ready()

    def _tell_ready(self) -> None:
        if not self._ever_ready and all(slot.ready for slot in self._slots):
            self._ever_ready = True
            self._reporter.ready()

    async def _watch(self) -> None:
        every = self._watchdog / 4
        while True:
            slept = elapsed_clock()
            await asyncio.sleep(every)
            self._kill_stuck(max(elapsed_clock() - slept - every, 0.0))

    def _kill_stuck(self, overslept: float) -> None:
        """Kill the workers that feed nothing. `overslept`: seconds in which this process stood still; a suspended or starved
        machine keeps the workers from feeding as well, so they do not count."""
        now = elapsed_clock()
        for slot in self._slots:
            slot.fed_at = min(slot.fed_at + overslept, now)
            silent = now - slot.fed_at > self._watchdog
            if silent and slot.process is not None and slot.process.returncode is None:
                logger.error("worker process %d is stuck: killing it", slot.number)
                slot.process.send_signal(signal.SIGABRT)
                slot.fed_at = now


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of one supervised worker; `arguments`: those of `jobqueue worker`."""
    return [sys.executable, "-m", "jobqueue", "worker", *arguments, "--supervised-by", str(os.getpid())]
