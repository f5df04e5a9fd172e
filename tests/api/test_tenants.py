"""Tenants are kept apart: in every table, by every function, on every route."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from jobqueue.api.app import OPERATIONS
from jobqueue.api.operations import Operation
from tests.api.conftest import serving
from tests.sql.engine import Engine
from tests.support.api_keys import bearer, create_key

Connection = psycopg.Connection[tuple[Any, ...]]

ROLES = ("jobqueue_producer", "jobqueue_worker", "jobqueue_api", "jobqueue_support_readonly", "jobqueue_support")
READERS = {"jobqueue_api", "jobqueue_support_readonly", "jobqueue_support"}
SECRET = "marker-of-tenant-b"
# They say '*' themselves: the hub of a process reads once for all who listen, and shows each one only what is theirs. Each
# new one is to be looked at, so they are named.
FOR_THE_HUB = {f"jobqueue.http_{name}" for name in ("watch", "versions", "signals", "snapshots")}
NAMES = ("a", "b", "ab", "a b", "A", "ä", "%", "a%", "{a}", "a;b", "'", "default", "a/b", "null", "..", "?")


@pytest.fixture
def engine(connection: Connection, dsn: str) -> Iterator[Engine]:
    """The engine of the test's database, with a row of tenants a and b in every table that has tenants."""
    opened = Engine(connection, dsn)
    yield opened
    opened.close()


def schedule_of(tenant: str) -> str:
    """The name of a tenant's schedule; not its own, which could be guessed."""
    return f"of-{tenant.encode().hex()}"


def fill(engine: Engine, tenant: str, marker: str) -> UUID:
    """A failed job, and all that may hang on a job or a tenant; the marker is in everything that people read."""
    said = {"x": marker}
    job = engine.send(
        tenant=tenant, payload=said, subject=marker, display_name=marker, metadata=said, stages=["s"], max_retries=0
    )
    engine.call("prioritize", job, 1, marker)
    (claim,) = engine.claim()
    engine.call("checkpoint", claim.id, claim.token, "s", said)
    engine.call("mark_done", claim.id, claim.token, [marker])
    engine.fail(claim, {"class": "permanent", "code": "E", "message": marker, "detail": marker})
    engine.run("insert into jobqueue.tenant_pause values (%s, now(), %s, 'me')", tenant, marker)
    engine.call("schedule", schedule_of(tenant), "q", "0 0 1 1 *", said, {"tenant": tenant})
    return job


# -- Tables -----------------------------------------------------------------------------------------------------------


def tables(engine: Engine) -> dict[str, bool]:
    """Every table and view of the schema, and whether it has a column `tenant`."""
    found = engine.rows(
        "select c.relname::text as name, exists (select from pg_attribute a where a.attrelid = c.oid "
        "and a.attname = 'tenant' and not a.attisdropped) as tenants "
        "from pg_class c where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'v', 'p') order by 1"
    )
    return {row["name"]: row["tenants"] for row in found}


def update_of(engine: Engine, table: str) -> str:
    """A statement that writes a column of every row."""
    column = engine.value(
        "select attname::text from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped limit 1",
        f"jobqueue.{table}",
    )
    return f"update jobqueue.{{}} set {column} = default returning 1"


def outcome(engine: Engine, role: str, tenants: str | None, statement: str) -> Any:
    """What a statement comes to: 'refused', or the sorted first column of its rows."""
    with engine.acting_as(role, tenants):
        try:
            return sorted(engine.values(statement), key=str)
        except psycopg.errors.InsufficientPrivilege:
            return "refused"


def test_each_role_on_each_table_with_each_verb(engine: Engine) -> None:
    fill(engine, "a", "marker-of-tenant-a")
    fill(engine, "b", SECRET)
    writing = (
        "insert into jobqueue.{} default values returning 1",
        "delete from jobqueue.{} returning 1",
        "truncate jobqueue.{}",
    )
    # of views, tests/sql/test_roles.py says that nobody has the right to write them
    views = set(engine.values("select viewname::text from pg_views where schemaname = 'jobqueue'"))
    for role, (table, has_tenants) in itertools.product(ROLES, tables(engine).items()):
        if table not in views:
            for statement in (*writing, update_of(engine, table)):
                refused = outcome(engine, role, "*", statement.replace("{}", table)) == "refused"
                assert refused, (role, table, statement)
        read = f"select distinct tenant::text from jobqueue.{table}" if has_tenants else f"select from jobqueue.{table}"
        if table == "schema_migration":
            # every program compares the version of the schema with its own
            continue
        if role not in READERS:
            assert outcome(engine, role, "*", read.replace("select from", "select 1 from")) == "refused", (role, table)
        elif has_tenants and role == "jobqueue_api":
            seen = {tenants: outcome(engine, role, tenants, read) for tenants in (None, "", "a", "b", "c", "a,b", "*")}
            if seen["*"] != "refused":
                everything = seen["*"]
                assert set(everything) - {None} <= {"a", "b"}, table
                expected = {None: [], "": [], "c": [], "a,b": everything, "a": ["a"], "b": ["b"]}
                for tenants, rows in expected.items():
                    shown = [tenant for tenant in rows if tenant in everything]
                    assert seen[tenants] == shown, (table, tenants)


def test_every_table_that_says_whose_a_row_is_has_row_level_security(engine: Engine) -> None:
    bare = engine.values(
        "select distinct c.relname::text from pg_class c join pg_attribute a on a.attrelid = c.oid "
        "and a.attname in ('tenant', 'tenants', 'principal', 'owner') "
        "where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'r' and not c.relrowsecurity "
        "and has_table_privilege('jobqueue_api', c.oid, 'select')"
    )
    assert bare == []


def test_nobody_but_the_owner_reads_hashes_of_keys_or_makes_keys(engine: Engine) -> None:
    for role in ROLES:
        for column in ("secret_hash", "previous_hash"):
            assert outcome(engine, role, "*", f"select {column} from jobqueue.api_key") == "refused", (role, column)
        assert outcome(engine, role, "*", "select hash from jobqueue.stream_ticket") == "refused"
        for call in ("create_api_key('abcdefgh', sha256('x'))", "revoke_api_key('x', 'x')"):
            assert outcome(engine, role, "*", f"select jobqueue.{call}") == "refused", (role, call)


async def test_what_one_tenant_asks_reads_no_other_tenants_rows(dsn: str, engine: Engine) -> None:
    engine.run(
        "insert into jobqueue.job (queue, job_type, tenant, ready_seq) select 'q', 'q', 't' || (n % 40), n "
        "from generate_series(1, 2000) n"
    )
    engine.run(
        "insert into jobqueue.audit (action, tenant, reason, session_user_name) select 'x', 't' || (n % 40), 'x', 'x' "
        "from generate_series(1, 4000) n"
    )
    engine.run("analyze jobqueue.job, jobqueue.audit")
    named = (
        "explain (costs off) select * from jobqueue.job where tenant = 't7' order by created_at desc, id desc limit 20"
    )
    with engine.acting_as("jobqueue_api", "t7"):
        plan = "\n".join(engine.values(named))
    assert "job_list" in plan, plan
    assert "Seq Scan on job" not in plan, plan
    read = "select relname::text, seq_tup_read from pg_stat_user_tables where relname in ('job', 'audit')"
    key = bearer(create_key(engine.connection, tenants=["t7"], subject="ann"))
    job = engine.value("select id::text from jobqueue.job where tenant = 't7' limit 1")
    async with serving(dsn, pool_size=1) as client:
        database = client.app.state.services.database  # type: ignore[attr-defined]
        engine.run("select pg_stat_force_next_flush()")
        engine.run("select 1")
        before = dict(await database.rows(read, ()))
        for operation in OPERATIONS:
            if operation.method == "GET" and operation.of_tenant and not operation.is_stream:
                answer = await client.get(place(operation, job, "none"), headers=key)
                assert answer.status_code in {200, 404}, answer.text
                await database.rows("select pg_stat_force_next_flush()", ())
                assert dict(await database.rows(read, ())) == before, f"{operation.name} read a whole table"


# -- Functions --------------------------------------------------------------------------------------------------------


def argument(name: str, kind: str, job: UUID, queue: str = "q") -> Any:
    """A value for an argument of a function, by its name and type, that reaches for tenant b."""
    texts = {"_tenants": "a", "tenant": "b", "_tenant": "b", "name": schedule_of("b"), "_name": "x"}
    texts |= {"reason": "r", "_reason": "r", "action": "cancel", "_action": "cancel", "queue": queue, "_queue": queue}
    by_type = {"uuid": job, "uuid[]": [job], "text": str(job), "text[]": ["b"], "boolean": False, "integer": 5}
    by_type |= {"bigint": 5, "bigint[]": [5], "integer[]": [5], "double precision": 1.0, "bytea": b"x" * 32}
    by_type |= {"jsonb": Jsonb({"ids": [str(job)]}), "json": Jsonb({}), "interval": "1 min"}
    if name == "_role":
        return None
    return texts[name] if name in texts else by_type.get(kind)


def test_no_function_that_the_api_may_call_reads_or_changes_another_tenants_job(engine: Engine) -> None:
    fill(engine, "a", "marker-of-tenant-a")
    job = fill(engine, "b", SECRET)
    state = "select md5(string_agg(t::text, '' order by t::text)) from jobqueue.{} t where tenant = 'b'"
    watched = ("job", "attempt", "stage", "checkpoint", "audit", "tenant_pause", "schedule")
    before = {table: engine.value(state.format(table)) for table in watched}
    functions = engine.rows(
        "select p.oid::regproc::text as name, coalesce(p.proargnames, '{}') as names, "
        "array(select format_type(t, null) from unnest(p.proargtypes) t) as kinds "
        "from pg_proc p where p.pronamespace = 'jobqueue'::regnamespace and p.prokind = 'f' "
        "and has_function_privilege('jobqueue_api', p.oid, 'execute')"
    )
    assert len(functions) > 30
    for function in functions:
        if function["name"] in FOR_THE_HUB:
            continue
        names, kinds = function["names"], function["kinds"]
        values = [
            argument(name, kind, job) for name, kind in itertools.zip_longest(names[: len(kinds)], kinds, fillvalue="")
        ]
        call = sql.SQL("select * from {}({})").format(
            sql.SQL(function["name"]), sql.SQL(", ").join(sql.SQL("%s::" + kind) for kind in kinds)
        )
        with engine.connection.transaction():
            engine.run("set local role jobqueue_api")
            engine.run("select set_config('jobqueue.tenants', 'a', true)")
            try:
                with engine.connection.transaction():
                    said = str(engine.connection.execute(call, values).fetchall())
            except psycopg.Error as error:
                said = str(vars(error)) + str(error) + str(error.diag.message_detail)
        assert SECRET not in said, function["name"]
        after = {table: engine.value(state.format(table)) for table in watched}
        assert after == before, function["name"]


# -- Routes -----------------------------------------------------------------------------------------------------------


def place(operation: Operation, job: object, name: str) -> str:
    """The path of an operation for one job or name."""
    return operation.path.replace("{id}", str(job)).replace("{name}", name)


async def test_random_pairs_of_tenants_on_every_route(dsn: str, engine: Engine) -> None:
    pairs = random.Random(5).sample(list(itertools.permutations(NAMES, 2)), 4)
    owners = sorted({name for pair in pairs for name in pair})
    jobs = {tenant: fill(engine, tenant, f"marker-{number}-") for number, tenant in enumerate(owners)}
    markers = {tenant: f"marker-{number}-" for number, tenant in enumerate(owners)}
    async with serving(dsn) as client:
        for mine, theirs in pairs:
            client.headers.update(bearer(create_key(engine.connection, tenants=[mine])))
            for operation in OPERATIONS:
                path = place(operation, jobs[theirs], schedule_of(theirs))
                body: dict[str, Any] = {"json": {"reason": "r"}} if operation.request else {}
                if operation.of_tenant:
                    other = await client.request(operation.method, f"/tenants/{quote(theirs, safe='')}{path}", **body)
                    assert other.status_code in {403, 404}, (path, other.text)
                    assert markers[theirs] not in other.text, path
                    if "/" not in theirs and theirs != "..":
                        assert other.status_code == 403, (path, other.text)
                if operation.is_stream or "metrics" in operation.scopes:
                    continue
                bases = [""] + ([f"/tenants/{quote(mine, safe='')}"] if mine not in {"..", "a/b"} else [])
                for base in bases if operation.of_tenant else [""]:
                    answer = await client.request(operation.method, base + path, **body)
                    assert markers[theirs] not in answer.text, (operation.name, base)
                    # a body of another form is refused before it is known whose job it is
                    if "/jobs/{id}" in operation.path and operation.method != "PATCH":
                        assert answer.status_code in {403, 404}, (operation.name, base, answer.text)
                    assert answer.status_code < 500
            seen = (await client.get("/jobs")).json()["data"]
            assert {job["tenant"] for job in seen} == {mine}
    for tenant, job in jobs.items():
        assert engine.job(job)["status"] == "failed", f"a job of {tenant} was changed"


@pytest.mark.parametrize("settings", [{}, {"api_prefix": "/api/v2", "tenant_segment": "matters"}])
async def test_a_tenant_that_is_not_yours_is_403_and_a_hidden_unknown_or_malformed_job_404(
    dsn: str, engine: Engine, settings: dict[str, str]
) -> None:
    mine, theirs = fill(engine, "a", "x"), fill(engine, "b", "y")
    prefix, segment = settings.get("api_prefix", ""), settings.get("tenant_segment", "tenants")
    key = bearer(create_key(engine.connection, tenants=["a"]))
    admin = bearer(create_key(engine.connection, tenants=["a"], scopes=["admin"]))

    async with serving(dsn, settings) as client:

        async def get(path: str, headers: dict[str, str] = key) -> tuple[int, str]:
            answer = await client.get(prefix + path, headers=headers)
            return answer.status_code, answer.json().get("error", {}).get("code", "")

        assert await get(f"/{segment}/a/jobs/{mine}") == (200, "")
        assert await get(f"/{segment}/b/jobs/{theirs}") == (403, "FORBIDDEN")
        assert await get(f"/{segment}/b/jobs") == (403, "FORBIDDEN")
        assert await get(f"/{segment}/a/jobs/{theirs}") == (404, "JOB_NOT_FOUND")
        assert await get(f"/jobs/{theirs}") == (404, "JOB_NOT_FOUND")
        assert await get("/jobs/0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b") == (404, "JOB_NOT_FOUND")
        assert await get("/jobs/17") == (404, "JOB_NOT_FOUND")
        assert await get(f"/{segment}/%2A/jobs") == (403, "FORBIDDEN")
        assert await get(f"/{segment}/a,b/jobs") == (403, "FORBIDDEN")
        assert await get(f"/admin/jobs/{theirs}") == (403, "FORBIDDEN")
        assert await get(f"/admin/jobs/{theirs}", admin) == (200, "")
        sent = await client.post(f"{prefix}/jobs", json={"queue": "q", "tenant": "b"}, headers=key)
        assert sent.status_code == 403
        sent = await client.post(f"{prefix}/{segment}/a/jobs", json={"queue": "q"}, headers=key)
        assert (sent.status_code, sent.json()["tenant"]) == (202, "a")
        assert sent.headers["Location"] == f"{prefix}/{segment}/a/jobs/{sent.json()['id']}"


async def test_a_request_that_reads_cannot_write_and_sets_nothing_for_the_next_one(dsn: str, engine: Engine) -> None:
    job = fill(engine, "a", "x")
    engine.run(
        "create or replace function jobqueue.http_more(_id uuid, _estimate boolean, out members text, out ends_at timestamptz) "
        "language plpgsql security definer "
        "set search_path = pg_catalog, jobqueue, pg_temp as $$ begin delete from jobqueue.job; end $$"
    )
    engine.call("retry", job, "so that it waits and has a position")
    async with serving(dsn, pool_size=1) as client:
        answer = await client.get(f"/jobs/{job}")
        assert answer.status_code == 503, "a write in a read-only transaction"
        assert engine.count() == 1
        database = client.app.state.services.database  # type: ignore[attr-defined]
        settings = "select current_setting('jobqueue.tenants', true), current_user = session_user, "
        settings += "current_setting('transaction_read_only')"
        assert await database.rows(settings, ()) == [("", True, "off")]
