"""The senders: one per kind, each with a connection of its own, in the order of the plan.

A batch whose answer did not arrive is sent again, with the same ids: the database knows it then, if it was committed.
What was answered after the commit goes to standard output, a line per batch: `{"accepted": [number, …], "refused": […]}`.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from chaos_lab.plan import KINDS, Planned, make_plan

SEND = "select id::text, created from jobqueue.send_many(%s, %s::jsonb)"
STATEMENT_SECONDS = 8.0
AGAIN_SECONDS = 0.3
BATCHES_A_SECOND = 2.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What the process is told, as JSON: `rate`: jobs per second over all kinds; `api`: a port of this machine."""

    dsn: str
    seed: int
    jobs: int
    rate: float
    api: int | None


class Sql:
    """Sends with `send_many`, in a transaction of the sender. A watch cuts what takes too long: the socket may be dead."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.Connection[Any] | None = None

    def send(self, batch: Sequence[Planned]) -> set[str]:
        """Send jobs of one kind and return the ids that stand in their places. Raises psycopg.Error, OSError."""
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, connect_timeout=3, application_name="chaos sender")
        jobs = [{"payload": job.payload(), "options": job.options()} for job in batch]
        watch = threading.Timer(STATEMENT_SECONDS, _cut, [self._connection])
        watch.start()
        try:
            with self._connection.transaction():
                rows = self._connection.execute(SEND, (KINDS[batch[0].kind].queue, json.dumps(jobs))).fetchall()
        except BaseException:
            self._connection.close()
            self._connection = None
            raise
        finally:
            watch.cancel()
        return {row[0] for row in rows}


def _cut(connection: psycopg.Connection[Any]) -> None:
    import os
    import socket

    with socket.socket(fileno=os.dup(connection.fileno())) as handle:
        handle.shutdown(socket.SHUT_RDWR)


class Http:
    """Sends with `POST /jobs` under an Idempotency-Key."""

    def __init__(self, port: int) -> None:
        self._port = port

    def send(self, batch: Sequence[Planned]) -> set[str]:
        """As of `Sql.send`. Raises OSError while the API cannot take them."""
        jobs = [{"queue": KINDS[job.kind].queue, "payload": job.payload(), **job.options()} for job in batch]
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=STATEMENT_SECONDS)
        headers = {"Content-Type": "application/json", "Idempotency-Key": batch[0].id}
        try:
            connection.request("POST", "/jobs", json.dumps({"jobs": jobs}), headers)
            answer = connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no answer: {error!r}") from error
        finally:
            connection.close()
        if answer.status != 202:
            print(f"POST /jobs: {answer.status} {body[:300]!r}", file=sys.stderr)
            raise OSError(f"the API answered {answer.status}")
        return {job["id"] for job in json.loads(body)["data"]}


def send_all(sender: Sql | Http, jobs: Sequence[Planned], rate: float) -> None:
    """Send jobs of one kind at a rate, each batch until it is answered for."""
    size = max(1, round(rate / BATCHES_A_SECOND))
    due = time.monotonic()
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        stand = _send_until_answered(sender, batch)
        outcome: dict[str, list[int]] = {"accepted": [], "refused": []}
        for job in batch:
            outcome["accepted" if job.id in stand else "refused"].append(job.number)
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()
        # What was missed is caught up with, at most at double the rate.
        due = max(due + size / rate, time.monotonic() + size / rate / 2)
        time.sleep(max(0.0, due - time.monotonic()))


def _send_until_answered(sender: Sql | Http, batch: Sequence[Planned]) -> set[str]:
    while True:
        try:
            return sender.send(batch)
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as error:
            print(f"{batch[0].kind} {batch[0].number}: sent again: {error}", file=sys.stderr)
            time.sleep(AGAIN_SECONDS)


def main() -> None:
    """Send what the orders name, then end."""
    orders = Orders(**json.loads(sys.argv[1]))
    plan = make_plan(orders.seed, orders.jobs)
    threads = []
    for name, kind in KINDS.items():
        jobs = [job for job in plan if job.kind == name]
        sender = Http(orders.api) if kind.http and orders.api is not None else Sql(orders.dsn)
        rate = orders.rate * kind.share / 100
        threads.append(threading.Thread(target=send_all, args=(sender, jobs, rate), name=name))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
