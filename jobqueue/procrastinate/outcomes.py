"""What a task returned or raised, kept with its job: the stock worker only logs it.

    app.run_worker(worker_middleware=[keep_results])

Our own worker (`jobqueue worker their.app`) keeps both without this.
"""

from __future__ import annotations

from typing import Any


async def keep_results(call_next: Any, context: Any, worker: Any) -> Any:
    """Worker middleware of procrastinate: note the result, or the exception with its traceback, for the job's end."""
    connector: Any = context.app.connector
    note = getattr(connector, "note_outcome", None)
    try:
        result = await call_next()
    except BaseException as error:
        if note is not None:
            note(context.job.id, None, error)
        raise
    if note is not None:
        note(context.job.id, result, None)
    return result
