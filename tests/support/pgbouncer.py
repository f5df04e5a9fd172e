"""A real PgBouncer in transaction mode, in front of a server of the tests.

`JOBQUEUE_TEST_PGBOUNCER` names its program (default: the one that is installed), `JOBQUEUE_TEST_PGBOUNCER_SETTINGS` more
of its settings (`max_prepared_statements=200 …`). `scripts/compat pooler` runs the tests with several of both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from jobqueue.database.binaries import server_account
from jobqueue.database.ephemeral import make_ephemeral_home
from jobqueue.database.parentage import die_with_parent
from tests.support.waiting import wait_until

POOL_SIZE = 3
"""Sessions of the server that all clients share: fewer than a worker has connections, so that they mix."""
PORT = 6432

SESSION = """
    select pg_backend_pid(),
        (select array_agg(name || ' = ' || setting order by name) from pg_settings
            where source = 'session' and name <> all (array['client_encoding', 'DateStyle', 'TimeZone', 'application_name'])),
        nullif(current_setting('jobqueue.tenants', true), ''),
        nullif(current_setting('jobqueue.actor', true), ''),
        nullif(current_user, session_user),
        (select array_agg(objid) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'),
        (select array_agg(c) from pg_listening_channels() c),
        (select array_agg(statement) from pg_prepared_statements)
"""


@dataclass(frozen=True, slots=True)
class PgBouncer:
    """A running PgBouncer."""

    dsn: str

    def leftovers(self) -> list[Any]:
        """What every session of the server that clients share keeps, beyond what PgBouncer itself looks after: settings,
        tenants, actor, role, advisory locks, channels, prepared statements; empty if it is as it should be."""
        found: dict[int, list[Any]] = {}
        with contextlib.ExitStack() as stack:
            # As many transactions at a time as there are sessions: each meets another one.
            for _ in range(POOL_SIZE):
                connection = stack.enter_context(psycopg.connect(self.dsn, prepare_threshold=None))
                pid, *state = connection.execute(SESSION).fetchone() or ()
                found[pid] = state
        assert len(found) == POOL_SIZE
        return [kept for state in found.values() for kept in state if kept is not None]


def program() -> str | None:
    """The PgBouncer under test; None if there is none."""
    return os.environ.get("JOBQUEUE_TEST_PGBOUNCER") or shutil.which(
        "pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"
    )


@contextlib.contextmanager
def pgbouncer(server_dsn: str) -> Iterator[PgBouncer]:
    """Run PgBouncer in front of a server of this machine, until the end of the block."""
    server = conninfo_to_dict(server_dsn)
    account = server_account(Path(str(server["host"])))
    home = make_ephemeral_home()
    try:
        account.take(home)
        command = [str(program()), str(_configure(home, server))]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=die_with_parent(), **account.process_options
            )
        try:
            dsn = make_conninfo(server_dsn, host=str(home), port=PORT)
            wait_until(lambda: _answers(process, dsn), what=f"PgBouncer answers: {(home / 'log').read_text()}")
            yield PgBouncer(dsn)
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(home)


def _configure(home: Path, server: dict[str, Any]) -> Path:
    target = f"host={server['host']} port={server['port']} user={server['user']}"
    settings = {
        "listen_port": PORT,
        "unix_socket_dir": home,
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": POOL_SIZE,
        **dict(pair.split("=") for pair in os.environ.get("JOBQUEUE_TEST_PGBOUNCER_SETTINGS", "").split()),
    }
    lines = ["[databases]", f"* = {target}", "[pgbouncer]", *(f"{name} = {value}" for name, value in settings.items())]
    file = home / "pgbouncer.ini"
    file.write_text("\n".join(lines) + "\n")
    return file


def _answers(process: subprocess.Popen[bytes], dsn: str) -> bool:
    assert process.poll() is None, "PgBouncer has ended"
    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(dsn).close()
        return True
    return False
