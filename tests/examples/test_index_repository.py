"""The job `index_repository` as a user meets it: real repositories, real workers, one of them killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from examples.index_repository.app import app
from jobqueue import App, JobRecord
from tests.examples.repository import FILES, MAX_FILE_BYTES, MODULES, commit, git, make_repository, write
from tests.examples.support import worker
from tests.support.server import rows, value
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
FILES_IN_ALL = MODULES + len(FILES) + 2
SKIPPED = 3
REPEATED_AT_MOST = 10
"""Finished files are saved every 10 files or 2 seconds, so at most so many are done again."""

CONNECTIONS = "select count(*) from pg_stat_activity where application_name = 'code_index'"
"""Of jobs that run, to the index."""

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    make_repository(folder)
    return folder


@pytest.fixture
def sender(dsn: str) -> Iterator[App]:
    """The example's handlers on the test's database."""
    sending = App(dsn)
    sending.registry = app.registry
    yield sending
    sending.close_sync()


def send(sender: App, path: Path | str, **payload: Any) -> UUID:
    given = {"path": str(path), "max_file_bytes": MAX_FILE_BYTES, **payload}
    sent = sender.send_sync("index_repository", given)
    assert sent.id is not None
    return sent.id


def finished(sender: App, job: UUID, dsn: str, log: Path, **environment: str) -> JobRecord:
    """Run a worker until the job has ended."""
    with worker("index_repository", dsn, log, **environment) as process:
        wait_until(
            lambda: process.exitcode is not None or sender.get_sync(job).done, what="the job has ended", timeout=60
        )
    record = sender.get_sync(job)
    assert record.done, log.read_text()
    return record


def completed(sender: App, job: UUID, dsn: str, log: Path, **environment: str) -> JobRecord:
    record = finished(sender, job, dsn, log, **environment)
    assert record.status == "completed", (record.error_message, log.read_text())
    return record


def index(connection: Connection) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """All that a reader of the index sees."""
    files = (
        "select location, commit_sha, path, blob, bytes, language, lines, skipped, problem from code_index.current_file"
    )
    symbols = "select location, path, kind, name, qualified_name, first_line, last_line from code_index.current_symbol"
    return sorted(rows(connection, files), key=repr), sorted(rows(connection, symbols), key=repr)


def lose_lease(connection: Connection, job: UUID) -> None:
    """As if the half minute of the dead worker's lease were over."""
    connection.execute("update jobqueue.job set lease_until = now() - interval '1 s' where id = %s", (job,))
    connection.execute("update jobqueue.claim_batch set check_at = now() - interval '1 s'")
    connection.execute("update jobqueue.maintenance set next_at = now()")


def record_percentages(connection: Connection) -> None:
    """Write down every percentage that is ever stored, not only those that a poller happens to see."""
    connection.execute("""
        create table percentages (n serial, job_id uuid, pct int);
        create function note_percentage() returns trigger language plpgsql security definer as $$
            begin insert into public.percentages (job_id, pct) values (new.id, new.progress_pct); return null; end $$;
        create trigger note_percentage after update on jobqueue.job for each row execute function note_percentage();
    """)


def test_a_repository_is_indexed_and_the_result_says_what_was_found(
    dsn: str, connection: Connection, sender: App, repository: Path, tmp_path: Path
) -> None:
    job = send(sender, repository)
    record = completed(sender, job, dsn, tmp_path / "log")

    symbols = value(connection, "select count(*) from code_index.current_symbol")
    expected = {
        "files_indexed": FILES_IN_ALL - SKIPPED,
        "files_skipped": SKIPPED,
        "symbols_extracted": symbols,
        "commit_sha": git(repository, "rev-parse", "HEAD"),
    }
    assert record.result == expected
    assert record.stats == expected
    assert (record.progress_pct, record.completed_stages, record.total_stages) == (100, 4, 4)
    assert record.display_name == f"Indexing: {repository}"

    files = {
        row[0]: row[1:]
        for row in rows(connection, "select path, language, lines, skipped from code_index.current_file")
    }
    assert len(files) == FILES_IN_ALL
    assert files["logo.png"] == (None, None, "binary")
    assert files["huge.csv"] == (None, None, "too large")
    assert files["link"] == (None, None, "symbolic link")
    assert files["bin/tool"] == ("shell", 4, None)
    assert files["README.md"] == ("markdown", 1, None)
    assert files["grüße/日本語.py"] == ("python", 1, None)
    assert files["caf\\xe9.py"] == ("python", 1, None)
    assert files['with "quotes"\tand\nlines.py'] == ("python", 1, None)
    problems = dict(rows(connection, "select path, problem from code_index.current_file where problem is not null"))
    assert problems == {
        "broken.py": "not valid python: line 1: invalid syntax",
        "broken.js": "not valid javascript: line 3",
    }
    found = (
        "select kind, qualified_name, first_line, last_line from code_index.current_symbol where path = %s order by 3"
    )
    assert rows(connection, found, ("package/module_007.py",)) == [
        ("constant", "LIMIT", 3, 3),
        ("class", "Letter", 6, 15),
        ("method", "Letter.text", 9, 11),
        ("method", "Letter.send", 13, 15),
        ("function", "Letter.send.inner", 14, 15),
        ("function", "main", 18, 19),
    ]
    assert rows(connection, found, ("web/app.js",)) == [
        ("constant", "MAX_SIZE", 1, 1),
        ("class", "Page", 2, 6),
        ("method", "Page.open", 3, 5),
    ]


def test_a_second_run_on_the_same_commit_changes_nothing(
    dsn: str, connection: Connection, sender: App, repository: Path, tmp_path: Path
) -> None:
    first = completed(sender, send(sender, repository), dsn, tmp_path / "log")
    before = index(connection)
    second = completed(sender, send(sender, repository), dsn, tmp_path / "log")
    assert second.result == first.result
    assert index(connection) == before
    assert value(connection, "select count(*) from code_index.file") == FILES_IN_ALL
    assert value(connection, "select count(*) from code_index.repository") == 1


def test_a_job_whose_worker_was_killed_goes_on_where_it_was(
    dsn: str, connection: Connection, sender: App, repository: Path, tmp_path: Path
) -> None:
    undisturbed = completed(sender, send(sender, repository), dsn, tmp_path / "log")
    expected = index(connection)
    stop_at = 45
    record_percentages(connection)

    job = send(sender, repository)
    with psycopg.connect(dsn) as obstacle, worker("index_repository", dsn, tmp_path / "killed") as victim:
        # A row that is not committed yet: whoever writes the same file waits for it.
        obstacle.execute(
            "insert into code_index.file (job_id, position, repository_id, path, blob, bytes) "
            "select %s, %s, id, '', '', 0 from code_index.repository",
            (job, stop_at),
        )
        stuck = f"{CONNECTIONS} and wait_event_type = 'Lock'"
        wait_until(lambda: value(connection, stuck) == 1, what=f"file {stop_at} is being written", timeout=60)
        shown = f"Indexing file {stop_at}/{FILES_IN_ALL}"
        wait_until(lambda: sender.get_sync(job).progress_message == shown, what="people see how far it is")
        victim.kill()
        victim.join()
        obstacle.rollback()
    wait_until(lambda: value(connection, CONNECTIONS) == 0, what="the dead worker's connection is gone")
    finished_before = {
        row[0] for row in rows(connection, "select position from code_index.file where job_id = %s", (job,))
    }
    assert set(range(1, stop_at)) <= finished_before <= set(range(1, stop_at + 1))

    # The branch goes on meanwhile; the job stays with the commit that it began with.
    write(repository, "package/module_000.py", b"CHANGED = 1\n")
    write(repository, "new.py", b"NEW = 1\n")
    commit(repository)
    lose_lease(connection, job)
    record = completed(sender, job, dsn, tmp_path / "log")

    assert record.result == undisturbed.result
    assert index(connection) == expected
    assert (record.attempt, record.retry_count) == (2, 1)
    writes = dict(rows(connection, "select position, writes from code_index.file where job_id = %s", (job,)))
    repeated = [position for position, count in writes.items() if count > 1]
    assert set(repeated) <= finished_before
    assert len(repeated) <= REPEATED_AT_MOST
    assert max(writes.values()) <= 2
    seen = [row[0] for row in rows(connection, "select pct from percentages where job_id = %s order by n", (job,))]
    assert seen == sorted(seen)
    assert seen[-1] == 100


@contextlib.contextmanager
def stuck_in_the_first_file(sender: App, job: UUID, dsn: str, folder: Path) -> Iterator[Path]:
    """A worker whose handler waits for git to read the first file; creating the yielded path lets it go on."""
    gate, slow = folder / "gate", folder / "slow"
    slow.mkdir()
    (slow / "git").write_text(
        "#!/bin/sh\n"
        f'case "$*" in *cat-file*) while [ ! -e "{gate}" ]; do sleep 0.02; done ;; esac\n'
        f'exec "{shutil.which("git")}" "$@"\n'
    )
    (slow / "git").chmod(0o755)
    with worker("index_repository", dsn, folder / "log", PATH=f"{slow}:{os.environ['PATH']}"):
        # Only the event loop can send this, and the handler's thread is waiting for git.
        shown = f"Indexing file 1/{FILES_IN_ALL}"
        wait_until(
            lambda: sender.get_sync(job).progress_message == shown, what="progress of the first file", timeout=60
        )
        yield gate


def test_the_event_loop_goes_on_while_a_file_is_being_read(
    dsn: str, sender: App, repository: Path, tmp_path: Path
) -> None:
    job = send(sender, repository)
    with stuck_in_the_first_file(sender, job, dsn, tmp_path) as gate:
        gate.touch()
        wait_until(lambda: sender.get_sync(job).done, what="the job has ended", timeout=60)
    assert sender.get_sync(job).status == "completed"


def test_a_paused_job_is_resumed_without_doing_a_file_twice(
    dsn: str, connection: Connection, sender: App, repository: Path, tmp_path: Path
) -> None:
    job = send(sender, repository)
    with stuck_in_the_first_file(sender, job, dsn, tmp_path) as gate:
        sender.act_sync("pause", job, "make room")
        gate.touch()
        wait_until(lambda: sender.get_sync(job).status != "processing", what="the job has stopped", timeout=60)
    paused = sender.get_sync(job)
    assert (paused.status, paused.pause_reason) == ("paused", "make room")

    sender.act_sync("resume", job, "room again")
    record = completed(sender, job, dsn, tmp_path / "log")
    assert record.resume_count == 1
    assert rows(connection, "select count(*), max(writes) from code_index.current_file") == [(FILES_IN_ALL, 1)]


def test_a_plain_folder_is_refused_at_once_and_clearly(dsn: str, sender: App, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    record = finished(sender, send(sender, folder), dsn, tmp_path / "log")
    assert (record.status, record.error_class, record.attempt) == ("failed", "invalid", 1)
    assert record.error_message is not None
    assert f"{folder} is a plain folder, not a git repository" in record.error_message


def test_a_url_is_cloned_and_the_copy_removed(
    dsn: str, connection: Connection, sender: App, repository: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    git(repository, "tag", "v1")
    write(repository, "later.py", b"LATER = 1\n")
    commit(repository)
    url = f"file://{repository}"
    record = completed(sender, send(sender, url, ref="v1"), dsn, tmp_path / "log", TMPDIR=str(scratch))
    assert record.result is not None
    assert record.result["commit_sha"] == git(repository, "rev-parse", "v1")
    assert record.result["files_indexed"] == FILES_IN_ALL - SKIPPED
    assert value(connection, "select location from code_index.repository") == url
    assert list(scratch.iterdir()) == []


def test_the_checkout_may_belong_to_somebody_else(dsn: str, sender: App, repository: Path, tmp_path: Path) -> None:
    if os.getuid() == 0:
        for path in [repository, *repository.rglob("*")]:
            os.chown(path, 65534, 65534, follow_symlinks=False)
    record = completed(sender, send(sender, repository), dsn, tmp_path / "log", GIT_CONFIG_GLOBAL=os.devnull)
    assert record.result is not None
    assert record.result["files_indexed"] == FILES_IN_ALL - SKIPPED


def test_the_command_sends_the_job_and_shows_its_progress(dsn: str, sender: App, repository: Path) -> None:
    command = [sys.executable, "-m", "examples.index_repository", str(repository)]
    settings = {**os.environ, "JOBQUEUE_DSN": dsn}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = sender_records(sender)
    found = record.result or {}
    assert f"at commit {found['commit_sha']}" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("100 %")

    missing = subprocess.run([*command[:-1], tempfile.gettempdir() + "/no-such-folder"], cwd=ROOT, env=settings,
                             capture_output=True, text=True, timeout=120)  # fmt: skip
    assert missing.returncode == 1
    assert "is not a folder on this machine" in missing.stderr


def sender_records(sender: App) -> list[JobRecord]:
    with psycopg.connect(sender.resolve_dsn(), autocommit=True) as connection:
        return [sender.get_sync(row[0]) for row in rows(connection, "select id from jobqueue.jobs")]
