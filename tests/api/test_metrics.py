"""`GET /metrics`: who may read it, what it costs, that all processes say the same; rules and dashboard use what is there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import prometheus_client.values
import psycopg
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.values import MultiProcessValue

from jobqueue.api import meter, metrics
from jobqueue.api.meter import Meter
from jobqueue.api.metrics import HELP, KEPT_SECONDS
from jobqueue.api.server import common_numbers
from tests.api.conftest import send, serving, start_job
from tests.support.api_keys import bearer, create_key, forget_keys
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "jobqueue.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "jobqueue.json"
OPEN = {"Accept": "application/openmetrics-text; version=1.0.0"}


async def scrape(client: httpx2.AsyncClient, path: str = "/metrics") -> Samples:
    """All samples of a scrape that reads the database anew."""
    numbers = client.app.state.numbers  # type: ignore[attr-defined]
    numbers._expires = 0.0
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    found = [sample for family in parse_text(answer.text) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


def of(samples: Samples, name: str, **labels: str) -> float:
    """One sample, by its name without the prefix."""
    return samples["jobqueue_" + name, tuple(sorted(labels.items()))]


def emitted(samples: Samples) -> set[str]:
    """The names of all samples."""
    return {name for name, _ in samples}


def finish_one(connection: Connection) -> None:
    """Complete the next job of `q`."""
    connection.execute("select jobqueue.complete(%s, %s)", start_job(connection))


async def test_it_needs_the_scope_or_the_setting_and_costs_no_quota(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"api_prefix": "/api"}) as client:
        assert (await client.get("/metrics")).status_code == 200
        key = create_key(connection, scopes=["metrics"], quota_reads=1)
        other = create_key(connection, scopes=["jobs:read", "jobs:write", "jobs:act"], tenants=["*"])
        forget_keys(client)
        for path in ("/metrics", "/api/metrics"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer(other))).status_code == 403
            assert (await client.get(path, headers=bearer(key))).status_code == 200
            assert (await client.head(path, headers=bearer(key))).status_code == 200
        assert value(connection, "select coalesce(sum(used), 0) from jobqueue.quota_use") == 0
        assert (await client.get("/metrics?x=1", headers=bearer(key))).status_code == 400
    async with serving(dsn, {"metrics_public": True}) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/jobs")).status_code == 401


async def test_both_formats_are_valid_and_every_number_is_explained(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    await send(client, tenant="secret-tenant", subject="secret-subject", job_type='odd "type"\n\\')
    finish_one(connection)
    plain, opened = await client.get("/metrics"), await client.get("/metrics", headers=OPEN)
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert opened.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "secret" not in plain.text
    families = {family.name: family for family in parse_text(plain.text)}
    assert families.keys() == {family.name for family in parse_open(opened.text)}
    labels = families["jobqueue_jobs_finished"].samples[0].labels
    assert labels == {"queue": "q", "job_type": 'odd "type"\n\\', "outcome": "completed"}
    kinds = {name: family.type for name, family in families.items()}
    assert (kinds["jobqueue_job_status_transitions"], kinds["jobqueue_job_duration_seconds"], kinds["jobqueue_jobs"]) == (
        "counter", "histogram", "gauge",
    )  # fmt: skip
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        assert not {"tenant", "id", "subject"} & {label for sample in family.samples for label in sample.labels}
    database = {name.removeprefix("jobqueue_") for name in families if "_http_" not in name and "_api_" not in name}
    assert database == {name.removesuffix("_total") for name in HELP}
    bounds = [
        sample.labels["le"] for sample in families["jobqueue_job_duration_seconds"].samples if "le" in sample.labels
    ]
    assert bounds[:7] == ["0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0"]
    assert bounds[-2:] == ["3600.0", "+Inf"]


async def test_counters_are_the_same_from_every_process_and_survive_it(
    client: httpx2.AsyncClient, dsn: str, connection: Connection
) -> None:
    for _ in range(3):
        await send(client)
        finish_one(connection)
    before = await scrape(client)
    assert of(before, "job_status_transitions_total", **{"from": "pending", "to": "processing"}) == 3
    assert of(before, "jobs_finished_total", queue="q", job_type="q", outcome="completed") == 3
    assert of(before, "job_duration_seconds_count", queue="q", job_type="q") == 3
    assert of(before, "job_wait_seconds_bucket", queue="q", le="+Inf") == 3
    connection.execute("select * from jobqueue.maintain(null, '{fold_statistics}')")
    connection.execute("delete from jobqueue.job")
    async with serving(dsn) as other:
        after = await scrape(other)
        counted = ("_total", "_bucket", "_count", "_sum")
        for key, number in before.items():
            if key[0].endswith(counted) and "_http_" not in key[0]:
                assert after[key] == pytest.approx(number), key


async def test_scrapes_at_once_ask_the_database_once_and_its_answer_is_kept(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    calls = 0
    numbers = client.app.state.numbers  # type: ignore[attr-defined]
    ask = numbers._ask

    async def counted() -> Any:
        nonlocal calls
        calls += 1
        return await ask()

    numbers._ask = counted
    answers = await asyncio.gather(*(client.get("/metrics") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert calls == 1
    await send(client)
    kept = await client.get("/metrics")
    assert 'jobqueue_jobs_ready{queue="q"} 0.0' in kept.text
    assert calls == 1
    assert numbers._expires <= asyncio.get_running_loop().time() + KEPT_SECONDS
    assert of(await scrape(client), "jobs_ready", queue="q") == 1
    assert calls == 2


async def test_a_database_that_does_not_answer_is_said_and_own_numbers_are_there(
    client: httpx2.AsyncClient, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "STATEMENT_SECONDS", 0.1)
    with psycopg.connect(dsn) as blocking:
        blocking.execute("lock table jobqueue.total")
        samples = await scrape(client)
    assert of(samples, "database_up") == 0
    assert "jobqueue_jobs_ready" not in emitted(samples)
    assert "jobqueue_http_streams" in emitted(samples)
    monkeypatch.setattr(metrics, "STATEMENT_SECONDS", 5.0)
    assert of(await scrape(client), "database_up") == 1


async def test_requests_are_counted_by_route_template_and_waits_are_not_timed(client: httpx2.AsyncClient) -> None:
    for _ in range(2):
        job = await send(client)
        await client.get(f"/jobs/{job}")
        await client.get(f"/tenants/default/jobs/{job}")
    await client.get(f"/jobs/{job}?wait=0.05")
    await client.get("/nowhere/at/all")
    await client.get("/jobs/none")
    samples = await scrape(client)
    assert of(samples, "http_requests_total", method="POST", route="/jobs", code="202") == 2
    assert of(samples, "http_requests_total", method="GET", route="/jobs/{id}", code="200") == 3
    assert of(samples, "http_requests_total", method="GET", route="/jobs/{id}", code="404") == 1
    assert of(samples, "http_requests_total", method="GET", route="/tenants/{tenant}/jobs/{id}", code="200") == 2
    assert of(samples, "http_requests_total", method="GET", route="other", code="404") == 1
    assert of(samples, "http_request_duration_seconds_count", method="GET", route="/jobs/{id}") == 3
    assert of(samples, "api_pool_connections", state="idle") >= 1
    assert (of(samples, "http_streams"), of(samples, "http_long_polls")) == (0, 0)


def test_several_processes_count_together_and_the_gauges_of_dead_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(meter.FILES_VARIABLE, str(tmp_path))
    # The parent of all processes lives; no process has the highest number there can be.
    for pid in (1, 2**22 + 1):
        monkeypatch.setattr(prometheus_client.values, "ValueClass", MultiProcessValue(lambda pid=pid: pid))
        counting = Meter()
        counting.count({"method": "GET", "query_string": b""}, 200, 0.02)
        counting._streams.set(3)
        foreign = prometheus_client.Counter("of_the_host_application", "Not ours.", registry=None)
        foreign.inc()
    found = {sample.name: sample.value for metric in counting.metrics() for sample in metric.samples}
    assert found["jobqueue_http_requests_total"] == 2
    assert found["jobqueue_http_request_duration_seconds_count"] == 2
    assert found["jobqueue_http_streams"] == 3
    assert all(name.startswith("jobqueue_") for name in found)


async def test_a_process_that_is_not_scraped_says_what_it_holds(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(meter.FILES_VARIABLE, raising=False)
    monkeypatch.setattr(meter, "LOOK_SECONDS", 0.01)
    with common_numbers():
        directory = Path(os.environ[meter.FILES_VARIABLE])
        assert directory.is_dir()
        with common_numbers():
            assert os.environ[meter.FILES_VARIABLE] == str(directory)
        async with serving(dsn) as client:
            held = client.app.state.meter._connections  # type: ignore[attr-defined]
            async with asyncio.timeout(60):
                while not any(sample.value for metric in held.collect() for sample in metric.samples):
                    await asyncio.sleep(0.005)
    assert not directory.exists()
    assert meter.FILES_VARIABLE not in os.environ


# -- What is deployed with it -----------------------------------------------------------------------------------------


def names_in(expression: str) -> set[str]:
    """The metrics of an expression; `jobqueue:` are recording rules."""
    return set(re.findall(r"\bjobqueue[_:][a-z0-9_:]+", expression))


async def test_rules_and_dashboard_use_only_what_a_scrape_has(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    await send(client)
    finish_one(connection)
    await client.get("/jobs")
    known = emitted(await scrape(client))
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    known |= {rule["record"] for rule in rules if "record" in rule}
    assert {"jobqueue_job_status_transitions_total", "jobqueue_job_duration_seconds_bucket"} <= known
    for rule in rules:
        used = names_in(rule["expr"])
        assert used, rule
        assert used <= known, rule["expr"]
        if "alert" in rule:
            assert len(rule["annotations"]["runbook"].split()) > 10, rule["alert"]
            assert rule["labels"]["severity"] in ("page", "ticket", "info")
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    expressions += [
        variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"
    ]
    used = {name for expression in expressions for name in names_in(expression)}
    assert used <= known, used - known
    # and it shows what there is
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    there = {re.sub("_(bucket|sum|count)$", "", name) for name in known if ":" not in name}
    assert there - shown <= {"jobqueue_build_info"}, there - shown
    panels = [panel["gridPos"] for panel in board["panels"]]
    assert len({(spot["x"], spot["y"]) for spot in panels}) == len(panels)


async def test_functions_that_runbooks_name_exist(connection: Connection) -> None:
    text = RULES.read_text()
    functions = set(re.findall(r"jobqueue\.(\w+)\(", text))
    views = set(re.findall(r"from jobqueue\.(\w+)(?!\w|\()", text))
    have = "select count(distinct proname) from pg_proc where pronamespace = 'jobqueue'::regnamespace and proname = any (%s)"
    assert value(connection, have, [list(functions)]) == len(functions) > 5
    have = "select count(*) from pg_class where relnamespace = 'jobqueue'::regnamespace and relname = any (%s)"
    assert value(connection, have, [list(views)]) == len(views)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: package prometheus) is not installed")
@pytest.mark.parametrize("command", [("check", "rules", RULES.name), ("test", "rules", "jobqueue.rules.test.yml")])
def test_the_rules_are_valid_and_fire_when_they_should(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
