"""What makes the clock of a database stand still: every function, default and view that reads a clock reads another one.

```
pg_catalog.now()  ──►  jobqueue_testing.now()  ──►  the row of jobqueue_testing.clock, or pg_catalog.now() without one
```
The definitions are taken from the database itself, so nothing has to be kept up by hand, and what they were is stored
beside the clock, to be put back to the letter. Only a database for tests is ever touched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import psycopg

from jobqueue.errors import Conflict

Connection = psycopg.Connection[Any]

LOCK_TIMEOUT = "5s"
"""How long to wait for transactions that have read what is to be defined anew."""

CLOCK = """
    create schema jobqueue_testing;
    grant usage on schema jobqueue_testing to public;

    create table jobqueue_testing.clock (
        one boolean primary key default true check (one),
        stands_at timestamptz not null,
        runs_since timestamptz
    );
    grant select on jobqueue_testing.clock to public;

    create table jobqueue_testing.original (kind text, name text, statement text not null, primary key (kind, name));

    create sequence jobqueue_testing.id_seq;
    grant usage on sequence jobqueue_testing.id_seq to public;

    create function jobqueue_testing.now()
    returns timestamptz
    language plpgsql stable parallel safe
    as $$
    declare
        c jobqueue_testing.clock;
    begin
        select * into c from jobqueue_testing.clock;
        if not found then
            return pg_catalog.now();
        end if;
        return c.stands_at + greatest(coalesce(pg_catalog.now() - c.runs_since, interval '0'), interval '0');
    end
    $$;

    create function jobqueue_testing.clock_timestamp()
    returns timestamptz
    language plpgsql volatile parallel safe
    as $$
    declare
        c jobqueue_testing.clock;
    begin
        select * into c from jobqueue_testing.clock;
        if not found then
            return pg_catalog.clock_timestamp();
        end if;
        return c.stands_at + coalesce(pg_catalog.clock_timestamp() - c.runs_since, interval '0');
    end
    $$;

    -- a version 7 id of that time; those of one millisecond are in the order of being made, and a clock that stands has but one
    create function jobqueue_testing.new_id()
    returns uuid
    language sql volatile
    as $$
        select (lpad(to_hex((extract(epoch from jobqueue_testing.clock_timestamp()) * 1000)::bigint), 12, '0')
            || '7' || lpad(to_hex((n >> 24) & 4095), 3, '0') || '8' || lpad(to_hex(n & 16777215), 6, '0')
            || right(gen_random_uuid()::text, 9))::uuid
        from nextval('jobqueue_testing.id_seq') n
    $$;

    grant execute on all functions in schema jobqueue_testing to public;
"""

_NAMES = "now|clock_timestamp|statement_timestamp|transaction_timestamp"
READS_A_CLOCK = re.compile(
    rf"(?<![\w.])(?:pg_catalog\.)?(?:(?:{_NAMES}|timeofday|uuidv7)\s*\(|(?:current_(?:date|time|timestamp)|local(?:time|timestamp))\b)"
    r"|'(?:now|today|tomorrow|yesterday)'",
    re.IGNORECASE,
)
"""What reads the time in SQL. `frozen` replaces all that the engine uses of it, and a test finds what it does not."""

STAYS_REAL = re.compile(
    # how long a transaction or a statement of the server has lasted: the server's own times are real
    r"statement_timestamp\(\) > now\(\)"
    r"|now\(\) - (?:min\()?\w+\.(?:xact|query|backend)_start"
    r"|\w+\.(?:xact|query|backend)_start < now\(\)"
    # how long to try again for a lock: with a clock that stands that would be for ever
    r"|until timestamptz := clock_timestamp\(\) \+ interval '3 s'"
    r"|if clock_timestamp\(\) > until\b"
)
"""What measures how long something really takes, and is left as it is."""

_REPLACED = re.compile(
    rf"({STAYS_REAL.pattern})|(?<![\w.])(?:pg_catalog\.)?(?:({_NAMES})\s*\(\s*\)|current_timestamp\b)", re.IGNORECASE
)
_CLOCK_OF = {"clock_timestamp": "clock_timestamp", "statement_timestamp": "clock_timestamp"}

_DEFINITIONS = """
    select 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid)
    from pg_proc p
    where p.pronamespace = 'jobqueue'::regnamespace and p.prokind in ('f', 'p')
    union all
    select 'view', c.oid::regclass::text,
        format('create or replace view %s%s as %s', c.oid::regclass, ' with (' || array_to_string(c.reloptions, ', ') || ')',
            pg_get_viewdef(c.oid))
    from pg_class c
    where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'v'
    union all
    select 'default', format('%s.%I', d.adrelid::regclass, a.attname),
        format('alter table %s alter column %I set default %s', d.adrelid::regclass, a.attname, pg_get_expr(d.adbin, d.adrelid))
    from pg_attrdef d
    join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum and a.attgenerated = ''
    join pg_class c on c.oid = d.adrelid and c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'p', 'v')
    order by 1, 2
"""


class Definition(NamedTuple):
    """A function, view or default, and the statement that makes it what it is."""

    kind: str
    name: str
    statement: str


def is_installed(connection: Connection) -> bool:
    """Return whether the functions of this database read the clock of tests."""
    row = connection.execute("select to_regclass('jobqueue_testing.clock') is not null").fetchone()
    return row is not None and bool(row[0])


def install(connection: Connection) -> None:
    """Make the rules of jobqueue read `jobqueue_testing.clock`; without a row in it they read the real one.

    For a user who owns the schema. Takes about 0.1 s. Raises Conflict if an open transaction keeps it from a table.
    """
    with _changing(connection):
        before = _clock_readers(connection)
        connection.execute(CLOCK.encode())
        with connection.cursor() as cursor:
            cursor.executemany("insert into jobqueue_testing.original values (%s, %s, %s)", before)
        _run(connection, [frozen_definition(definition) for definition in before])


def uninstall(connection: Connection) -> None:
    """Put back every definition to the letter. What was defined anew meanwhile stays. Raises as of `install`."""
    with _changing(connection):
        original: Mapping[Any, str] = {
            (kind, name): statement
            for kind, name, statement in connection.execute("select * from jobqueue_testing.original").fetchall()
        }
        frozen = [each for each in _definitions(connection) if "jobqueue_testing." in each.statement]
        _run(connection, [original.get((each.kind, each.name), _thawed(each.statement)) for each in frozen])
        connection.execute("drop schema jobqueue_testing cascade")


def frozen_definition(definition: Definition) -> str:
    """Return the statement with another clock."""
    if definition.name == "jobqueue.new_id()":
        head, _, _ = definition.statement.partition("AS $")
        return f"{head} as $$ select jobqueue_testing.new_id() $$"
    return _REPLACED.sub(_replacement, definition.statement)


def _clock_readers(connection: Connection) -> list[Definition]:
    return [each for each in _definitions(connection) if READS_A_CLOCK.search(each.statement)]


def _definitions(connection: Connection) -> list[Definition]:
    return [Definition(*row) for row in connection.execute(_DEFINITIONS.encode()).fetchall()]


def _replacement(match: re.Match[str]) -> str:
    real, name = match.groups()
    if real is not None:
        return str(real)
    return f"jobqueue_testing.{_CLOCK_OF.get((name or 'now').lower(), 'now')}()"


def _thawed(statement: str) -> str:
    return statement.replace("jobqueue_testing.", "pg_catalog.")


def _run(connection: Connection, statements: list[str]) -> None:
    if statements:
        # As one message: without parameters a driver sends it whole.
        connection.execute(";\n".join(statements).encode())


@contextlib.contextmanager
def _changing(connection: Connection) -> Iterator[None]:
    """A transaction that changes definitions; names come out and go in with their schema."""
    try:
        with connection.transaction():
            connection.execute(
                f"set local lock_timeout = '{LOCK_TIMEOUT}'; set local check_function_bodies = off;"
                "set local search_path = pg_catalog; set local client_min_messages = warning".encode()
            )
            yield
    except psycopg.errors.LockNotAvailable as error:
        raise Conflict(
            f"the clock cannot be changed: for {LOCK_TIMEOUT} an open transaction has been using a table or view of it",
            hint="Freeze time before the test opens a transaction, and end the transaction before time goes on.",
        ) from error
