"""Jobs from the command line: the real program, a real database; the worker's side is played by the SQL functions."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.support.command import REPOSITORY, command_line, environment, run, start
from tests.support.server import rows, value
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]


def claim(connection: Connection, queue: str = "q") -> UUID:
    """Claim one job as a worker would and return its claim token."""
    token = value(connection, "select claim_token from jobqueue.claim(array[%s], %s, 1)", (queue, uuid4()))
    assert isinstance(token, UUID)
    return token


def sent(connection: Connection, options: str = "{}") -> UUID:
    """Send a job and return its id."""
    job_id = value(connection, "select id from jobqueue.send('q', '{}', %s::text::jsonb)", (options,))
    assert isinstance(job_id, UUID)
    return job_id


def status_of(connection: Connection, job_id: UUID) -> str:
    return str(value(connection, "select status from jobqueue.jobs where id = %s", (job_id,)))


def failed(connection: Connection) -> UUID:
    job_id = sent(connection)
    connection.execute('select jobqueue.fail(%s, %s, \'{"class": "permanent"}\')', (job_id, claim(connection)))
    return job_id


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def is_watched(connection: Connection, job_id: UUID) -> bool:
    return bool(rows(connection, "select from jobqueue.watch where topic = 'job:' || %s::text", (job_id,)))


def test_send_prints_the_id_and_stores_what_was_given(dsn: str, connection: Connection) -> None:
    done = run(
        "send", "q", '{"n": 12345678901234567890, "é": [1.10]}',
        "--job-type", "t", "--delay", "1h 30m", "--priority", "-3",
        "--option", "subject=007", "--option", "max_retries=1", "--option", "timeout=2 min",
        "--option", 'metadata={"a": 1}', dsn=dsn,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rows(
        connection,
        "select id, payload::text, job_type, priority, subject, max_retries, metadata,"
        " extract(epoch from run_at - created_at)::int from jobqueue.jobs",
    )
    payload = '{"n": 12345678901234567890, "é": [1.10]}'
    assert found == [(UUID(done.stdout.strip()), payload, "t", -3, "007", 1, {"a": 1}, 5400)]


def test_send_reads_stdin_and_says_whose_place_was_taken(dsn: str, connection: Connection) -> None:
    arguments = ("send", "q", "-", "--option", "id=00000000-0000-0000-0000-000000000007", "-o", "json")
    first = run(*arguments, dsn=dsn, stdin='{"from": "stdin"}')
    second = run(*arguments, dsn=dsn, stdin="{}")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert json.loads(first.stdout)["created"] is True
    assert json.loads(second.stdout) == {"id": str(UUID(int=7)), "created": False, "reason": "duplicate_id"}
    assert "duplicate_id" in second.stderr
    assert rows(connection, "select payload from jobqueue.jobs") == [({"from": "stdin"},)]


def test_an_unknown_option_of_send_is_2_with_the_known_ones(dsn: str) -> None:
    done = run("send", "q", "--option", "priorty=1", dsn=dsn)
    assert (done.returncode, done.stdout) == (2, "")
    assert '"priority"' in done.stderr


def test_list_filters_and_prints_each_format(dsn: str, connection: Connection) -> None:
    ids = [sent(connection, json.dumps({"subject": f"s:{n}"})) for n in range(3)]
    connection.execute("select jobqueue.cancel(%s, 'not needed')", (ids[0],))
    lines = run("jobs", "list", "--status", "pending", "--limit", 1, "-o", "jsonl", dsn=dsn).stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [str(ids[2])]
    array = json.loads(run("jobs", "list", "--subject", "s:0", "-o", "json", dsn=dsn).stdout)
    assert [(job["id"], job["status"]) for job in array] == [(str(ids[0]), "cancelled")]
    table = run("jobs", "list", dsn=dsn).stdout.splitlines()
    assert table[0].split()[:4] == ["id", "queue", "job_type", "status"]
    assert [line.split()[0] for line in table[1:]] == [str(job_id) for job_id in reversed(ids)]


def test_get_prints_one_job(dsn: str, connection: Connection) -> None:
    job_id = sent(connection, '{"subject": "document:42"}')
    job = json.loads(run("jobs", "get", job_id, "-o", "json", dsn=dsn).stdout)
    assert (job["id"], job["status"], job["subject"], job["result"]) == (str(job_id), "pending", "document:42", None)
    assert ["subject", "document:42"] in [
        line.split() for line in run("jobs", "get", job_id, dsn=dsn).stdout.splitlines()
    ]


@pytest.mark.parametrize("verb", ["get", "wait", "watch"])
@pytest.mark.parametrize("job_id", [uuid4(), "no-uuid"])
def test_a_missing_or_malformed_id_is_3(dsn: str, verb: str, job_id: object) -> None:
    done = run("jobs", verb, job_id, dsn=dsn)
    assert (done.returncode, done.stdout) == (3, "")
    assert "There is no job" in done.stderr


@pytest.mark.parametrize(
    ("before", "arguments", "status"),
    [
        (sent, ("cancel",), "cancelled"),
        (sent, ("pause",), "paused"),
        (sent, ("prioritize", "5"), "pending"),
        (failed, ("retry",), "pending"),
        (failed, ("retry", "--from-start"), "pending"),
        (failed, ("skip",), "skipped"),
    ],
)
def test_an_action_changes_the_job_and_the_audit_names_who_and_why(
    dsn: str, connection: Connection, before: Any, arguments: tuple[str, ...], status: str
) -> None:
    job_id = before(connection)
    action, *rest = arguments
    done = run("jobs", action, job_id, *rest, "--reason", "asked by Ada", dsn=dsn, LOGNAME="ada")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [str(job_id), status]
    assert status_of(connection, job_id) == status
    audit = rows(connection, "select action, reason, actor from jobqueue.actions_taken where job_id = %s", (job_id,))
    name = "restart" if rest == ["--from-start"] else action
    assert audit == [(name, "asked by Ada", "ada")]


def test_run_now_resume_and_delete(dsn: str, connection: Connection) -> None:
    later = sent(connection, '{"delay": 3600}')
    assert run("jobs", "run-now", later, "-r", "now", dsn=dsn).returncode == 0
    assert value(connection, "select run_at <= now() from jobqueue.jobs where id = %s", (later,))
    paused = sent(connection)
    connection.execute("select jobqueue.pause(%s, 'lunch')", (paused,))
    assert run("jobs", "resume", paused, "-r", "back", dsn=dsn).stdout.split()[-1] == "pending"
    connection.execute("select jobqueue.cancel(%s, 'not needed')", (paused,))
    assert run("jobs", "delete", paused, "-r", "tidy", dsn=dsn).stdout.split()[-1] == "cancelled"
    assert rows(connection, "select from jobqueue.jobs where id = %s", (paused,)) == []


def test_a_running_job_is_asked_and_with_force_stopped(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    claim(connection)
    assert run("jobs", "cancel", job_id, "-r", "stop", dsn=dsn).stdout.split()[-1] == "processing"
    assert value(connection, "select requested_action from jobqueue.jobs where id = %s", (job_id,)) == "cancel"
    assert run("jobs", "cancel", job_id, "-r", "stop", "--force", dsn=dsn).stdout.split()[-1] == "cancelled"


def test_an_illegal_transition_is_4_and_says_what_is_allowed(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    done = run("jobs", "skip", job_id, "--reason", "no", dsn=dsn)
    assert (done.returncode, done.stdout) == (4, "")
    assert "Allowed now: cancel, pause, prioritize" in done.stderr
    assert status_of(connection, job_id) == "pending"


def test_a_blank_reason_is_refused(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    assert run("jobs", "cancel", job_id, "--reason", "  ", dsn=dsn).returncode == 2
    assert status_of(connection, job_id) == "pending"


def test_on_a_terminal_the_reason_is_asked_for(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"typed by hand\n")
        done = subprocess.run(
            command_line("jobs", "cancel", job_id),
            cwd=REPOSITORY,
            env=environment(dsn),
            stdin=theirs,
            stderr=theirs,
            stdout=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0
    assert rows(connection, "select reason from jobqueue.actions_taken") == [("typed by hand",)]


@pytest.mark.parametrize(
    ("settle", "code", "status"),
    [
        ("select jobqueue.complete(%s, %s, '{\"pages\": 3}')", 0, "completed"),
        ('select jobqueue.fail(%s, %s, \'{"class": "permanent", "message": "disk full"}\')', 1, "failed"),
        ("select jobqueue.cancel(%s, %s::text, true)", 1, "cancelled"),
    ],
)
def test_wait_returns_at_the_end_with_its_exit_code(
    dsn: str, connection: Connection, settle: str, code: int, status: str
) -> None:
    job_id = sent(connection)
    token = claim(connection)
    waiting = start("jobs", "wait", job_id, "-o", "json", dsn=dsn)
    wait_until(lambda: is_watched(connection, job_id), what="the command listens")
    assert waiting.poll() is None
    connection.execute(settle.encode(), (job_id, token))
    returned, out, err = finished(waiting)
    assert (returned, json.loads(out)["status"], err) == (code, status, "")


def test_wait_gives_up_with_5_and_leaves_the_job_alone(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    done = run("jobs", "wait", job_id, "--timeout", "0.1", dsn=dsn)
    assert (done.returncode, done.stdout) == (5, "")
    assert "still pending" in done.stderr
    assert status_of(connection, job_id) == "pending"


def test_watch_shows_every_stage_and_the_end(dsn: str, connection: Connection) -> None:
    job_id = sent(connection, '{"stages": ["scan", "store"], "display_name": "Indexing: ."}')
    token = claim(connection)
    watching = start("jobs", "watch", job_id, "-o", "jsonl", dsn=dsn)
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    connection.execute("select jobqueue.stage(%s, %s, 'scan', 'in_progress')", (job_id, token))
    second = json.loads(watching.stdout.readline())
    connection.execute("select jobqueue.progress(%s, %s, 40, '4 of 10')", (job_id, token))
    third = json.loads(watching.stdout.readline())
    connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))
    code, rest, _ = finished(watching)
    assert (first["status"], second["current_stage"], third["progress_pct"]) == ("processing", "scan", 40)
    assert third["progress_message"] == "4 of 10"
    assert [json.loads(line)["status"] for line in rest.splitlines()][-1:] == ["completed"]
    assert code == 0


def test_waiting_survives_a_lost_connection(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    token = claim(connection)
    waiting = start("jobs", "wait", job_id, dsn=dsn)
    wait_until(lambda: is_watched(connection, job_id), what="the command listens")
    killed = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'jobqueue cli'"
    wait_until(lambda: rows(connection, killed), what="its connection is there")
    connection.execute("select jobqueue.complete(%s, %s)", (job_id, token))
    code, out, err = finished(waiting)
    assert (code, out.split()[-4:-3]) == (0, ["completed"])
    assert "opening it again" in err


def test_ctrl_c_ends_a_wait(dsn: str, connection: Connection) -> None:
    job_id = sent(connection)
    waiting = start("jobs", "wait", job_id, dsn=dsn)
    wait_until(lambda: is_watched(connection, job_id), what="the command listens")
    waiting.send_signal(signal.SIGINT)
    code, out, err = finished(waiting)
    assert (code, out) == (1, "")
    assert "Traceback" not in err


def test_send_and_wait_in_one_command(dsn: str, connection: Connection) -> None:
    sending = start("send", "q", "--wait", dsn=dsn)
    wait_until(lambda: rows(connection, "select from jobqueue.jobs"), what="the job is sent")
    token = claim(connection)
    ((job_id,),) = rows(connection, "select id from jobqueue.jobs")
    connection.execute("select jobqueue.complete(%s, %s, '42')", (job_id, token))
    code, out, err = finished(sending)
    assert (code, out.splitlines()[-1].split()[:3]) == (0, [str(job_id), "completed", "42"])
    assert "completed" in err


def test_workers_are_listed_and_drained(dsn: str, connection: Connection) -> None:
    worker = uuid4()
    connection.execute('select jobqueue.register_worker(%s, \'{"name": "press", "queues": ["q"]}\')', (worker,))
    (listed,) = json.loads(run("workers", "list", "-o", "json", dsn=dsn).stdout)
    assert (listed["id"], listed["name"], listed["state"]) == (str(worker), "press", "working")
    assert run("workers", "drain", worker, "-r", "new machine", dsn=dsn).returncode == 0
    assert rows(connection, "select id, command from jobqueue.heartbeat(%s)", (worker,)) == [(None, "drain")]
    connection.execute("select jobqueue.stop_worker(%s)", (worker,))
    assert json.loads(run("workers", "list", "-o", "json", dsn=dsn).stdout) == []
    assert len(json.loads(run("workers", "list", "--all", "-o", "json", dsn=dsn).stdout)) == 1
    assert run("workers", "drain", uuid4(), "-r", "x", dsn=dsn).returncode == 3


def test_queues_are_listed(dsn: str, connection: Connection) -> None:
    sent(connection)
    (queue,) = json.loads(run("queues", "list", "-o", "json", dsn=dsn).stdout)
    assert (queue["name"], queue["policy"], queue["timeout"]) == ("q", "standard", 900.0)
