"""A Node program sends and works through the SQL functions alone, with npm's `pg`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.application import Connection, rows

NODE = Path(__file__).parents[2] / "clients" / "node"

# CI fails for skipped tests, so there both must be installed (.ci/run).
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules" / "pg").is_dir(),
    reason="needs node, and `npm ci` in clients/node",
)


def run_example(dsn: str, **environment: str) -> dict[str, Any]:
    given = conninfo_to_dict(dsn)
    place = {f"PG{name.upper()}": str(given[name]) for name in ("host", "port", "user")}
    command = ["node", str(NODE / "example.mjs")]
    env = {**os.environ, **place, "PGDATABASE": str(given["dbname"]), **environment}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    printed: dict[str, Any] = json.loads(ran.stdout)
    return printed


def test_node_sends_claims_reports_completes_and_fails(dsn: str, connection: Connection) -> None:
    printed = run_example(dsn)
    assert printed["held"] == {"id": True, "created": False, "reason": "singleton"}
    good, bad = printed["jobs"]
    assert (good["status"], good["result"]) == ("completed", {"sent_to": "ada@example.com"})
    assert (bad["status"], bad["error_class"], bad["error_message"]) == ("failed", "invalid", "no address: nobody")
    stored = rows(connection, "select progress_done, progress_message, subject from jobqueue.job where priority = 5")
    assert stored == [(1, "written", "person:ada")]
    assert rows(connection, "select count(*) from jobqueue.job") == [(2,)]


def test_a_heartbeat_brings_node_the_order_to_cancel(dsn: str) -> None:
    good, bad = run_example(dsn, BEAT_TEST="1")["jobs"]
    assert (good["status"], bad["status"]) == ("cancelled", "failed")
