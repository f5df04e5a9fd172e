"""Connections as jobqueue opens them: autocommit, READ COMMITTED, UTC, UTF-8, keepalives, PostgreSQL 15+.

A caller's own connection (`app.send(..., connection=…)`) is never changed; this is only about the ones opened here.
"""

import asyncio
import contextlib
import functools
import logging
import time
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from jobqueue.database.alive import LivePool
from jobqueue.database.dsn import mask_dsn
from jobqueue.errors import ConfigurationError, DatabaseUnavailable, ServerTooOld

MINIMUM_SERVER_VERSION = 150000
RETRY_SECONDS = 0.5
_PID = "select pg_catalog.pg_backend_pid()"
_SESSION = "select pg_catalog.pg_backend_pid(), pg_catalog.current_setting('default_transaction_isolation')"
# Under another default every meeting of two workers on a row would end one's statement with 40001.
_READ_COMMITTED = "set default_transaction_isolation = 'read committed'"
PREPARE_AFTER = 5
SHARING_TRIES = 3

# A peer that vanished without a word is noticed after about 25 s, idle or not: under the default lease of 30 s.
NETWORK_DEFAULTS: dict[str, str | int] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}

logger = logging.getLogger(__name__)


def connection_options(dsn: str, application_name: str, *, pooler: bool = False) -> dict[str, Any]:
    """Return psycopg's connection arguments for a DSN; what the DSN itself says about the network wins.

    `pooler` turns prepared statements off: behind a transaction pooler the next statement may meet another server
    session. Who does not say so costs each new connection a round trip, by which a pooler is found out.
    Raises ConfigurationError if the DSN cannot be read; its text is not repeated, it may hold a password.
    """
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise ConfigurationError(
            "the connection string cannot be read",
            hint="Expected postgresql://user@host:5432/database or host=… dbname=…; check JOBQUEUE_DSN.",
        ) from None
    defaults = {name: value for name, value in NETWORK_DEFAULTS.items() if name not in given}
    return {
        **defaults,
        "application_name": given.get("application_name") or application_name,
        "client_encoding": "utf8",
        "autocommit": True,
        "prepare_threshold": None if pooler else PREPARE_AFTER,
    }


def connect(
    dsn: str, application_name: str = "jobqueue", *, pooler: bool = False, timeout: float = 0.0
) -> Connection[Any]:
    """Open one blocking connection.

    `timeout`: seconds to keep trying while the server cannot be reached (0: one attempt).
    Raises DatabaseUnavailable, ServerTooOld, ConfigurationError.
    """
    options = connection_options(dsn, application_name, pooler=pooler)
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = psycopg.connect(dsn, **options)
        except psycopg.OperationalError as error:
            _give_up_after(deadline, dsn, error, timeout)
            time.sleep(RETRY_SECONDS)
            continue
        try:
            configure_blocking(connection)
        except BaseException:
            connection.close()
            raise
        return connection


async def connect_async(
    dsn: str, application_name: str = "jobqueue", *, pooler: bool = False, timeout: float = 0.0
) -> AsyncConnection[Any]:
    """Open one asyncio connection; arguments and errors as of `connect`."""
    options = connection_options(dsn, application_name, pooler=pooler)
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = await AsyncConnection.connect(dsn, **options)
        except psycopg.OperationalError as error:
            _give_up_after(deadline, dsn, error, timeout)
            await asyncio.sleep(RETRY_SECONDS)
            continue
        try:
            await _configure(connection)
        except BaseException:
            await connection.close()
            raise
        return connection


async def open_pool(
    dsn: str,
    min_size: int = 1,
    max_size: int = 4,
    application_name: str = "jobqueue",
    *,
    pooler: bool = False,
    timeout: float = 60.0,
) -> AsyncConnectionPool[AsyncConnection[Any]]:
    """Open a pool with `min_size` connections ready; close it with `await pool.close()`.

    `timeout`: seconds to wait for the server (`JOBQUEUE_START_TIMEOUT`). Afterwards the pool reconnects by itself, and
    lends no connection that died while it was idle.
    Raises DatabaseUnavailable with what was tried, ServerTooOld, ConfigurationError.
    """
    deadline = time.monotonic() + timeout
    # The pool itself only reports "timeout": a first connection of our own learns the reason, and an old server.
    first = await connect_async(dsn, application_name, pooler=pooler, timeout=timeout)
    await first.close()
    pool = LivePool(
        dsn,
        kwargs=connection_options(dsn, application_name, pooler=pooler),
        min_size=min_size,
        max_size=max_size,
        configure=_configure,
        name=application_name,
        # its own default grows to five minutes between attempts
        reconnect_timeout=5.0,
        open=False,
    )
    try:
        await pool.open(wait=True, timeout=max(deadline - time.monotonic(), 5.0))
    except PoolTimeout as error:
        with contextlib.suppress(Exception):
            await pool.close()
        raise DatabaseUnavailable(
            f"the server accepted one connection but not {min_size} at {_place(dsn)}",
            hint="Raise max_connections of the server, or close connections of other programs.",
        ) from error
    return pool


def configure_blocking(connection: Connection[Any]) -> None:
    """Make a new connection as this module promises. Raises ServerTooOld."""
    _require_supported_server(connection)
    if connection.prepare_threshold is not None:
        row = connection.execute(_SESSION).fetchone()
        if _note_session(connection, row):
            connection.execute(_READ_COMMITTED)
    if not _is_utc(connection):
        connection.execute("set time zone 'UTC'")


async def _configure(connection: AsyncConnection[Any]) -> None:
    _require_supported_server(connection)
    if connection.prepare_threshold is not None:
        row = await (await connection.execute(_SESSION)).fetchone()
        if _note_session(connection, row):
            await connection.execute(_READ_COMMITTED)
    if not _is_utc(connection):
        await connection.execute("set time zone 'UTC'")


def is_pooled(connection: Connection[Any] | AsyncConnection[Any]) -> bool:
    """Whether a connection opened here leads through a pooler, by the setting or by what was found."""
    return connection.prepare_threshold is None


def shares_sessions(dsn: str, connection: Connection[Any]) -> bool:
    """Whether a transaction pooler lends the server's session behind this connection to others; asks it a few times."""
    row = connection.execute(_PID).fetchone()
    if row is not None and row[0] == connection.info.backend_pid:
        return False
    for _ in range(SHARING_TRIES):
        mine = connection.execute(_PID).fetchone()
        with connect(dsn, pooler=True) as other, other.transaction():
            # What was given back last is lent first; while the other one has it, this one meets another session.
            if other.execute(_PID).fetchone() == mine or connection.execute(_PID).fetchone() != mine:
                return True
    return False


def _note_session(connection: Connection[Any] | AsyncConnection[Any], row: tuple[int, str] | None) -> bool:
    """Do without prepared statements if a pooler answered: it makes up the process id that it greets with.

    Returns whether the session has another isolation level by default than this module promises.
    """
    if row is None:
        return False
    if row[0] != connection.info.backend_pid:
        connection.prepare_threshold = None
        _warn_of_pooler(f"{connection.info.host}:{connection.info.port}")
    return row[1] != "read committed"


@functools.cache
def _warn_of_pooler(place: str) -> None:
    logger.warning(
        "a connection pooler answers at %s: no prepared statements, no settings of a session; JOBQUEUE_POOLER=1 says so "
        "beforehand, JOBQUEUE_LISTEN_DSN can name a direct connection for notifications",
        place,
    )


def _require_supported_server(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    version = connection.info.server_version
    if version < MINIMUM_SERVER_VERSION:
        raise ServerTooOld(
            f"the server runs PostgreSQL {version // 10000}; jobqueue needs 15 or newer",
            hint="Upgrade the server, or point JOBQUEUE_DSN at another one.",
        )


def _is_utc(connection: Connection[Any] | AsyncConnection[Any]) -> bool:
    # Reported by the server at start-up: no round trip. As a start-up option it would be refused by some poolers.
    return connection.info.parameter_status("TimeZone") in {"UTC", "Etc/UTC"}


def _give_up_after(deadline: float, dsn: str, error: psycopg.OperationalError, timeout: float) -> None:
    reason = " ".join(str(error).split())
    refused_by_pooler = "unsupported startup parameter" in reason
    if time.monotonic() < deadline and not refused_by_pooler:
        logger.warning("waiting for the database at %s: %s", _place(dsn), reason)
        return
    if refused_by_pooler:
        raise DatabaseUnavailable(
            f"a connection pooler at {_place(dsn)}: {reason}", hint="Set JOBQUEUE_POOLER=1."
        ) from error
    raise DatabaseUnavailable(
        f"no database at {_place(dsn)}" + (f" within {timeout:g} s" if timeout else "") + f": {reason}",
        hint="Check that the server runs and that JOBQUEUE_DSN is right (`jobqueue config show`).",
    ) from error


def _place(dsn: str) -> str:
    return mask_dsn(dsn) or "the place that the PG* variables name"
