"""The worker that is measured: a real one, in a process of its own, with the settings of a plain installation.

Given as JSON: `dsn`; `until_idle`; `concurrency` (null: default); `tuned`: with uvloop and orjson, which a plain
installation does not have; `batch`: jobs per call of a batch handler (0: one job per call); `latency`: answer the
seconds from the payload's `t` to the start of the handler; `profile`: a file for cProfile.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import sys
import threading
import time
from typing import Any

from benchmarks.children import answer, arguments, say_ready, wait_for_word
from benchmarks.payloads import QUEUE
from jobqueue import App, Job
from jobqueue.telemetry.log import configure_logging
from jobqueue.worker.worker import Worker


def make_app(dsn: str, batch: int, delays: list[float] | None) -> App:
    """An application with one handler that does nothing, or that notes how long its job was under way."""
    app = App(dsn)
    if delays is not None:

        @app.job(QUEUE)
        async def note_delay(payload: dict[str, Any]) -> None:
            delays.append(time.monotonic() - payload["t"])
    elif batch:

        @app.job(QUEUE, batch_size=batch)
        async def send_mails(jobs: list[Job]) -> None:
            pass
    else:

        @app.job(QUEUE)
        async def send_mail(payload: dict[str, Any]) -> None:
            pass

    return app


async def work(app: App, given: dict[str, Any]) -> Worker:
    """Run the worker until it is idle, or until the parent says `stop`."""
    until_idle = bool(given["until_idle"])
    worker = await app.make_worker([QUEUE], given["concurrency"], until_idle)
    if not until_idle:
        loop = asyncio.get_running_loop()

        def wait_for_stop() -> None:
            wait_for_word()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(worker.drain)

        threading.Thread(target=wait_for_stop, daemon=True).start()
    await worker.run()
    return worker


def run(app: App, given: dict[str, Any]) -> Worker:
    """Run the worker on the event loop of the installation that is measured."""
    if not given["tuned"]:
        return asyncio.run(work(app, given))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work(app, given))


def main() -> None:
    """A worker process: begins when it is told to."""
    given = arguments()
    if not given["tuned"]:
        # The extra `fast` is for those who ask for it: importing it must fail, as it does without it.
        for name in ("orjson", "uvloop"):
            sys.modules[name] = None  # type: ignore[assignment]
    configure_logging("info", "auto")
    delays: list[float] | None = [] if given["latency"] else None
    app = make_app(given["dsn"], given["batch"], delays)
    say_ready()
    wait_for_word()
    began = time.process_time()
    profiler = cProfile.Profile() if given["profile"] else None
    if profiler is not None:
        profiler.enable()
    worker = run(app, given)
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(given["profile"])
    answer({"cpu": time.process_time() - began, "delays": delays or [], "done": worker.status().done})


if __name__ == "__main__":
    main()
