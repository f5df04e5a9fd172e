"""`jobqueue up`: database, schema, API and worker in one command, and nothing left of them after ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from jobqueue.database.ephemeral import make_ephemeral_home
from tests.support.command import REPOSITORY, command_line, environment, run
from tests.support.waiting import wait_until

APPLICATION = """
from jobqueue import App, Job

app = App()


@app.job("double")
async def double(job: Job, payload: dict) -> dict:
    await job.progress(1, 1, "doubling")
    return {"result": 2 * payload["number"]}
"""


class Up:
    """A running `jobqueue up`; what it says is collected, so that it never waits for a reader."""

    def __init__(self, *arguments: str, directory: Path, variables: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command_line("up", *arguments),
            cwd=directory,
            env=environment(PYTHONPATH=str(REPOSITORY), **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def said(self) -> str:
        """All of stderr until now."""
        return "".join(self.lines)

    def wait_until_up(self) -> str:
        """Return the API's address once everything has been started."""
        wait_until(lambda: "ctrl-C stops" in self.said or self.process.poll() is not None, what="up", timeout=180)
        match = re.search(r"API: (http://\S+)/openapi.json", self.said)
        assert match is not None, self.said
        assert f"dashboard: {match[1]}/ui/" in self.said
        return match[1]

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if any, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def up(*arguments: str, directory: Path, **variables: str) -> Iterator[Up]:
    """`jobqueue up` in a directory that holds the application `double_app`."""
    (directory / "double_app.py").write_text(APPLICATION)
    running = Up(*arguments, directory=directory, variables=variables)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGTERM)


def children_of(pid: int) -> list[int]:
    """The processes that it started, as Linux knows them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_up_migrates_runs_a_job_and_leaves_nothing_behind(empty_dsn: str, tmp_path: Path) -> None:
    with up("--port", "0", directory=tmp_path, JOBQUEUE_DSN=empty_dsn, JOBQUEUE_APP="double_app") as running:
        address = running.wait_until_up()
        sent = run("send", "double", '{"number": 21}', "--wait", "--timeout", "60", "-o", "json", dsn=empty_dsn)
        job = json.loads(sent.stdout)
        assert (sent.returncode, job["result"]) == (0, {"result": 42}), sent.stderr + running.said
        with urllib.request.urlopen(f"{address}/jobs/{job['id']}", timeout=60) as answer:
            assert json.load(answer)["status"] == "completed"
        children = children_of(running.process.pid)
        assert len(children) == 2
        assert running.end(signal.SIGINT) == 0, running.said
    assert running.said.endswith("stopped\n")
    assert not any(map(lives, children))
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select state from jobqueue.workers").fetchall() == [("stopped",)]


def test_without_a_dsn_the_embedded_server_comes_and_goes_with_it(tmp_path: Path) -> None:
    home = make_ephemeral_home()
    with up("--port", "0", directory=tmp_path, JOBQUEUE_DATA_DIR=str(home)) as running:
        running.wait_until_up()
        assert "no worker: name an application" in running.said
        assert run("server", "dsn", JOBQUEUE_DATA_DIR=str(home)).returncode == 0
        assert running.end(signal.SIGTERM) == 0, running.said
    assert run("server", "dsn", JOBQUEUE_DATA_DIR=str(home)).returncode == 69


def test_a_busy_port_is_said_and_another_one_taken(dsn: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up("--port", str(port), directory=tmp_path, JOBQUEUE_DSN=dsn) as running:
            address = running.wait_until_up()
            assert f"port {port} of 127.0.0.1 is busy" in running.said
            assert not address.endswith(f":{port}")
            with urllib.request.urlopen(f"{address}/livez", timeout=60) as answer:
                assert answer.status == 200


def test_a_worker_that_cannot_start_ends_it_all(dsn: str, tmp_path: Path) -> None:
    with up("--port", "0", "--app", "no_such_app", directory=tmp_path, JOBQUEUE_DSN=dsn) as running:
        assert running.end() == 1
    assert "the worker ended with exit code 78" in running.said
    assert "no_such_app" in running.said


def test_killed_it_takes_its_processes_along(dsn: str, tmp_path: Path) -> None:
    with up("--port", "0", "--app", "double_app", directory=tmp_path, JOBQUEUE_DSN=dsn) as running:
        running.wait_until_up()
        children = children_of(running.process.pid)
        assert len(children) == 2
        running.end(signal.SIGKILL)
        wait_until(lambda: not any(map(lives, children)), what="API and worker end")
