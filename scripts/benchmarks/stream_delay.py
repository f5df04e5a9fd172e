"""P9, the client's side: an API in a process of its own, and a reader of a job's stream that notes how old reports are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.children import STOP, Child
from benchmarks.http import POOL, free_port


@contextmanager
def api(dsn: str) -> Iterator[int]:
    """Serve the API for this database; yields its port."""
    with Child("http_server", {"dsn": dsn, "bare": False, "port": (port := free_port()), "pool_size": POOL}) as child:
        child.wait_ready()
        yield port
        child.tell(STOP)


async def read(port: int, job_id: str, delays: list[float]) -> None:
    """Read a job's stream until cancelled; add the age in seconds of each new report, whose message is its time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    last = None
    try:
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            arrived, said = time.perf_counter(), json.loads(line[5:]).get("progress_message")
            if said is not None and said != last:
                delays.append(arrived - float(said))
                last = said
    finally:
        writer.close()
