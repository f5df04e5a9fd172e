"""What is done to them, one function per fault. Each begins and ends its injections and waits in between."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import psycopg

from chaos_lab.place import NotHere
from chaos_lab.scene import Scene

PRODUCT = "datname = current_database() and usename = 'chaos' and pid <> pg_backend_pid()"
TERMINATE = f"select count(pg_terminate_backend(pid)) from pg_stat_activity where {PRODUCT}"
RESTART_AFTER = 1.0
"""Seconds until a service manager starts a killed worker again."""
PAST_LEASE = 8.0
"""How much longer than the lease a frozen worker stays frozen."""
HOLE_SECONDS = 20.0
HOG_SECONDS = 15.0
FULL_SECONDS = 15.0
CLOCKS = ("+2h", "-1d", "+90s", "+0")


@dataclass(frozen=True, slots=True)
class Fault:
    """`act`: what is done. `says`: for people. `small`: what has to lie on a disk that can be filled. `proxied`: whether
    workers and API reach the server through the proxy. `clocked`: whether a worker's clock can be moved."""

    act: Callable[[Scene], None]
    says: str
    small: str | None = None
    proxied: bool = False
    clocked: bool = False


def kill(scene: Scene) -> None:
    """SIGKILL a worker, start it again, and let its jobs be found."""
    for turn in range(scene.rounds):
        worker = scene.workers[turn % len(scene.workers)]
        ids = scene.ids_of(worker)
        with scene.injection(f"SIGKILL of {worker.name}", killed=ids):
            worker.kill()
        scene.pause(RESTART_AFTER)
        worker.start()
        scene.pause(scene.lease + scene.calm)


def stop(scene: Scene) -> None:
    """SIGSTOP a worker for longer than its lease; it wakes up with jobs that others have."""
    for turn in range(scene.rounds):
        worker = scene.workers[turn % len(scene.workers)]
        with scene.injection(f"SIGSTOP of {worker.name}"):
            worker.send(signal.SIGSTOP)
            scene.pause(scene.lease + PAST_LEASE)
            worker.send(signal.SIGCONT)
        scene.pause(scene.calm)


def restart(scene: Scene) -> None:
    """Crash PostgreSQL and start it again."""
    for _ in range(scene.rounds):
        with scene.injection("immediate restart of PostgreSQL"):
            scene.place.crash()
            scene.pause(1.0)
            scene.place.revive()
        scene.pause(scene.calm)


def backends(scene: Scene) -> None:
    """Terminate every connection of the product, at random moments; then a storm of that."""
    rng = random.Random(scene.seed)
    with scene.place.connect() as connection:
        for _ in range(scene.rounds):
            with scene.injection("every backend terminated once"):
                connection.execute(TERMINATE.encode())
            scene.pause(scene.calm)
        with scene.injection("backends terminated again and again"):
            for _ in range(10):
                connection.execute(f"{TERMINATE} and random() < 0.5".encode())
                scene.pause(rng.uniform(0.2, 1.0))
    scene.pause(scene.calm)


def connections(scene: Scene) -> None:
    """Others take every connection, and the product loses those that it has."""
    with scene.place.connect() as connection, ExitStack() as taken:
        with scene.injection("no connection is free"):
            until = time.monotonic() + HOG_SECONDS
            while time.monotonic() < until:
                connection.execute(f"{TERMINATE} and application_name <> 'chaos hog'".encode())
                _take_all(scene.place.dsn, taken)
                scene.pause(0.05)
            taken.close()
    scene.pause(scene.calm)


def _take_all(dsn: str, taken: ExitStack) -> None:
    while True:
        try:
            taken.enter_context(psycopg.connect(dsn, application_name="chaos hog", connect_timeout=3))
        except psycopg.OperationalError:
            return


def blackhole(scene: Scene) -> None:
    """The network between the product and the server takes everything and brings nothing, then comes back for half."""
    assert scene.proxy is not None
    for _ in range(max(1, scene.rounds - 1)):
        with scene.injection("nothing is forwarded"):
            scene.proxy.freeze()
            scene.pause(HOLE_SECONDS)
            scene.proxy.thaw()
        scene.pause(scene.calm + 10.0)


def clock(scene: Scene) -> None:
    """Move the clock of a worker to and fro."""
    for offset in CLOCKS:
        with scene.injection(f"the clock of worker-0 at {offset}"):
            scene.set_clock(offset)
            scene.pause(scene.calm)


def snapshot(scene: Scene) -> None:
    """Keep a transaction open that sees the past, so that nothing can be cleaned up."""
    with scene.place.connect() as connection:
        with scene.injection("a snapshot is held"):
            with connection.transaction():
                connection.execute("set transaction isolation level repeatable read")
                connection.execute("select count(*) from jobqueue.queue")
                scene.wait_for_share(0.75)
    scene.pause(scene.calm)


def disk(scene: Scene) -> None:
    """No room for data; the log has room, so that the server lives and refuses."""
    assert scene.place.disk is not None
    for _ in range(max(1, scene.rounds - 1)):
        with scene.injection("no room for data"):
            scene.place.disk.fill()
            scene.pause(FULL_SECONDS)
            scene.place.disk.free()
        scene.pause(scene.calm)


def wal(scene: Scene) -> None:
    """No room for the log: the server panics, and comes back once there is room."""
    assert scene.place.disk is not None
    with scene.injection("no room for the log"):
        scene.place.disk.fill()
        scene.place.use_up_log()
        scene.pause(FULL_SECONDS)
        scene.place.disk.free()
        scene.place.revive()
    scene.pause(scene.calm)


def find_faketime(given: Path | None) -> Path:
    """The library that moves the clock of a process. Raises NotHere."""
    found = [str(given)] if given is not None else sorted(glob("/usr/lib/*/faketime/libfaketimeMT.so.1"))
    if not found or not os.access(found[0], os.R_OK):
        raise NotHere("there is no libfaketimeMT.so.1: apt-get install libfaketime, or name it with --faketime")
    return Path(found[0]).resolve()


FAULTS: Mapping[str, Fault] = {
    "kill": Fault(kill, "SIGKILL of workers"),
    "stop": Fault(stop, "SIGSTOP and SIGCONT of workers"),
    "restart": Fault(restart, "immediate restarts of PostgreSQL"),
    "backends": Fault(backends, "killed backends"),
    "connections": Fault(connections, "exhausted connections"),
    "blackhole": Fault(blackhole, "black-holed sockets", proxied=True),
    "clock": Fault(clock, "the clock of a worker moved", clocked=True),
    "snapshot": Fault(snapshot, "a held snapshot"),
    "disk": Fault(disk, "disk full: data", small="data"),
    "wal": Fault(wal, "disk full: the server's log", small="wal"),
}
