"""Who may do what: each role, each function and table, each tenant."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.engine import Engine

ROLES = ("jobqueue_producer", "jobqueue_worker", "jobqueue_api", "jobqueue_support_readonly", "jobqueue_support")
ACTIONS = {"cancel", "pause", "resume", "retry", "skip", "run_now", "prioritize", "delete_job"}
WORK = {
    "claim",
    "complete",
    "complete_many",
    "fail",
    "snooze",
    "release",
    "acknowledge",
    "heartbeat",
    "progress",
    "stage",
    "checkpoint",
}
# function -> roles that may call it; everything of the public contract is named here
MAY = {
    **{name: {"jobqueue_producer", "jobqueue_worker", "jobqueue_api"} for name in ("send", "send_many")},
    **{name: {"jobqueue_worker"} for name in WORK | {"mark_done", "register_worker", "settle", "maintain"}},
    **{name: {"jobqueue_api", "jobqueue_support"} for name in ACTIONS | {"drain_worker"}},
    **{
        name: {"jobqueue_api", "jobqueue_support", "jobqueue_support_readonly", "jobqueue_worker"}
        for name in ("actions", "allowed_actions", "done_keys", "watch")
    },
    **{
        name: {"jobqueue_api"}
        for name in ("find_api_key", "api_keys_state", "take_quota", "give_quota", "keep_ticket", "use_ticket")
    },
}
# helpers that decide nothing by themselves must not be reachable: they skip the checks of those above
NOBODY = (
    "change_job",
    "end_attempt",
    "fail_claim",
    "rescue",
    "expire",
    "remove_old",
    "store_job",
    "new_job",
    "note_action",
    # who makes keys can give himself every right: the owner of the schema
    "create_api_key",
    "rotate_api_key",
    "revoke_api_key",
    "lock_api_key",
)
TENANT_TABLES = ("job", "attempt", "stage", "checkpoint", "done_key", "audit", "tenant_pause")


def filled(engine: Engine) -> None:
    """A row of two tenants in every table of tenants."""
    for tenant in ("a", "b"):
        claim = engine.claimed(tenant=tenant, stages=["s"])
        engine.call("checkpoint", claim.id, claim.token, "s")
        engine.call("mark_done", claim.id, claim.token, ["k"])
        engine.fail(claim, {"class": "permanent"})
        engine.call("retry", claim.id, "r")
        engine.call("cancel", claim.id, "r")
        engine.run("insert into jobqueue.tenant_pause values (%s, now(), 'r', 'me')", tenant)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_calls_its_functions_and_no_others(engine: Engine, role: str) -> None:
    may = {
        row["proname"]: row["may"]
        for row in engine.rows(
            "select proname, bool_or(has_function_privilege(%s, oid, 'execute')) as may from pg_proc "
            "where pronamespace = 'jobqueue'::regnamespace group by proname",
            role,
        )
    }
    for function, roles in MAY.items():
        assert may[function] == (role in roles), function
    for function in NOBODY:
        assert not may[function], function


@pytest.mark.parametrize("role", ROLES)
def test_no_role_writes_a_table(engine: Engine, role: str) -> None:
    writable = engine.values(
        "select c.oid::regclass::text from pg_class c, "
        "unnest('{insert,update,delete,truncate,references,trigger}'::text[]) p "
        "where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'v', 'p') and "
        "has_table_privilege(%s, c.oid, p)",
        role,
    )
    assert writable == []


@pytest.mark.parametrize("role", ["jobqueue_producer", "jobqueue_worker"])
def test_producers_and_workers_have_no_table_access(engine: Engine, role: str) -> None:
    readable = engine.values(
        "select oid::regclass::text from pg_class where relnamespace = 'jobqueue'::regnamespace "
        "and relkind in ('r', 'v', 'S') "
        "and case relkind when 'S' then has_sequence_privilege(%(r)s, oid, 'usage, select') else "
        "has_table_privilege(%(r)s, oid, 'select') end".replace("%(r)s", "'" + role + "'")
    )
    assert readable == []


def test_nothing_is_executable_or_readable_by_public(engine: Engine) -> None:
    assert (
        engine.values(
            "select p.oid::regprocedure::text from pg_proc p, aclexplode(coalesce(p.proacl, "
            "acldefault('f', p.proowner))) a "
            "where p.pronamespace = 'jobqueue'::regnamespace and a.grantee = 0"
        )
        == []
    )
    assert (
        engine.values(
            "select c.oid::regclass::text from pg_class c, aclexplode(coalesce(c.relacl, "
            "acldefault('r', c.relowner))) a "
            "where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'v') and a.grantee = 0"
        )
        == []
    )


def test_every_security_definer_function_pins_a_search_path_that_ends_in_pg_temp(engine: Engine) -> None:
    unpinned = engine.values(
        "select p.oid::regprocedure::text from pg_proc p where p.pronamespace = "
        "'jobqueue'::regnamespace and p.prosecdef "
        "and not exists (select from unnest(p.proconfig) c where c ~ '^search_path=.*[, ]\"?pg_temp\"?$')"
    )
    assert unpinned == []


def test_views_run_with_the_rights_of_their_reader(engine: Engine) -> None:
    assert (
        engine.values(
            "select oid::regclass::text from pg_class where relnamespace = 'jobqueue'::regnamespace and relkind = 'v' "
            "and not coalesce(array_position(reloptions, 'security_invoker=true') is not null, false)"
        )
        == []
    )


def test_every_table_with_a_tenant_has_row_level_security(engine: Engine) -> None:
    bare = engine.values(
        "select c.relname::text from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant' "
        "where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'r' and not c.relrowsecurity"
    )
    assert bare == []


@pytest.mark.parametrize("table", TENANT_TABLES)
def test_the_api_sees_the_tenants_of_its_transaction_and_none_when_unset(engine: Engine, table: str) -> None:
    filled(engine)
    for tenants, seen in (
        (None, []),
        ("", []),
        ("a", ["a"]),
        ("b", ["b"]),
        ("a,b", ["a", "b"]),
        ("*", ["a", "b"]),
        ("c", []),
    ):
        with engine.acting_as("jobqueue_api", tenants):
            assert engine.values(f"select distinct tenant::text from jobqueue.{table} order by 1") == seen, tenants


def test_a_tenants_name_with_a_pattern_in_it_means_nothing_else(engine: Engine) -> None:
    filled(engine)
    for tenants in ("%", "a%", "{a}", "A", " a", "a;b", "**"):
        with engine.acting_as("jobqueue_api", tenants):
            assert engine.count() == 0, tenants


@pytest.mark.parametrize("view", ["jobs", "attempts", "stages", "checkpoints", "actions_taken"])
def test_views_keep_tenants_apart(engine: Engine, view: str) -> None:
    filled(engine)
    with engine.acting_as("jobqueue_api", "a"):
        assert engine.values(f"select distinct tenant from jobqueue.{view}") == ["a"]
    with engine.acting_as("jobqueue_support_readonly"):
        assert engine.values(f"select distinct tenant from jobqueue.{view} order by 1") == ["a", "b"]


def test_another_tenants_job_is_unknown_to_every_function(engine: Engine) -> None:
    job = engine.send(tenant="b")
    calls = [f"select jobqueue.{action}(%s, 'r')" for action in ACTIONS - {"prioritize"}]
    calls += ["select jobqueue.prioritize(%s, 1, 'r')"]
    calls += [f"select * from jobqueue.{name}(%s)" for name in ("actions", "allowed_actions", "done_keys")]
    for tenants in (None, "a"):
        for call in calls:
            with engine.acting_as("jobqueue_api", tenants):
                assert engine.refused(engine.run, call, job).code == "JOB_NOT_FOUND", call
    assert engine.job(job)["version"] == 1
    with engine.acting_as("jobqueue_api", "b"):
        assert engine.call("cancel", job, "mine") == "cancelled"


def test_the_api_sends_for_its_tenants_only(engine: Engine) -> None:
    for tenants in (None, "a"):
        with engine.acting_as("jobqueue_api", tenants):
            assert engine.refused(lambda: engine.send(tenant="b")).sqlstate == "JQ403"
    with engine.acting_as("jobqueue_api"):
        assert engine.refused(lambda: engine.send()).sqlstate == "JQ403"


def test_a_login_that_is_only_a_member_of_the_api_role_is_bound_like_it(engine: Engine) -> None:
    job = engine.send(tenant="b")
    engine.run("create role api_login login in role jobqueue_api")
    try:
        engine.run("set session authorization api_login")
        assert engine.count() == 0
        assert engine.refused(lambda: engine.call("cancel", job, "not mine")).code == "JOB_NOT_FOUND"
        engine.run("set jobqueue.tenants = 'b'")
        assert engine.call("cancel", job, "mine") == "cancelled"
    finally:
        engine.run("reset session authorization")
        engine.run("drop role api_login")


def test_a_worker_completes_through_functions_without_seeing_a_table(engine: Engine) -> None:
    with engine.acting_as("jobqueue_worker"):
        claim = engine.claimed()
        assert engine.call("complete", claim.id, claim.token) == "ok"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            engine.count()


def test_support_acts_and_readonly_support_only_reads(engine: Engine) -> None:
    job = engine.send(tenant="b")
    with engine.acting_as("jobqueue_support_readonly"):
        assert engine.view(job)["tenant"] == "b"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            engine.call("cancel", job, "r")
    with engine.acting_as("jobqueue_support"):
        assert engine.view(job)["tenant"] == "b"
        assert engine.call("cancel", job, "r") == "cancelled"


def test_objects_of_a_callers_temporary_schema_are_never_used(engine: Engine) -> None:
    with engine.acting_as("jobqueue_producer"):
        engine.run("create temporary table job (id uuid)")
        engine.run("create temporary table queue (name text)")
        engine.send()
    engine.run("create temporary table job (id uuid)")
    engine.send()
    assert engine.value("select count(*) from jobqueue.job") == 1
