"""Queues: their options and pauses; and one queue with its charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from jobqueue.api.errors import ApiError
from jobqueue.api.ui import charts
from jobqueue.api.ui.administer import PAUSE_QUEUE, RESUME_QUEUE
from jobqueue.api.ui.rendering import duration
from jobqueue.api.ui.views import View
from jobqueue.api.ui.visit import Visit

PER_PAGE = 200
"""A row takes the browser and the template longer than the database."""

_QUEUES = "select jobqueue.http_list(%s, %s, 'queues')"
_QUEUE = "select jobqueue.http_queue_rows(%s)"
_STATS = (
    "select begins_at, sent, completed, failed, retried, wait_p50, wait_p95, run_p50, run_p95, ready, processing "
    "from jobqueue.queue_stats(%s, %s, %s, %s)"
)
_COLUMNS = (
    "begins_at",
    "sent",
    "completed",
    "failed",
    "retried",
    "wait_p50",
    "wait_p95",
    "run_p50",
    "run_p95",
    "ready",
    "processing",
)

_DURATIONS = {
    "retry_delay",
    "retry_delay_max",
    "timeout",
    "max_runtime",
    "lease",
    "expires_in",
    "keep_completed",
    "keep_ended",
    "ageing",
}
_OPTIONS: Mapping[str, str] = {
    "policy": "Policy",
    "concurrency": "At most at a time",
    "group_concurrency": "At most at a time per group",
    "key_concurrency": "At most at a time per key",
    "rate_limit": "Rate limit",
    "max_retries": "Retries",
    "retry_delay": "First retry after",
    "retry_backoff": "Longer after each retry",
    "retry_delay_max": "At most after",
    "timeout": "Time-out without a sign of life",
    "max_runtime": "Longest run",
    "lease": "Lease",
    "expires_in": "Waiting jobs expire after",
    "keep_completed": "Completed jobs are kept",
    "keep_ended": "Other ended jobs are kept",
    "dead_letter": "Dead letter queue",
    "ageing": "Priority rises every",
    "fair_by": "Fair by",
    "warn_backlog": "Warning at so many ready jobs",
}
_NEVER: Mapping[str, str] = {"keep_completed": "for ever", "keep_ended": "for ever"}


@dataclass(frozen=True, slots=True)
class Range:
    """A time that charts show, and the width of a point."""

    name: str
    words: str
    long: timedelta
    bucket: timedelta


RANGES = (
    Range("1h", "1 hour", timedelta(hours=1), timedelta(minutes=1)),
    Range("6h", "6 hours", timedelta(hours=6), timedelta(minutes=5)),
    Range("24h", "24 hours", timedelta(hours=24), timedelta(minutes=15)),
    Range("7d", "7 days", timedelta(days=7), timedelta(hours=2)),
    Range("30d", "30 days", timedelta(days=30), timedelta(hours=6)),
)


async def show_queues(visit: Visit) -> Response:
    """List the queues by name with the options that differ from one to the other, a page of them at a time."""
    queues = await visit.json(_QUEUES)
    behind = [queue for queue in queues if queue["name"] > visit.query.get("after", "")]
    shown = behind[:PER_PAGE]
    following = shown[-1]["name"] if len(behind) > PER_PAGE else None
    is_first = len(behind) == len(queues)
    return visit.render(
        "queues.html", queues=shown, total=len(queues), following=following, is_first=is_first, **_commands(visit)
    )


async def show_queue(visit: Visit) -> Response:
    """Show one queue: its options, its pause, and how it did."""
    name = visit.query.get("name", "")
    rows = await visit.rows(_QUEUE, name)
    if not rows:
        raise ApiError("QUEUE_NOT_FOUND", f"There is no queue {name[:200]!r}.")
    queue = json.loads(rows[0][0])
    chosen = next((one for one in RANGES if one.name == visit.query.get("range")), RANGES[0])
    stats = await _stats(visit, name, chosen)
    return visit.render(
        "queue.html",
        queue=queue,
        options=_options(queue),
        ranges=RANGES,
        chosen=chosen,
        drawings=_charts(stats),
        stats=[row for row in reversed(stats) if any(row[column] for column in _COLUMNS[1:])],
        sums={column: sum(row[column] or 0 for row in stats) for column in ("sent", "completed", "failed", "retried")},
        **_commands(visit),
    )


def _commands(visit: Visit) -> dict[str, Any]:
    return {"refusal": PAUSE_QUEUE.refusal(visit), "pause": PAUSE_QUEUE, "resume": RESUME_QUEUE}


def _options(queue: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options as words; durations of the API are seconds."""
    shown = []
    for name, words in _OPTIONS.items():
        value = queue[name]
        if value is None:
            text = _NEVER.get(name, "none")
        elif name in _DURATIONS:
            text = duration(value)
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        else:
            text = json.dumps(value) if isinstance(value, dict) else f"{value:,}" if isinstance(value, int) else value
        shown.append((words, text))
    return shown


async def _stats(visit: Visit, name: str, chosen: Range) -> list[dict[str, Any]]:
    until = datetime.now(UTC)
    rows = await visit.rows(_STATS, name, until - chosen.long, until, chosen.bucket)
    return [dict(zip(_COLUMNS, row, strict=True)) for row in rows]


def _charts(stats: list[dict[str, Any]]) -> list[Markup]:
    times = [row["begins_at"].astimezone(UTC) for row in stats]

    def series(**columns: str) -> list[charts.Series]:
        return [charts.Series(words, [row[column] for row in stats]) for words, column in columns.items()]

    halves, most = series(wait="wait_p50", run="run_p50"), series(wait="wait_p95", run="run_p95")
    return [
        charts.bars("Ended jobs (UTC)", times, series(completed="completed", failed="failed")),
        charts.lines("Standing jobs (UTC)", times, series(ready="ready", processing="processing")),
        charts.lines("Half of the attempts waited and ran at most", times, halves, " s"),
        charts.lines("95 % of the attempts waited and ran at most", times, most, " s"),
    ]


VIEWS = (
    View(name="queues", path="/queues", show=show_queues, section="queues"),
    View(name="queue", path="/queue", show=show_queue, section="queues"),
)
