"""A database in which every page of the dashboard has something to show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from tests.sql.engine import Engine

NASTY = """<script>alert(1)</script>"><img src=x onerror=alert(2)>'{{7*7}}&amp;"""
"""What a user may write anywhere."""


@dataclass(slots=True)
class Seeds:
    """What was sent. Each is the id of a job, but `flow`, `batch`."""

    engine: Engine
    failed: UUID
    running: UUID
    waiting: UUID
    paused: UUID
    nasty: UUID
    flow: UUID
    batch: UUID


def seed(connection: psycopg.Connection[tuple[Any, ...]], dsn: str) -> Seeds:
    """Fill a database: queues, jobs of every status, failures, a flow, a batch, a schedule, workers, an audit."""
    engine = Engine(connection, dsn)
    engine.run(
        "insert into jobqueue.queue (name, warn_backlog) "
        "values ('ocr', null), ('export', 2), ('reports/daily', null), ('idle', null)"
    )
    engine.run("insert into jobqueue.setting values ('warn_slow_job', '\"5 min\"')")
    _failures(engine)
    running = _running(engine)
    (failed,) = engine.values("select min(id::text)::uuid from jobqueue.job where error_code = 'TimeoutError'")
    flow = _flow(engine)
    batch = _batch(engine)
    waiting = engine.send("export", display_name="Export: 5 documents", subject="document:7", tenant="acme")
    for n in range(3):
        engine.send("export", display_name=f"Export: {n + 2} documents", subject=f"document:{n}", tenant="acme")
    engine.send("reports/daily", delay=3600, display_name="Report of tomorrow")
    paused = engine.send("reports/daily", display_name="Report of the year")
    engine.call("pause", paused, "waits for the numbers")
    nasty = engine.send(
        "ocr", {"text": NASTY, "big": 9007199254740993}, display_name=NASTY, subject=NASTY, tenant="acme", created_by=NASTY,
        metadata={NASTY: NASTY}, priority=-5,
    )  # fmt: skip
    engine.call("pause_queue", "reports/daily", "the printer is on fire")
    engine.run(
        "select jobqueue.schedule('nightly-report', 'reports/daily', '0 3 * * 1-5', '{}', "
        '\'{"time_zone": "Europe/Berlin"}\'), '
        "jobqueue.schedule('clean-up', 'idle', '*/10 * * * *', '{}', '{}')"
    )
    engine.call("pause_schedule", "clean-up", "a migration is under way")
    _history(engine)
    return Seeds(engine, failed, running, waiting, paused, nasty, flow, batch)


def _failures(engine: Engine) -> None:
    for n, ago, job_type, error_class, code, message in (
        (7, "20 min", "ocr", "transient", "TimeoutError", "page {n} of 'scan-{n}.pdf' took longer than 30 s"),
        (3, "9 h", "ocr", "permanent", "UnicodeDecodeError", "'utf-8' codec can't decode byte 0xff in position {n}"),
        (2, "2 d", "export", "quota", "QUOTA", "The credits of this month are used up"),
        (1, "3 min", "export", "invalid", "ValidationError", NASTY),
    ):
        engine.run(
            "insert into jobqueue.job (queue, job_type, tenant, status, attempt, retry_count, started_at, completed_at, "
            "failed_at, error_class, error_code, error_message, display_name, subject) "
            "select %s, %s, 'acme', 'failed', 4, 3, now() - %s::interval, now() - %s::interval, now() - %s::interval, %s, %s, "
            "replace(%s, '{n}', i::text), 'Processing: scan-' || i || '.pdf', 'document:' || 100 + i "
            "from generate_series(1, %s) i",
            job_type, job_type, ago, ago, ago, error_class, code, message, n,
        )  # fmt: skip


def _running(engine: Engine) -> UUID:
    worker = UUID("00000000-0000-4000-8000-0000000000b1")
    engine.call(
        "register_worker",
        worker,
        {
            "name": "ocr-1",
            "hostname": "app-7.example.org",
            "pid": 4711,
            "version": "0.1.0",
            "queues": ["ocr", "export"],
            "concurrency": 8,
        },
    )
    for name in ("The Man Who Sold the World.pdf", "Heathen.pdf"):
        engine.send(
            "ocr",
            display_name=f"Processing: {name}",
            subject="document:1",
            tenant="acme",
            stages=["scan", "read", "merge"],
        )
    first, second = engine.claim(2, "ocr", worker)
    engine.call("stage", first.id, first.token, "scan", "completed", {"of": 3})
    engine.call("stage", first.id, first.token, "read", "in_progress")
    engine.call("progress", first.id, first.token, 58, "Processing chunk 11/17", {"done": 10, "total": 17})
    engine.call("progress", second.id, second.token, 5, "Reading")
    return first.id


def _flow(engine: Engine) -> UUID:
    rows = engine.rows(
        "select * from jobqueue.send_flow(%s::jsonb)",
        '[{"ref": "read", "queue": "idle", "options": {"tenant": "acme", "display_name": "Read the pages"}},'
        ' {"ref": "sum", "queue": "idle", "options": {"tenant": "acme"}, "depends_on": ["read"]},'
        ' {"ref": "mail", "queue": "idle", "options": {"tenant": "acme"}, "depends_on": ["sum", "read"]}]',
    )
    (flow,) = engine.values("select flow_id from jobqueue.flow_member where job_id = %s", rows[0]["id"])
    return UUID(str(flow))


def _batch(engine: Engine) -> UUID:
    batch = engine.call("create_batch", {"tenant": "acme", "name": "Import of March"})
    for _ in range(4):
        engine.send("idle", batch=str(batch), tenant="acme", priority=9)
    (one,) = engine.claim(1, "idle")
    engine.call("complete", one.id, one.token)
    return UUID(str(batch))


def _history(engine: Engine) -> None:
    """An hour of statistics."""
    engine.run(
        "insert into jobqueue.statistic (queue, begins_at, minutes, sent, completed, failed, failed_attempts, waits, runs, "
        "ready, processing) "
        "select 'ocr', date_trunc('minute', now() - n * interval '1 min', 'UTC'), 1, 20 + n % 7, 18 + n % 11, "
        "(n % 13 = 0)::int * 3, (n % 13 = 0)::int * 3, array[70 + 256 * (n % 9 + 1), 90 + 256], "
        "array[100 + 256 * 12, 110 + 256 * 3], 5 + n % 17, 6 + n % 3 from generate_series(1, 59) n"
    )
