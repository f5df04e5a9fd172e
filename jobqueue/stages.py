"""Stages: how they are declared, and one of them as a block of a handler."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from jobqueue.errors import HandlerSignal, JobqueueError
from jobqueue.json_text import clean_text
from jobqueue.tracked import json_argument

if TYPE_CHECKING:
    from jobqueue.tracked import Tracked

LOAD_OUTPUT = "select o from jobqueue.stage_output(%s, %s, %s) as t (o) where o is not null"


class Stage(dict[str, Any]):
    """One declared stage: `@app.job("ocr", stages=[Stage("scan"), Stage("recognise", weight=5)])`.

    `weight`: its share in the overall percentage (default 1, above 0). A dict, and so the JSON that SQL, HTTP and
    `send(stages=…)` take.
    """

    def __init__(self, name: str, weight: float = 1) -> None:
        super().__init__(name=name, weight=weight)


class StageBlock:
    """A stage: in_progress while its block runs, then completed, or failed if the block raises.

    ```python
    async with job.stage("scan", of=3) as stage:
        if not stage.done:
            await stage.save(await scan())
        files = stage.output
    ```

    A stage is `done` if an earlier attempt completed it and saved its output; then nothing of it is changed.
    """

    def __init__(
        self, job: Tracked, name: str, of: int | None, weight: float | None, metadata: dict[str, Any] | None
    ) -> None:
        self.name = name
        self.done = False
        """Whether an earlier attempt has completed it, with its output saved."""
        self.output: Any = None
        """What `save` kept, in this attempt or an earlier one."""
        self._job = job
        self._saved = False
        self._detail = {"of": of, "weight": weight, "metadata": metadata}

    async def __aenter__(self) -> StageBlock:
        job = self._job
        if job.claim.attempt > 1:
            rows = await job._rows(LOAD_OUTPUT, self.name)
            if rows:
                self.done, self.output = True, rows[0][0]
                job.obey()
                return self
        job.obey(await self._call("in_progress", {k: v for k, v in self._detail.items() if v is not None}))
        return self

    async def save(self, output: Any) -> None:
        """Keep the stage's result (JSON, at most 8 MB), so that the stage is `done` in later attempts."""
        self.output = output
        self._saved = True

    async def substage(self, text: str | None, done: int | None = None, total: int | None = None) -> None:
        """Say what happens inside the stage, for example `Embedding chunk 234 of 500`; None: nothing in particular.

        `done` of `total` counts within the stage. Sent as progress is. Raises Cancelled.
        """
        self._job._report(done, total, text, None, {"substage": text})
        self._job.raise_if_cancelled()

    async def skip(self, reason: str | None = None) -> None:
        """Mark the stage as skipped: there is nothing to do in it."""
        await self._call("skipped", {"metadata": {"reason": reason}} if reason else {})
        self.done = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if not self.done:
                detail = {"output": self.output} if self._saved else {}
                self._job.obey(await self._call("completed", detail))
        elif isinstance(error, Exception) and not isinstance(error, HandlerSignal | JobqueueError):
            # The handler may catch it and go on. The end of the attempt takes care of all other ways out.
            await self._note_failure(error)

    async def _note_failure(self, error: Exception) -> None:
        text = clean_text(str(error) or type(error).__name__, 2000)
        try:
            await self._call("failed", {"error": text})
        except Exception as second:
            # The handler's own error is the one to be seen.
            error.add_note(f"the stage could not be marked as failed: {second}")

    async def _call(self, status: str, detail: dict[str, Any]) -> str | None:
        text = json_argument(detail, "the stage") if detail else None
        command: str | None = await self._job._call("stage", stage=self.name, status=status, detail=text)
        return command
