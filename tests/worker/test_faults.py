"""Real faults: workers are killed, Postgres is restarted under load. No job may be lost, none may be settled twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.ephemeral import make_ephemeral_home
from jobqueue.database.migrations import migrate_up
from tests.support.server import chosen_binaries

JOBS = 10_000
ROOT = Path(__file__).parents[2]

APP = """
import asyncio
from jobqueue import App

app = App()

@app.job("work")
async def work():
    await asyncio.sleep(0.002)
"""

RECORD_SETTLEMENTS = """
create table public.settled (job_id uuid, status text);
create function public.note_settled() returns trigger language plpgsql as $$
begin
    insert into public.settled values (new.id, new.status);
    return null;
end $$;
create trigger note_settled after update of status on jobqueue.job for each row
    when (old.status is distinct from new.status and new.status in ('completed', 'failed', 'cancelled'))
    execute function public.note_settled();
"""


class Database:
    """The server of this test: it is shot and started again."""

    def __init__(self) -> None:
        # Durable: what a crash may not take is the question here.
        durable = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
        self.server = EmbeddedServer(make_ephemeral_home(), ephemeral=True, bin_dir=chosen_binaries(), settings=durable)
        self.dsn = self.server.start()

    def query(self, text: str, *parameters: Any) -> Any:
        """The first value of the first row; tries again while the server is away."""
        deadline = time.monotonic() + 120
        while True:
            try:
                with psycopg.connect(self.dsn, autocommit=True) as connection:
                    row = connection.execute(text.encode(), parameters).fetchone()
                    return None if row is None else row[0]
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server did not come back"
                time.sleep(0.05)

    def crash_and_restart(self) -> None:
        """An immediate shutdown, as after a power cut of the processes, and a start with recovery."""
        pid = self.server.status().pid
        assert pid is not None
        subprocess.run(["kill", "-QUIT", str(pid)], check=True)
        deadline = time.monotonic() + 60
        while self.server.status().running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.dsn = self.server.start()


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database()
    migrate_up(database.dsn)
    yield database
    database.server.stop()


@pytest.fixture
def start_worker(tmp_path: Path, database: Database) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    (tmp_path / "fault_app.py").write_text(APP)
    workers: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        log = (tmp_path / f"worker-{len(workers)}.log").open("wb")
        worker = subprocess.Popen(
            [sys.executable, "-m", "jobqueue", "worker", "fault_app:app", "--concurrency", "50"],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": f"{tmp_path}:{ROOT}",
                "JOBQUEUE_DSN": database.dsn,
                "HOME": str(tmp_path),
            },
            stderr=log,
            stdout=log,
        )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def completed(database: Database) -> int:
    return int(database.query("select count(*) from public.settled where status = 'completed'"))


def wait_for(database: Database, count: int, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while completed(database) < count:
        assert time.monotonic() < deadline, database.query(
            "select string_agg(s, '; ') from (select status || ' ' || count(*) || ' ' || coalesce(min(lease_until)::text, '')"
            " || ' now ' || now()::text as s from jobqueue.job group by status) x"
        )
        time.sleep(0.1)


@pytest.mark.slow
def test_ten_thousand_jobs_survive_a_killed_worker_and_two_crashes_of_postgres(
    database: Database, start_worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(RECORD_SETTLEMENTS.encode())
        connection.execute("select 1 from jobqueue.send('work')")
        connection.execute("update jobqueue.queue set lease = '10 s'")
        connection.execute(
            "select count(*) from jobqueue.send_many('work', (select jsonb_agg('{}'::jsonb) from generate_series(2, %s)))",
            (JOBS,),
        )
    first = start_worker()
    wait_for(database, 1000)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start_worker()
    wait_for(database, 3000)
    database.crash_and_restart()
    wait_for(database, 6000)
    database.crash_and_restart()
    wait_for(database, JOBS)

    assert second.poll() is None, "a worker must outlive the restarts of Postgres"
    assert database.query("select count(*) from jobqueue.job where status = 'completed'") == JOBS
    assert database.query("select count(*) from jobqueue.job where status <> 'completed'") == 0
    assert database.query("select count(*) from public.settled") == JOBS
    assert database.query("select count(distinct job_id) from public.settled") == JOBS
