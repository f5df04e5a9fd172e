"""The worker of the procrastinate benchmark: `engine` is stock, connector or native."""

from __future__ import annotations

import asyncio
import logging

from benchmarks.children import answer, arguments, say_ready, wait_for_word
from benchmarks.procrastinate import CONCURRENCY, make_app
from jobqueue.procrastinate import adopt


async def work(dsn: str, engine: str) -> None:
    """Run jobs until none is left."""
    app = make_app(dsn, engine)
    if engine == "native":
        await adopt(app).run_worker(concurrency=CONCURRENCY, until_idle=True)
        return
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY, wait=False, install_signal_handlers=False)


def main() -> None:
    """A worker process: begins when it is told to."""
    given = arguments()
    logging.basicConfig(level=logging.WARNING)
    say_ready()
    wait_for_word()
    asyncio.run(work(given["dsn"], given["engine"]))
    answer({})


if __name__ == "__main__":
    main()
