"""`GET /jobs/{id}`: requests that come while the process is busy share a statement.

```
read()  ─►  a line per form of answer  ─►  at the end of the loop's turn, or when a statement has ended:
            up to 16 of a line, in one statement (sql/functions/http_read.sql)  ─►  each request gets its own row
```

One request alone is read at once. Every request keeps its own tenants: the row policies decide for each by itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
from psycopg_pool import PoolTimeout

from jobqueue.api.database import Database
from jobqueue.api.job_state import State

MOST_TOGETHER = 16
"""Requests that share a statement: from here on more of them save less than 5 % (docs/decisions/0008-http-identity.md)."""
STATEMENTS = 2
"""At the same time: one is read while the answers of the other are written; the other connections are for other routes."""

_READ = """\
select etag, version, status, alive, due_in, ends_in, body
from jobqueue.http_read(%s, %s::text[], %s::uuid[], %s::text[], %s, %s, %s)"""


class Form(NamedTuple):
    """What an answer shall have: `fields` and `include` as of the query, and whether attempts have stack traces."""

    fields: tuple[str, ...] | None = None
    include: tuple[str, ...] | None = None
    traces: bool = False


WHOLE = Form()


@dataclass(eq=False, slots=True)
class _Asked:
    """A request that waits for its job, since `since` (a time of the event loop)."""

    job_id: str
    etags: str | None
    tenants: str
    answer: asyncio.Future[State]
    since: float


class Reads:
    """The lines of one process. `statements`: how many run at the same time (2); `together`: jobs in each (16)."""

    def __init__(self, database: Database, *, statements: int = STATEMENTS, together: int = MOST_TOGETHER) -> None:
        self._database = database
        self._statements = statements
        self._together = together
        self._lines: dict[Form, deque[_Asked]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._alone: set[asyncio.Task[None]] = set()
        self._planned = False
        self._patience: asyncio.TimerHandle | None = None

    async def read(self, job_id: str, etags: Sequence[str] | None, tenants: str, form: Form) -> State:
        """Return a job as these tenants see it; `version` is None if there is none.

        `etags`: what the client has (`["*"]`: anything). Raises as the database does, and PoolTimeout if the request
        has not come to its turn within the database's patience.
        """
        loop = asyncio.get_running_loop()
        known = "\n".join(etags) if etags else None
        asked = _Asked(job_id, known, tenants, loop.create_future(), loop.time())
        self._lines.setdefault(form, deque()).append(asked)
        if not self._planned:
            self._planned = True
            loop.call_soon(self._start)
        return await asked.answer

    def _start(self) -> None:
        """Give each free statement the head of a line; the lines take turns."""
        self._planned = False
        while self._lines and len(self._running) < self._statements:
            form, line = next(iter(self._lines.items()))
            del self._lines[form]
            batch = [line.popleft() for _ in range(min(len(line), self._together))]
            if line:
                self._lines[form] = line
            task = asyncio.create_task(self._answer(form, batch))
            self._running.add(task)
            task.add_done_callback(self._ended)
        if not self._lines and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif self._lines and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(self._database.patience, self._give_up)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _answer(self, form: Form, batch: list[_Asked]) -> None:
        try:
            states = await self._states(form, batch)
        except asyncio.CancelledError:
            for asked in batch:
                asked.answer.cancel()
            raise
        except psycopg.errors.QueryCanceled as error:
            # One took the time of all: each tries by itself, as if it had come alone, and holds up nobody's turn.
            if len(batch) == 1:
                _fail(batch, error)
                return
            for asked in batch:
                task = asyncio.create_task(self._answer(form, [asked]))
                self._alone.add(task)
                task.add_done_callback(self._alone.discard)
        except Exception as error:
            # A server that is away or too slow would be no better for one of them; of another error only one may be the cause.
            if len(batch) == 1 or not isinstance(error, psycopg.Error) or isinstance(error, psycopg.OperationalError):
                _fail(batch, error)
                return
            for asked in batch:
                await self._answer(form, [asked])
        else:
            for asked, state in zip(batch, states, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(state)

    async def _states(self, form: Form, batch: list[_Asked]) -> list[State]:
        parameters = (
            self._database.role,
            [asked.tenants for asked in batch],
            [asked.job_id for asked in batch],
            [asked.etags for asked in batch],
            None if form.fields is None else list(form.fields),
            None if form.include is None else list(form.include),
            form.traces,
        )
        return [State(*row) for row in await self._database.rows(_READ, parameters, read_only=True)]

    def _give_up(self) -> None:
        """Refuse those who have waited too long for a statement to be free."""
        self._patience = None
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._database.patience
        for form, line in list(self._lines.items()):
            while line and line[0].since <= oldest:
                _fail([line.popleft()], PoolTimeout("the statements before this one take too long"))
            if not line:
                del self._lines[form]
        if self._lines:
            first = min(line[0].since for line in self._lines.values())
            self._patience = loop.call_at(first + self._database.patience, self._give_up)


def _fail(batch: list[_Asked], error: Exception) -> None:
    for asked in batch:
        if not asked.answer.done():
            asked.answer.set_exception(error)
