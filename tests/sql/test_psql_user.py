"""A person with psql and nothing but the functions: send, claim, complete, see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from jobqueue.cli.psql import find_psql

PERSON = "jobqueue_test_person"
WORKER = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def person(connection: psycopg.Connection[tuple[object, ...]], dsn: str) -> Iterator[str]:
    """The conninfo of a login with the roles of a producer, a worker and of support that only reads."""
    connection.execute(f"drop role if exists {PERSON}")
    connection.execute(
        f"create role {PERSON} login in role jobqueue_producer, jobqueue_worker, jobqueue_support_readonly"
    )
    yield make_conninfo(dsn, user=PERSON)
    connection.execute(f"drop role {PERSON}")


def psql(conninfo: str, text: str) -> str:
    """Run psql, stop at the first error, and return what it printed."""
    program = find_psql()
    settings = {k: v for k, v in conninfo_to_dict(conninfo).items() if v is not None}
    done = subprocess.run(
        [program, "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", make_conninfo(**settings)],
        input=text, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_psql_user_sends_claims_completes_and_sees_a_job(person: str) -> None:
    output = psql(
        person,
        f"""
        select created from jobqueue.send('letters', '{{"to": "Ada"}}');
        select id, claim_token, payload->>'to' as addressee from jobqueue.claim(array['letters'], '{WORKER}', 1) \\gset
        \\echo :addressee
        select jobqueue.progress(:'id', :'claim_token', 50, 'half');
        select jobqueue.complete(:'id', :'claim_token', '{{"sent": true}}');
        select status, progress_pct, result->>'sent' from jobqueue.jobs where id = :'id';
        """,
    )
    assert output.split() == ["t", "Ada", "ok", "completed|100|true"]


def test_a_psql_user_cannot_touch_the_tables(person: str) -> None:
    with pytest.raises(AssertionError, match="permission denied"):
        psql(person, "update jobqueue.job set priority = 1;")
