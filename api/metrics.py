"""`GET /metrics`: what the database counts, and what this API's processes count themselves (meter.py).

```
scrape ─►  kept for 5 s; all scrapes that come meanwhile share one statement  ─►  jobqueue.metrics()
       ─►  with the numbers of meter.py, in the format that the scraper accepts
```

The database's numbers are the same from every process, and counters survive restarts. When the database cannot be asked,
the answer is still 200, with `jobqueue_database_up 0` and without its numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString
from starlette.responses import Response

from jobqueue.api.context import Call
from jobqueue.api.database import Database
from jobqueue.api.meter import PREFIX, Collected, Meter
from jobqueue.api.operations import Operation, Reply

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

KEPT_SECONDS = 5.0
"""Numbers of the database are answered to every scrape for this long."""
STATEMENT_SECONDS = 5.0
"""A database that needs longer is taken for one that cannot be asked."""

HELP: dict[str, str] = {
    "job_status_transitions_total": "Changes of status of jobs, by every client; sending and deleting are none.",
    "jobs_finished_total": "Jobs that reached an end.",
    "job_attempts_failed_total": "Attempts that failed, whether a retry followed or not.",
    "job_retries_total": "Attempts after which a retry followed.",
    "job_duration_seconds": "From the claim to the end, of attempts that completed or failed.",
    "job_wait_seconds": "From being due to the claim, of the same attempts.",
    "jobs": "Jobs by status; counted no further than 100,000 per queue.",
    "jobs_ready": "Jobs that could run now.",
    "jobs_stuck": "Jobs that run without progress, stage or checkpoint for longer than warn_slow_job (30 min).",
    "jobs_unrescued": "Jobs whose lease ended over 2 minutes ago and that nobody rescued.",
    "queue_oldest_ready_age_seconds": "How long the longest waiting ready job has been due; 0: none waits.",
    "queue_paused": "Whether the queue is paused.",
    "queue_workers": "Live workers that read the queue.",
    "workers": "Workers by state.",
    "worker_slots": "Jobs that live workers can run at a time.",
    "worker_slots_busy": "Jobs that they run now.",
    "worker_slots_stuck": "Slots that are kept by handlers whose attempts have ended.",
    "maintenance_late_seconds": "How long the maintenance step that is most late has been due.",
    "table_bytes": "Size of a table with its indexes.",
    "table_live_rows": "Rows of a table, as the server estimates.",
    "table_dead_rows": "Dead rows of a table, as the server estimates.",
    "job_table_bound_bytes": "The setting warn_table_size.",
    "notify_queue_usage_ratio": "How full the server's queue of notifications is; at 1 commits that notify fail.",
    "watched_topics": "Jobs, tenants and queues that somebody listens to.",
    "oldest_transaction_age_seconds": "Age of the oldest open transaction; vacuum waits for it.",
    "database_up": "Whether the database could be asked.",
    "build_info": "The versions of the program and of the schema.",
}

_QUERY = "select name, labels, value, buckets from jobqueue.metrics()"
_CONTEXT = "select jobqueue.http_context(%s, '', true), set_config('statement_timeout', %s, true)"

Row = tuple[str, Mapping[str, str], float, Sequence[tuple[str, float]] | None]


class Numbers:
    """The database's numbers, for all scrapes of this process. `kept`: for how many seconds (5)."""

    def __init__(self, database: Database, *, kept: float = KEPT_SECONDS) -> None:
        self._database = database
        self._kept = kept
        self._rows: list[Row] | None = None
        self._expires = 0.0
        self._asking: asyncio.Task[list[Row] | None] | None = None

    async def rows(self) -> list[Row] | None:
        """Return them as `jobqueue.metrics()` does; None: the database cannot be asked."""
        loop = asyncio.get_running_loop()
        if self._asking is None:
            if loop.time() < self._expires:
                return self._rows
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(self._keep)
        # A scrape that gives up does not take the answer from the others.
        return await asyncio.shield(self._asking)

    def _keep(self, asked: asyncio.Task[list[Row] | None]) -> None:
        self._asking = None
        if not asked.cancelled():
            self._rows = asked.result()
            self._expires = asked.get_loop().time() + self._kept

    async def _ask(self) -> list[Row] | None:
        try:
            async with asyncio.timeout(STATEMENT_SECONDS + 1):
                return await self._database.reading(self._read)
        except Exception as error:
            logger.warning("the database's metrics cannot be read: %s", " ".join(str(error).split()) or "no answer")
            return None

    async def _read(self) -> list[Row]:
        async with self._database.connection(1.0) as connection, connection.transaction():
            await connection.execute(_CONTEXT, (self._database.role, f"{STATEMENT_SECONDS:g}s"))
            cursor = await connection.execute(_QUERY)
            return await cursor.fetchall()


def families(rows: Iterable[Row], version: str) -> list[Metric]:
    """Return the rows of `jobqueue.metrics()` as metrics; `version`: of the program."""
    found: dict[str, Any] = {}
    schema_version = 0
    for name, labels, value, buckets in rows:
        if name == "schema_version":
            schema_version = int(value)
            continue
        if name not in found:
            found[name] = _family(name, labels, buckets is not None)
        family, values = found[name], list(labels.values())
        if buckets is None:
            family.add_metric(values, value)
        else:
            # 1.0 and not 1, as the format wants bounds
            pairs = [(floatToGoString(bound), n) for bound, n in buckets]  # type: ignore[no-untyped-call]
            family.add_metric(values, pairs, value)
    info = GaugeMetricFamily(PREFIX + "build_info", HELP["build_info"], labels=("version", "schema_version"))
    info.add_metric((version, str(schema_version or "unknown")), 1)
    return [*found.values(), info]


def _family(name: str, labels: Mapping[str, str], is_histogram: bool) -> Any:
    kind: Any = GaugeMetricFamily
    if is_histogram:
        kind = HistogramMetricFamily
    elif name.endswith("_total"):
        kind = CounterMetricFamily
    return kind(PREFIX + name, HELP.get(name, name), labels=tuple(labels))


def up(is_up: bool) -> Metric:
    """Return whether the database could be asked, as a metric."""
    return GaugeMetricFamily(PREFIX + "database_up", HELP["database_up"], value=int(is_up))


async def get_metrics(call: Call) -> Response:
    """Answer with all numbers, in the format that the scraper accepts."""
    state = call.scope["app"].state
    meter: Meter = state.meter
    rows = await state.numbers.rows()
    meter.look(call.services, state.feed)

    def write() -> tuple[bytes, str]:
        registry = CollectorRegistry(auto_describe=False)
        database = [] if rows is None else families(rows, state.version)
        registry.register(Collected([up(rows is not None), *database, *meter.metrics()]))
        encode, media = choose_encoder(call.header(b"accept") or "")
        return encode(registry), media

    # Thousands of lines take tens of milliseconds.
    text, media = await asyncio.to_thread(write)
    return Response(text, headers={"Content-Type": media, "Cache-Control": "no-store"})


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="metrics",
        method="GET",
        path="/metrics",
        summary="Numbers for monitoring",
        description="In the text format of Prometheus, or OpenMetrics if it is accepted. The database's numbers are read "
        "every 5 s at most. Open to all with JOBQUEUE_METRICS_PUBLIC=1. Costs no quota.",
        handler=get_metrics,
        tag="probes",
        scopes=("metrics",),
        replies={200: Reply("The numbers", media="text/plain")},
        at_root=True,
        is_free=True,
        public_setting="metrics_public",
    ),
)
