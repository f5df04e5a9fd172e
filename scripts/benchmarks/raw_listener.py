"""The limit of a pickup: LISTEN, and a claim of the minimal table when notified; nothing else in the process.

Given as JSON: `dsn`, `jobs`: ends after so many. Answers the seconds from the payload's `t` until the claim returned.
"""

from __future__ import annotations

import json
import select
import time

from benchmarks import raw
from benchmarks.children import answer, arguments, say_ready, wait_for_word
from benchmarks.payloads import QUEUE
from benchmarks.places import Connection, connect

CHANNEL = "raw_ready"
MOST = 10
SEND = "with sent as (insert into raw_job (queue, payload) values (%s, %s)) select pg_notify('raw_ready', %s)"


def listen(connection: Connection, jobs: int) -> list[float]:
    """Claim whenever notified, until so many jobs have come."""
    delays: list[float] = []
    notified = [True]
    # Called for what arrives together with the answer to a claim; the socket would not become readable again for it.
    connection.add_notify_handler(lambda _: notified.__setitem__(0, True))
    while len(delays) < jobs:
        if not notified[0]:
            _wait(connection)
        notified[0] = False
        for _id, _token, text in connection.execute(raw.CLAIM, (QUEUE, MOST)).fetchall():
            delays.append(time.monotonic() - json.loads(text)["t"])
    return delays


def _wait(connection: Connection) -> None:
    select.select([connection.fileno()], [], [], 1.0)
    connection.pgconn.consume_input()
    while connection.pgconn.notifies() is not None:
        pass


def main() -> None:
    """A listening process."""
    given = arguments()
    with connect(given["dsn"]) as connection:
        raw.read_plainly(connection)
        connection.execute(f"listen {CHANNEL}".encode())
        say_ready()
        wait_for_word()
        answer({"delays": listen(connection, given["jobs"])})


if __name__ == "__main__":
    main()
