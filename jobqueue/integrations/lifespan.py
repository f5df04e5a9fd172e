"""Starlette and FastAPI: the app's connections, the mounted HTTP API and a worker live as long as the web application.

```python
api = create_app(settings)                                     # jobqueue.api
web = FastAPI(lifespan=lifespan(jobs, api=api, worker=True))
web.mount("/queue", api)
```
Starlette does not run the lifespan of an application that is mounted; this does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from jobqueue.app import App
    from jobqueue.worker.worker import Worker

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]

logger = logging.getLogger(__name__)


def lifespan(
    app: App,
    *,
    api: Starlette | None = None,
    worker: bool | Mapping[str, Any] = False,
    around: Lifespan | None = None,
) -> Lifespan:
    """Return a lifespan for Starlette or FastAPI that opens and closes what jobqueue needs.

    `app`: opened at the start, so that a wrong DSN or schema is found then; closed at the end. `api`: what
    `jobqueue.api.create_app` returned, if it is mounted in this application. `worker`: True runs a worker in this
    process, or the arguments of `app.make_worker`, for example `{"concurrency": 10, "queues": ["mail"]}`; it drains at
    the end (at most `JOBQUEUE_DRAIN_TIMEOUT`, 60 s). `around`: your own lifespan; it begins first, ends last, and what
    it yields is the state of requests.

    Entering raises DatabaseUnavailable, SchemaOutdated, SchemaTooNew. A worker that ends with an error is logged at
    once, and the error is raised at the end.
    """

    @asynccontextmanager
    async def run(web: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            state = await stack.enter_async_context(around(web)) if around is not None else None
            await stack.enter_async_context(app)
            if api is not None:
                await stack.enter_async_context(api.router.lifespan_context(api))
            if worker is not False:
                options = {} if worker is True else dict(worker)
                await stack.enter_async_context(_working(await app.make_worker(**options)))
            yield state

    return run


@asynccontextmanager
async def _working(worker: Worker) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run(), name="jobqueue-worker")
    task.add_done_callback(_note_end)
    try:
        yield
    finally:
        worker.drain()
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # The server has no patience left: running jobs go back to the queue.
            worker.release_now()
            with contextlib.suppress(Exception):
                await task
            raise


def _note_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("the worker of this process ended; jobs wait for another one", exc_info=task.exception())
