"""Handlers that go on after their attempts have ended: a thread cannot be stopped, so its slot and its job are kept apart."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobqueue import App, Job, WorkerWarning
from jobqueue.errors import LeaseLost
from jobqueue.null_job import _claim
from jobqueue.worker import run as run_module
from jobqueue.worker.held import Held
from jobqueue.worker.process import ProcessPool
from jobqueue.worker.threads import Threads
from tests.support.stubborn import stubborn
from tests.worker.test_worker import app, eventually, query, running

__all__ = ["app", "query"]

Query = Callable[..., Any]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(run_module, "LEFT_SECONDS", (0.1, 0.2))


class Gate:
    """Plain handlers wait at it; it counts how many of each job are inside at once."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.inside: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.entered = 0

    def hold(self, name: str) -> None:
        self.entered += 1
        self.inside[name] += 1
        self.most[name] = max(self.most[name], self.inside[name])
        self.opened.wait(600)
        self.inside[name] -= 1


async def test_a_retry_never_runs_beside_the_thread_of_its_earlier_attempt(app: App, query: Query) -> None:
    """The slot and the thread stay taken, the retry spends no retry while it is left to others, and runs when the thread
    has ended; and the health warning names the job once."""
    gate, warnings = Gate(), list[WorkerWarning]()

    @app.on_warning
    def note(warning: WorkerWarning) -> None:
        warnings.append(warning)

    @app.job("hangs", timeout=1, max_retries=1, retry_delay=0)
    def hangs(job: Job) -> str:
        if job.retry_count == 0:
            gate.hold("hangs")
        return "second attempt"

    @app.job("quick")
    async def quick() -> None: ...

    sent = await app.send("hangs")
    state = "select status, retry_count, attempt from jobqueue.jobs where id = %s"
    async with running(app, queues=["hangs", "quick"], concurrency=2, poll=0.2) as worker:
        await eventually(lambda: query(state, sent.id)[2] >= 4)
        assert query(state, sent.id)[1] == 1
        assert query("select array_agg(distinct outcome order by outcome) from jobqueue.attempt") == [
            "snoozed", "timed_out",
        ]  # fmt: skip
        assert worker._runner.busy_slots >= 1
        # The other slot works on.
        other = await app.send("quick")
        await eventually(lambda: query(state, other.id)[0] == "completed")
        await eventually(lambda: worker.status().stuck == 1)
        named = [warning for warning in warnings if str(sent.id) in warning.name]
        assert len(named) == 1
        assert "(hangs) still runs" in named[0].detail
        assert "(timeout)" in named[0].detail
        assert gate.entered == 1
        gate.opened.set()
        await eventually(lambda: query(state, sent.id)[0] == "completed")
        await eventually(lambda: worker.status().stuck == 0)
    assert gate.most["hangs"] == 1
    assert query("select result from jobqueue.jobs where id = %s", sent.id) == "second attempt"


@pytest.mark.parametrize("batch", [False, True])
async def test_a_worker_whose_slots_are_all_stuck_says_so_and_claims_nothing(
    app: App, query: Query, batch: bool
) -> None:
    gate, warnings = Gate(), list[WorkerWarning]()
    app.on_warning(warnings.append)

    if batch:

        @app.job("hangs", timeout=1, max_retries=0, batch_size=2)
        def hang_together(jobs: list[Job]) -> None:
            gate.hold("batch")
    else:

        @app.job("hangs", timeout=1, max_retries=0)
        def hang_alone() -> None:
            gate.hold("alone")

    size = 2 if batch else 1
    await app.send_many("hangs", [{} for _ in range(size)])
    failed = "select count(*) from jobqueue.job where status = 'failed'"
    async with running(app, concurrency=1) as worker:
        await eventually(lambda: query(failed) == size)
        await eventually(lambda: any(warning.name == "no slot is left" for warning in warnings))
        assert len([warning for warning in warnings if warning.status == "fail"]) == 1
        assert len([warning for warning in warnings if warning.name.startswith("stuck handler")]) == size
        waiting = await app.send("hangs")
        assert worker.wanted() == 0
        assert worker.status().running == 0
        gate.opened.set()
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", waiting.id) == "completed")
    assert query("select attempt from jobqueue.jobs where id = %s", waiting.id) == 1
    assert set(gate.most.values()) == {1}


async def test_a_job_that_was_cancelled_by_force_and_resumed_waits_for_its_old_thread(app: App, query: Query) -> None:
    """The same with a claim that was lost: the new claim may come back to this process before it hears of the loss."""
    gate = Gate()

    @app.job("hangs")
    def hangs(job: Job) -> None:
        gate.hold("hangs")

    sent = await app.send("hangs")
    state = "select status, attempt from jobqueue.jobs where id = %s"
    async with running(app, concurrency=2, poll=0.2):
        await eventually(lambda: gate.entered == 1)
        query("select jobqueue.cancel(%s, 'stop it', true)", sent.id)
        query("select jobqueue.resume(%s, 'go on')", sent.id)
        await eventually(lambda: query(state, sent.id)[1] >= 3)
        assert gate.entered == 1
        gate.opened.set()
        await eventually(lambda: query(state, sent.id)[0] == "completed")
    assert gate.most["hangs"] == 1


async def test_a_thread_that_reports_stops_by_itself_when_its_attempt_is_over(app: App, query: Query) -> None:
    ended = list[BaseException]()

    @app.job("reports", max_runtime=1, max_retries=0)
    def reports(job: Job) -> None:
        try:
            while True:
                job.sync.progress(message="still here")
                time.sleep(0.01)
        except BaseException as error:
            ended.append(error)
            raise

    sent = await app.send("reports")
    async with running(app, concurrency=1) as worker:
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "failed")
        await eventually(lambda: worker._runner.busy_slots == 0)
    assert [type(error) for error in ended] == [LeaseLost]
    assert query("select error_code from jobqueue.jobs where id = %s", sent.id) == "TIMEOUT"


async def test_a_drain_does_not_wait_for_a_thread_whose_attempt_is_over(app: App, query: Query) -> None:
    gate = Gate()

    @app.job("hangs", timeout=1, max_retries=0)
    def hangs() -> None:
        gate.hold("hangs")

    sent = await app.send("hangs")
    worker = await app.make_worker(concurrency=1, drain_timeout=60)
    task = asyncio.create_task(worker.run())
    try:
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "failed")
        worker.drain()
        async with asyncio.timeout(60):
            await task
        assert gate.inside["hangs"] == 1
    finally:
        gate.opened.set()
        await app.close()


async def test_a_process_that_does_not_stop_is_gone_before_the_job_runs_again(
    app: App, query: Query, tmp_path: Path
) -> None:
    app.job("stubborn", executor="process")(stubborn)
    place = tmp_path / "pid"
    sent = await app.send("stubborn", {"place": str(place)})
    async with running(app, concurrency=2, poll=0.2, processes=ProcessPool(2, stop_grace=0.2)) as worker:
        await eventually(place.exists)
        query("select jobqueue.cancel(%s, 'stop it', true)", sent.id)
        query("select jobqueue.resume(%s, 'go on')", sent.id)
        await eventually(lambda: query("select status from jobqueue.jobs where id = %s", sent.id) == "completed")
        assert worker.status().stuck == 0
    assert query("select result from jobqueue.jobs where id = %s", sent.id) is True


async def test_an_order_for_an_ended_attempt_is_not_taken_for_the_next_one_of_the_job(app: App) -> None:
    """A heartbeat names the attempts of its moment; its answer may come when a retry of one of them runs here already."""
    worker = await app.make_worker()
    for token in ("first", "second"):
        claim = _claim({}, "default", None)._replace(claim_token=token)
        worker.held[claim.id] = Held(claim, None, None, 0.0)  # type: ignore[arg-type]
        if token == "first":
            assert worker._list_held() == [(claim.id, "first", False)]
            assert worker._of_listed([(claim.id, "lost")]) == [(claim.id, "lost")]
    assert worker._of_listed([(claim.id, "lost"), (None, "drain")]) == [(None, "drain")]
    await app.close()


async def test_threads_are_used_again_and_hand_over_what_was_raised() -> None:
    threads, names = Threads("tested"), set[str]()

    def work(value: int) -> int:
        names.add(threading.current_thread().name)
        return 10 // value

    for _ in range(5):
        assert await threads.run(work, 5) == 2
        await asyncio.sleep(0)
    assert len(names) == 1
    with pytest.raises(ZeroDivisionError):
        await threads.run(work, 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(next, iter(()))
    threads.close()


def test_a_thread_that_never_ends_does_not_keep_the_process_from_ending() -> None:
    program = (
        "import asyncio, threading\n"
        "from jobqueue.worker.threads import Threads\n"
        "async def main():\n"
        "    threads = Threads('tested')\n"
        "    threads.run(threading.Event().wait)\n"
        "    threads.close()\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
