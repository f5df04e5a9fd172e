"""What the server counted: WAL between two points, statements and the buffers they touched."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.places import Connection, value

EXTENSIONS = ("pg_stat_statements", "pg_walinspect")
WAL_NOW = "select pg_current_wal_insert_lsn()::text"
WAL_BYTES = "select pg_wal_lsn_diff(%s::pg_lsn, %s::pg_lsn)::float8"
FULL_PAGES = "select coalesce(sum(fpi_size), 0)::float8 from pg_get_wal_stats(%s::pg_lsn, %s::pg_lsn)"
# Of this database, and not those that count.
COUNTED = """
from pg_stat_statements s
where s.dbid = (select oid from pg_database where datname = current_database())
    and s.toplevel and s.query not like '%%pg_stat_statements%%' and s.query not like '%%pg_database%%'
"""
CALLS = f"select coalesce(sum(s.calls), 0)::float8 {COUNTED}"
# `$1` and not the text: the claim and its sweep are both calls of a function called claim_…
CLAIMS = f"""
select coalesce(sum(s.shared_blks_hit + s.shared_blks_read), 0)::float8, coalesce(sum(s.rows), 0)::float8,
    coalesce(sum(s.calls), 0)::float8
{COUNTED} and s.query like '%%jobqueue.claim_%%'
"""


class NotLoaded(RuntimeError):
    """The server does not count statements."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What the claims since the last reset touched: buffers, jobs returned, calls."""

    buffers: float
    jobs: float
    calls: float


@dataclass(frozen=True, slots=True)
class Wal:
    """Bytes of the write-ahead log, and how many of them are full-page images."""

    bytes: float
    full_pages: float


def prepare(connection: Connection) -> None:
    """Create the extensions that count. Raises NotLoaded with what to set."""
    loaded = str(value(connection, "select current_setting('shared_preload_libraries')"))
    if "pg_stat_statements" not in loaded:
        raise NotLoaded("the server must be started with shared_preload_libraries = 'pg_stat_statements'")
    for name in EXTENSIONS:
        connection.execute(f"create extension if not exists {name}".encode())


def reset(connection: Connection) -> None:
    """Begin to count anew."""
    connection.execute("select pg_stat_statements_reset()")


def calls(connection: Connection) -> float:
    """Statements that clients sent since the last reset, without those of this module."""
    return float(value(connection, CALLS))


def claims(connection: Connection) -> Claims:
    """What the claims since the last reset cost."""
    row = connection.execute(CLAIMS.encode(), ()).fetchone()
    assert row is not None
    return Claims(*row)


def wal_position(connection: Connection) -> str:
    """Where the log ends now."""
    return str(value(connection, WAL_NOW))


def wal_since(connection: Connection, begin: str) -> Wal:
    """The log since a position; whole server."""
    # The reader of the log stops at what is on disk.
    connection.execute("select pg_logical_emit_message(true, 'bench', '')")
    end = str(value(connection, "select pg_current_wal_flush_lsn()::text"))
    return Wal(value(connection, WAL_BYTES, (end, begin)), value(connection, FULL_PAGES, (begin, end)))
