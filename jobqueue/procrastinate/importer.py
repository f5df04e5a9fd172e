"""Moving a procrastinate installation here: its waiting jobs, and which ticks of periodic tasks have been deferred.

Batch by batch, in the order of their ids: lock the jobs there (others may hold theirs: they are passed over), add them
here under ids that follow from theirs, mark them as cancelled there. A job that is added twice is added once, so the
import may be stopped anywhere and run again. Within one database a batch is one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID

import psycopg
from psycopg import Connection, sql
from psycopg.rows import dict_row

from jobqueue.errors import ConfigurationError, ConflictError, translate
from jobqueue.procrastinate.ids import schedule_name
from jobqueue.procrastinate.statements import Row

BATCH = 1000
EPOCH_MS = 1_000_000_000_000
"""Imported jobs have ids as of September 2001, a millisecond apart, so that they sort by their old ids and before new ones."""

COUNT = "select status::text, count(*) as n from {}.procrastinate_jobs group by 1 order by 1"
WAITING = """
    select id, queue_name, task_name, priority, lock, queueing_lock, args::text as args, scheduled_at, attempts
    from {}.procrastinate_jobs where status = 'todo' and id > %s order by id limit %s
"""
CANCEL = "update {}.procrastinate_jobs set status = 'cancelled' where id = any (%s)"
TICKS = """
    select d.task_name, d.periodic_id, max(d.defer_timestamp) as tick, coalesce(max(j.queue_name), 'default') as queue
    from {0}.procrastinate_periodic_defers d left join {0}.procrastinate_jobs j on j.id = d.job_id
    group by 1, 2 order by 1, 2
"""
IDENTITY = """
    select (select system_identifier from pg_control_system()) || ':' || (
        select oid from pg_database where datname = current_database()) as identity
"""
SCHEMA = "select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = to_regclass(%s)"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, or with a dry run would do. `held`: waiting jobs that somebody has locked or whose queueing_lock
    is held here already; they stay. `running`, `ended`: jobs that are not moved."""

    jobs: int
    ticks: int
    held: int
    running: int
    ended: int


class Importer:
    """Moves what waits in `source` to `target`; both are connection strings, and may be the same.

    `schema`: where procrastinate's tables are (default: found on the search path). `progress` is called with the number
    of jobs moved so far. Raises ConfigurationError if there are no such tables.
    """

    def __init__(
        self,
        target: str,
        source: str | None = None,
        *,
        schema: str | None = None,
        batch: int = BATCH,
        progress: Callable[[int], object] = lambda moved: None,
    ) -> None:
        self._target, self._source = target, source
        self._schema, self._batch, self._progress = schema, batch, progress

    def run(self, *, dry_run: bool = False) -> Imported:
        """Move everything. `dry_run`: only count."""
        with self._connections() as (source, target):
            name = self._schema_of(source)
            schema = sql.Identifier(name)
            # the triggers of those tables name each other without their schema
            source.execute(
                "select set_config('search_path', format('%%I, %%s', %s::text, current_setting('search_path')), false)",
                (name,),
            )
            counts = {row["status"]: row["n"] for row in _rows(source, COUNT, schema)}
            ticks = _rows(source, TICKS, schema)
            waiting = counts.get("todo", 0)
            moved = waiting
            if not dry_run:
                moved = self._move_jobs(source, target, schema)
                self._move_ticks(target, ticks)
            ended = sum(counts.values()) - waiting - counts.get("doing", 0)
            return Imported(moved, len(ticks), waiting - moved, counts.get("doing", 0), ended)

    @contextmanager
    def _connections(self) -> Iterator[tuple[Connection[Row], Connection[Row]]]:
        with psycopg.connect(self._target, row_factory=dict_row, autocommit=True) as target:
            if self._source is None:
                yield target, target
                return
            with psycopg.connect(self._source, row_factory=dict_row, autocommit=True) as source:
                yield source, target

    def _schema_of(self, source: Connection[Row]) -> str:
        table = f"{self._schema}.procrastinate_jobs" if self._schema else "procrastinate_jobs"
        row = source.execute(SCHEMA, (table,)).fetchone()
        if row is None:
            raise ConfigurationError(
                f"there is no table {table}",
                hint="Name the database of the procrastinate installation with --source, its schema with --schema.",
            )
        return str(row["nspname"])

    def _move_jobs(self, source: Connection[Row], target: Connection[Row], schema: sql.Identifier) -> int:
        row = source.execute(IDENTITY).fetchone()
        assert row is not None
        salt, after, moved = sha256(row["identity"].encode()).digest(), 0, 0
        while True:
            with source.transaction(), target.transaction():
                waiting = _rows(source, f"{WAITING} for update skip locked", schema, after, self._batch)
                if not waiting:
                    return moved
                after = waiting[-1]["id"]
                taken = self._add(target, waiting, salt)
                source.execute(sql.SQL(CANCEL).format(schema), (taken,))
            moved += len(taken)
            self._progress(moved)

    def _add(self, target: Connection[Row], waiting: list[Row], salt: bytes) -> list[int]:
        """Add jobs; returns their old ids. One whose queueing_lock is held here already is left where it is."""
        free = [row for row in waiting if row["queueing_lock"] is None]
        with translate():
            self._defer(target, free, salt)
        keyed = [row for row in waiting if row["queueing_lock"] is not None and self._add_alone(target, row, salt)]
        return [row["id"] for row in (*free, *keyed)]

    def _add_alone(self, target: Connection[Row], row: Row, salt: bytes) -> bool:
        try:
            with target.transaction(), translate():
                self._defer(target, [row], salt)
        except ConflictError:
            # Held by a job that was deferred here, or by this one, which an earlier run has added.
            return self._is_here(target, row, salt)
        return True

    def _is_here(self, target: Connection[Row], row: Row, salt: bytes) -> bool:
        query = "select count(*) as n from jobqueue.procrastinate_job_status(%s)"
        found = target.execute(query, (imported_id(row["id"], salt),)).fetchone()
        return found is not None and found["n"] == 1

    def _defer(self, target: Connection[Row], rows: list[Row], salt: bytes) -> None:
        if rows:
            text = "[" + ",".join(_element(row, salt) for row in rows) + "]"
            target.execute("select jobqueue.procrastinate_defer(%s::text::jsonb)", (text,))

    def _move_ticks(self, target: Connection[Row], ticks: list[Row]) -> None:
        for tick in ticks:
            name = schedule_name(tick["task_name"], tick["periodic_id"])
            given = (name, tick["queue"], tick["task_name"], tick["tick"])
            target.execute("select jobqueue.procrastinate_tick(%s, %s, %s, %s)", given)


def imported_id(id: int, salt: bytes) -> UUID:
    """Return the id that a job gets here: version 7, in the order of the old ids, the same each time."""
    time = (EPOCH_MS + id) & ((1 << 48) - 1)
    rest = int.from_bytes(sha256(salt + id.to_bytes(8, "big")).digest()[:10], "big")
    return UUID(int=(time << 80) | (7 << 76) | ((rest >> 64 & 0xFFF) << 64) | (2 << 62) | (rest & ((1 << 62) - 1)))


def _element(row: Row, salt: bytes) -> str:
    head: dict[str, Any] = {
        "id": str(imported_id(row["id"], salt)), "queue": row["queue_name"], "task": row["task_name"],
        "priority": row["priority"], "lock": row["lock"], "queueing_lock": row["queueing_lock"], "attempts": row["attempts"],
        "at": row["scheduled_at"].isoformat() if row["scheduled_at"] is not None else None,
    }  # fmt: skip
    return f'{json.dumps(head)[:-1]},"args":{row["args"]}}}'


def _rows(connection: Connection[Row], query: str, schema: sql.Identifier, *parameters: Any) -> list[Row]:
    return connection.execute(sql.SQL(query).format(schema), parameters or None).fetchall()
