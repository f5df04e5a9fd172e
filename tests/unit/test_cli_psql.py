"""`jobqueue psql`: the shell on the right database, the password on no command line."""

from __future__ import annotations

import os
from pathlib import Path

from psycopg.conninfo import make_conninfo

from tests.support.command import run_process


def test_psql_opens_on_the_database_in_use(dsn: str) -> None:
    done = run_process(
        "psql", "-Atc", "select current_setting('application_name'), count(*) from jobqueue.jobs", dsn=dsn
    )
    assert (done.returncode, done.stdout) == (0, "jobqueue psql|0\n"), done.stderr


def test_its_exit_code_is_psqls_own(dsn: str) -> None:
    assert run_process("psql", "-c", "select nonsense", dsn=dsn).returncode == 1


def test_the_password_travels_in_the_environment(dsn: str, tmp_path: Path) -> None:
    for name in ("psql", "postgres", "initdb"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "postgres (PostgreSQL) 18.0" && exit\n'
                           'echo "$PGPASSWORD"; echo "$@"\n')  # fmt: skip
        program.chmod(0o755)
    with_password = make_conninfo(dsn, password="top secret")
    done = run_process("psql", dsn=with_password, JOBQUEUE_PG_BIN=str(tmp_path), PATH=os.environ["PATH"])
    password, arguments = done.stdout.splitlines()
    assert password == "top secret"
    assert "secret" not in arguments
