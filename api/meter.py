"""What the processes of the API count themselves: requests, times, streams, waits, connections.

```
one process:       numbers in memory
several (uvicorn): prometheus-client's files in PROMETHEUS_MULTIPROC_DIR, one per process, which server.py makes;
                   whichever process is asked adds all of them up
```

A label for the process would be the other way; then a scrape, which reaches one process at random, would see the others'
series come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from starlette.types import Scope

if TYPE_CHECKING:
    from prometheus_client import Metric

    from jobqueue.api.context import Services
    from jobqueue.api.feed import Feed

FILES_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "jobqueue_"
LOOK_SECONDS = 5.0
"""How often a process says how many streams, waits and connections it has."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN_ROUTE = "other"
"""The route of requests that no path of the API answers, so that nobody makes series by asking for paths."""


class Meter:
    """The numbers of one application. `count` is called for every request and costs a few µs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "Requests that were answered, by route template.",
            ("method", "route", "code"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "Time to answer; without event streams and requests that asked to wait.",
            ("method", "route"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._streams = self._gauge("http_streams", "Event streams that are open.")
        self._waits = self._gauge("http_long_polls", "Requests that wait for a job to change.")
        self._connections = self._gauge("api_pool_connections", "Connections of the API to the database.", "state")
        self._known: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self._looking: asyncio.Task[None] | None = None

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Note a request that was answered; `status` 0: its client left before (code 499)."""
        endpoint = scope.get("endpoint")
        route = getattr(endpoint, "route", UNKNOWN_ROUTE)
        method = scope["method"] if scope["method"] in METHODS else "other"
        key = (method, route, status)
        found = self._known.get(key)
        if found is None:
            found = self._requests.labels(method, route, str(status or 499)), self._seconds.labels(method, route)
            self._known[key] = found
        found[0].inc()
        if not (getattr(endpoint, "is_stream", False) or b"wait=" in scope["query_string"]):
            found[1].observe(seconds)

    def look(self, services: Services, feed: Feed) -> None:
        """Say how many streams, waits and connections this process has now."""
        self._streams.set(feed.streams)
        self._waits.set(services.hub.waiting)
        for state, number in services.database.connections().items():
            self._connections.labels(state).set(number)

    def start(self, services: Services, feed: Feed) -> None:
        """Look every few seconds, for the scrapes that reach other processes."""
        if FILES_VARIABLE in os.environ:
            self._looking = asyncio.create_task(self._look_again(services, feed))

    async def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking

    def metrics(self) -> Iterable[Metric]:
        """Return the numbers of all processes."""
        directory = os.environ.get(FILES_VARIABLE)
        if directory is None:
            found = list(self.registry.collect())
        else:
            _forget_dead(Path(directory))
            files = MultiProcessCollector(None, directory)  # type: ignore[no-untyped-call]
            # An application that this one is mounted in has numbers of its own there.
            found = [metric for metric in files.collect() if metric.name.startswith(PREFIX)]  # type: ignore[no-untyped-call]
        for metric in found:
            # When a series began: a third of the lines, and nothing reads them.
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return found

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry, multiprocess_mode="livesum")

    async def _look_again(self, services: Services, feed: Feed) -> None:
        while True:
            self.look(services, feed)
            await asyncio.sleep(LOOK_SECONDS)


class Collected(Collector):
    """Metrics that are there already, as a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _forget_dead(directory: Path) -> None:
    """Drop the gauges of processes that have ended; their counters stay, or the sums would go down."""
    for path in directory.glob("gauge_live*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
        except PermissionError:
            continue
