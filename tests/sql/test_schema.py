"""The schema explains itself, its snapshot is fresh, and every function of it is tested."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.sql.engine import Engine

ROOT = Path(__file__).parents[2]


def snapshot_script() -> ModuleType:
    """scripts/snapshot_schema.py as a module."""
    spec = importlib.util.spec_from_file_location("snapshot_schema", ROOT / "scripts" / "snapshot_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("JOBQUEUE_TEST_PG_BIN" in os.environ, reason="the snapshot is that of PostgreSQL 18")
def test_the_snapshot_of_the_schema_is_fresh(dsn: str) -> None:
    script = snapshot_script()
    fresh = script.take(dsn).splitlines()
    stored = script.SNAPSHOT.read_text().splitlines()
    assert fresh == stored, "sql/schema.sql is stale: run scripts/snapshot-schema and review the difference"


def test_the_schema_and_every_table_view_and_sequence_of_it_have_a_comment(engine: Engine) -> None:
    assert engine.value("select obj_description('jobqueue'::regnamespace, 'pg_namespace')")
    missing = engine.values(
        "select oid::regclass::text from pg_class c where relnamespace = 'jobqueue'::regnamespace "
        "and obj_description(oid, 'pg_class') is null "
        "and (relkind in ('r', 'v') or relkind = 'S' and not exists "
        "(select from pg_depend d where d.objid = c.oid and d.deptype = 'i')) order by 1"
    )
    assert missing == [], "add them to sql/comments/"


def test_every_table_can_be_published(engine: Engine) -> None:
    without_identity = engine.values("""
        select c.relname::text from pg_class c
        where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'p') and c.relpersistence = 'p'
            and c.relreplident = 'd' and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)
    """)
    assert without_identity == [], "a publication for all tables would keep their rows from being changed"


def test_every_column_has_a_comment(engine: Engine) -> None:
    missing = engine.values(
        "select c.relname || '.' || a.attname from pg_class c join pg_attribute a on a.attrelid = "
        "c.oid and a.attnum > 0 "
        "where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'v') and not a.attisdropped "
        "and col_description(c.oid, a.attnum) is null order by 1"
    )
    assert missing == [], "add them to sql/comments/"


def test_every_function_has_a_comment(engine: Engine) -> None:
    missing = engine.values(
        "select oid::regprocedure::text from pg_proc where pronamespace = 'jobqueue'::regnamespace "
        "and obj_description(oid, 'pg_proc') is null order by 1"
    )
    assert missing == [], "add them to sql/comments/"


def test_every_trigger_and_every_named_rule_has_a_comment(engine: Engine) -> None:
    missing = engine.values(
        "select tgname::text from pg_trigger t join pg_class c on c.oid = t.tgrelid where "
        "c.relnamespace = 'jobqueue'::regnamespace "
        "and not tgisinternal and obj_description(t.oid, 'pg_trigger') is null union all "
        "select conname::text from pg_constraint where connamespace = 'jobqueue'::regnamespace and contype = 'c' "
        "and obj_description(oid, 'pg_constraint') is null"
    )
    assert missing == [], "add them to sql/comments/"


def test_every_function_is_called_by_a_test_directly_or_through_another(engine: Engine) -> None:
    bodies = {
        row["proname"]: row["prosrc"]
        for row in engine.rows(
            "select proname, string_agg(prosrc, ' ') as prosrc from pg_proc where pronamespace = "
            "'jobqueue'::regnamespace group by 1"
        )
    }
    said = words("tests")
    # routes call these by name, and the tests of the routes do not name them
    said |= {word for word in words("api") if word.startswith("http_")}
    ruled = " ".join(
        engine.values("select pg_get_triggerdef(t.oid) from pg_trigger t where tgrelid = 'jobqueue.job'::regclass")
        + engine.values(
            "select pg_get_expr(polqual, polrelid) from pg_policy where polrelid = 'jobqueue.job'::regclass"
        )
        + engine.values("select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = 'jobqueue.job'::regclass")
        + engine.values("select pg_get_constraintdef(oid) from pg_constraint where conrelid = 'jobqueue.job'::regclass")
    )
    called = bodies.keys() & (said | calls(ruled))
    todo = set(called)
    while todo:
        found = bodies.keys() & calls(bodies[todo.pop()]) - called
        called |= found
        todo |= found
    assert sorted(bodies.keys() - called) == []


def calls(text: str) -> set[str]:
    """Every word before an opening parenthesis."""
    return set(re.findall(r"\b(\w+)\s*\(", text))


def words(folder: str) -> set[str]:
    """Every word in the Python files of a folder."""
    return {word for file in (ROOT / folder).rglob("*.py") for word in re.findall(r"\w+", file.read_text())}
