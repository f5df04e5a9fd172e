"""Idle workers: the real `Wake` of so many workers, which sleep on a queue and listen. They are woken but claim
nothing, so what they cost the senders is what waking costs, and not the work.

Given as JSON: `dsn`, `queue`, `count`.
"""

from __future__ import annotations

import asyncio
import threading

from benchmarks.children import answer, arguments, say_ready, wait_for_word
from jobqueue.worker.wake import Wake


async def idle(wake: Wake, woken: list[int]) -> None:
    """What the claim loop of a worker does while its claims come back empty."""
    while True:
        await wake.wait()
        woken[0] += 1


async def listen(dsn: str, queue: str, count: int) -> int:
    """Sleep until told to stop; return how often the workers were woken."""
    wakes = [Wake(dsn, [queue]) for _ in range(count)]
    woken = [0]
    for wake in wakes:
        wake.start()
    tasks = [asyncio.create_task(idle(wake, woken)) for wake in wakes]
    async with asyncio.timeout(60):
        while not (any(wake.armed for wake in wakes) and all(wake.status == "listening" for wake in wakes)):
            await asyncio.sleep(0.01)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_stop() -> None:
        wait_for_word()
        loop.call_soon_threadsafe(stopped.set)

    threading.Thread(target=wait_for_stop, daemon=True).start()
    say_ready()
    await stopped.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(wake.stop() for wake in wakes))
    return woken[0]


def main() -> None:
    """A process with idle workers."""
    given = arguments()
    answer({"woken": asyncio.run(listen(given["dsn"], given["queue"], given["count"]))})


if __name__ == "__main__":
    main()
