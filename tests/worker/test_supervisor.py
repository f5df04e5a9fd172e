"""The supervisor: readiness of all, restarts, signals once, and exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from jobqueue.telemetry.systemd import Notifier
from jobqueue.worker.supervisor import Supervisor
from tests.worker.test_systemd import Manager

BOUND = 60.0

CHILD = """
import os, signal, socket, sys, time
folder, mode = sys.argv[1], sys.argv[2]
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
signals = []
def stop(number, frame):
    signals.append(number)
    open(f"{folder}/signals-{os.getpid()}", "a").write(f"{number}\\n")
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
open(f"{folder}/started-{os.getpid()}", "w").close()
if mode.startswith("exit"):
    sys.exit(int(mode[4:]))
say("READY=1\\nSTATUS=working")
need = 2 if mode == "stubborn" else 1
while len(signals) < need:
    if mode != "hang" or not os.path.exists(f"{folder}/hang"):
        say("WATCHDOG=1")
    time.sleep(0.02)
"""


def supervisor(folder: Path, mode: str, processes: int = 2, watchdog: float = 30.0) -> Supervisor:
    notifier = Notifier({"NOTIFY_SOCKET": str(folder / "notify")})
    return Supervisor(processes, [sys.executable, "-c", CHILD, str(folder), mode], notifier=notifier, watchdog=watchdog)


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def started(folder: Path) -> int:
    return len(list(folder.glob("started-*")))


async def test_it_is_ready_when_all_are_and_passes_sigterm_on_once(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    subject = supervisor(tmp_path, "work")
    running = asyncio.create_task(subject.run())
    await until(lambda: manager.heard("READY") == ["1"], "READY")
    assert len(subject.pids) == 2
    assert manager.heard("STATUS")[-1].startswith("2/2 processes ready · working")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, BOUND) == 0
    assert manager.heard("STOPPING") == ["1"]
    assert [path.read_text() for path in tmp_path.glob("signals-*")] == ["15\n", "15\n"]
    manager.socket.close()


async def test_a_second_signal_is_passed_on_too(tmp_path: Path) -> None:
    subject = supervisor(tmp_path, "stubborn", processes=1)
    running = asyncio.create_task(subject.run())
    await until(lambda: subject._slots[0].ready, "ready")
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: list(tmp_path.glob("signals-*")), "the first signal")
    assert not running.done()
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(running, BOUND) == 0


async def test_a_crashed_worker_is_replaced(tmp_path: Path) -> None:
    subject = supervisor(tmp_path, "work")
    running = asyncio.create_task(subject.run())
    await until(lambda: all(slot.ready for slot in subject._slots), "ready")
    before = subject.pids
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: before[0] not in subject.pids and len(subject.pids) == 2, "two workers again")
    await until(lambda: all(slot.ready for slot in subject._slots), "ready")
    assert before[1] in subject.pids
    subject.stop()
    assert await asyncio.wait_for(running, BOUND) == 0


async def test_a_stuck_worker_is_killed_and_replaced_alone(tmp_path: Path) -> None:
    subject = supervisor(tmp_path, "hang", processes=1, watchdog=0.5)
    running = asyncio.create_task(subject.run())
    await until(lambda: subject._slots[0].ready, "ready")
    (before,) = subject.pids
    (tmp_path / "hang").touch()
    await until(lambda: before not in subject.pids, "the stuck worker is gone")
    (tmp_path / "hang").unlink()
    await until(lambda: subject._slots[0].ready and subject.pids, "another one is ready")
    subject.stop()
    assert await asyncio.wait_for(running, BOUND) == 0


async def test_a_machine_that_stood_still_costs_no_worker(tmp_path: Path) -> None:
    """After a suspend the supervisor may look before any worker had a chance to feed."""
    subject = supervisor(tmp_path, "work", processes=1, watchdog=600)
    running = asyncio.create_task(subject.run())
    await until(lambda: subject._slots[0].ready, "ready")
    (before,) = subject.pids
    subject._slots[0].fed_at -= 10_000
    subject._kill_stuck(overslept=9_990)
    fed = subject._slots[0].fed_at
    await until(lambda: subject._slots[0].fed_at > fed, "it goes on feeding")
    assert subject.pids == [before]
    subject._slots[0].fed_at -= 10_000
    subject._kill_stuck(overslept=0)
    await until(lambda: before not in subject.pids, "one that is really stuck is killed")
    subject.stop()
    assert await asyncio.wait_for(running, BOUND) == 0


async def test_a_configuration_error_ends_it_at_once(tmp_path: Path) -> None:
    assert await asyncio.wait_for(supervisor(tmp_path, "exit78").run(), BOUND) == 78
    assert started(tmp_path) <= 2


async def test_workers_that_cannot_start_end_it_with_their_code(tmp_path: Path) -> None:
    assert await asyncio.wait_for(supervisor(tmp_path, "exit69", processes=1).run(), BOUND) == 69
    assert started(tmp_path) == 3


async def test_workers_that_are_done_are_not_started_again(tmp_path: Path) -> None:
    assert await asyncio.wait_for(supervisor(tmp_path, "exit0").run(), BOUND) == 0
    assert started(tmp_path) == 2
