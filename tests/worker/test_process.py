"""Child processes: they answer, ask, fail, crash, are stopped and never outlive their parent."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobqueue.errors import ConfigurationError, InvalidInput
from jobqueue.worker.process import ProcessDied, ProcessPool, ProcessStopped, RemoteError, RemoteTraceback
from jobqueue.worker.process_child import current_link
from tests.support.waiting import wait_until

HERE = __name__
BOUND = 60.0


# -- what runs in the children


def add(one: int, two: int) -> int:
    return one + two


def pid() -> int:
    return os.getpid()


def fail(message: str) -> None:
    raise InvalidInput(message, code="BAD_PAGE")


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def fail_strangely() -> None:
    raise Unpicklable("a", "b")


def leave(code: int) -> None:
    os._exit(code)


def crash() -> None:
    ctypes.string_at(0)


def ask(name: str) -> Any:
    return current_link().call("report", name, pct=50)


def wait_for_order() -> str | None:
    while current_link().order is None:
        time.sleep(0.01)
    return current_link().order


def sleep_and_clean(path: str) -> None:
    try:
        Path(path + ".started").write_text("")
        time.sleep(600)
    finally:
        Path(path).write_text("cleaned")


def never_stop(path: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Path(path + ".started").write_text("")
    time.sleep(600)


def return_a_lock() -> Any:
    import threading

    return threading.Lock()


# -- the tests


@pytest.fixture
async def pool() -> AsyncIterator[ProcessPool]:
    pool = ProcessPool(2, stop_grace=0.3)
    yield pool
    await asyncio.wait_for(pool.close(), BOUND)


async def test_it_returns_the_result_and_uses_children_again(pool: ProcessPool) -> None:
    assert await pool.call("1", f"{HERE}:add", 2, 3) == 5
    first = await pool.call("2", f"{HERE}:pid")
    assert first != os.getpid()
    assert await pool.call("3", f"{HERE}:pid") == first


async def test_no_child_is_started_before_it_is_needed_and_no_more_than_the_size(pool: ProcessPool) -> None:
    assert pool.pids == []
    await asyncio.gather(*(pool.call(str(n), f"{HERE}:add", n, n) for n in range(20)))
    assert len(pool.pids) <= 2


async def test_large_values_pass(pool: ProcessPool) -> None:
    assert await pool.call("1", f"{HERE}:add", "x" * 8_000_000, "y") == "x" * 8_000_000 + "y"


async def test_a_child_is_replaced_after_its_number_of_jobs() -> None:
    pool = ProcessPool(1, recycle_after=2)
    pids = [await pool.call(str(n), f"{HERE}:pid") for n in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    await pool.close()


async def test_exceptions_come_back_with_their_stack(pool: ProcessPool) -> None:
    with pytest.raises(InvalidInput, match="page 7") as caught:
        await pool.call("1", f"{HERE}:fail", "page 7")
    assert caught.value.code == "BAD_PAGE"
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in fail" in str(caught.value.__cause__)


async def test_what_cannot_be_pickled_is_told_in_words(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match="Unpicklable: ab") as caught:
        await pool.call("1", f"{HERE}:fail_strangely")
    assert caught.value.type_name == "Unpicklable"
    with pytest.raises(TypeError, match="pickle"):
        await pool.call("2", f"{HERE}:return_a_lock")


@pytest.mark.parametrize(
    ("target", "arguments", "exit_code"), [("leave", (3,), 3), ("crash", (), -signal.SIGSEGV)], ids=["exit", "segfault"]
)
async def test_a_dead_child_is_a_transient_error_and_is_replaced(
    pool: ProcessPool, target: str, arguments: tuple[int, ...], exit_code: int
) -> None:
    with pytest.raises(ProcessDied) as caught:
        await pool.call("1", f"{HERE}:{target}", *arguments)
    assert (caught.value.exit_code, caught.value.code) == (exit_code, "PROCESS_DIED")
    assert caught.value.error_class == "transient"
    assert await pool.call("2", f"{HERE}:add", 1, 1) == 2


async def test_a_child_that_died_while_idle_costs_no_job(pool: ProcessPool) -> None:
    first = await pool.call("1", f"{HERE}:pid")
    os.kill(first, signal.SIGKILL)
    child = pool._idle[0]
    await asyncio.wait_for(child.process.wait(), BOUND)
    assert await pool.call("2", f"{HERE}:pid") != first


async def test_the_child_asks_its_parent(pool: ProcessPool) -> None:
    async def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args == ("bad",):
            raise InvalidInput("no such page")
        return [name, args, kwargs]

    assert await pool.call("1", f"{HERE}:ask", "page", call=call) == ["report", ("page",), {"pct": 50}]
    with pytest.raises(InvalidInput, match="no such page"):
        await pool.call("2", f"{HERE}:ask", "bad", call=call)


async def test_an_order_reaches_the_running_handler(pool: ProcessPool) -> None:
    running = asyncio.create_task(pool.call("1", f"{HERE}:wait_for_order"))
    while not running.done():
        pool.tell("1", "pause")
        await asyncio.sleep(0.01)
    assert await running == "pause"
    pool.tell("1", "pause")


async def started(path: Path) -> None:
    async with asyncio.timeout(BOUND):
        while not Path(f"{path}.started").exists():
            await asyncio.sleep(0.01)


async def test_stop_lets_the_handler_clean_up(tmp_path: Path) -> None:
    pool = ProcessPool(1, stop_grace=BOUND)
    running = asyncio.create_task(pool.call("1", f"{HERE}:sleep_and_clean", str(tmp_path / "x")))
    await started(tmp_path / "x")
    pool.stop("1")
    with pytest.raises(ProcessStopped):
        await asyncio.wait_for(running, BOUND)
    assert (tmp_path / "x").read_text() == "cleaned"
    assert await pool.call("2", f"{HERE}:add", 1, 1) == 2
    await pool.close()


async def test_stop_kills_a_handler_that_does_not_listen(pool: ProcessPool, tmp_path: Path) -> None:
    running = asyncio.create_task(pool.call("1", f"{HERE}:never_stop", str(tmp_path / "x")))
    await started(tmp_path / "x")
    (pid,) = pool.pids
    pool.stop("1")
    with pytest.raises(ProcessStopped):
        await asyncio.wait_for(running, BOUND)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_cancelling_the_task_stops_the_child(pool: ProcessPool, tmp_path: Path) -> None:
    running = asyncio.create_task(pool.call("1", f"{HERE}:never_stop", str(tmp_path / "x")))
    await started(tmp_path / "x")
    (pid,) = pool.pids
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, BOUND)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "target", ["tests.nothing:x", f"{HERE}:nothing", f"{HERE}:BOUND", "f.<locals>.g", "__main__:f"]
)
async def test_what_cannot_be_imported_is_said_clearly(pool: ProcessPool, target: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be imported by another process|is not a function"):
        await pool.call("1", target)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_die_with_a_parent_that_is_killed() -> None:
    program = (
        "import asyncio\n"
        "from jobqueue.worker.process import ProcessPool\n"
        "async def main():\n"
        "    pool = ProcessPool(1)\n"
        "    await pool.call('1', 'os:getpid')\n"
        "    print(*pool.pids, flush=True)\n"
        "    await pool.call('2', 'time:sleep', 600)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(child), what="the child is gone")
