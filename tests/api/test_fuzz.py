"""Every route is asked with what its own document allows, and with what it does not: never a 5xx, never another form.

`JOBQUEUE_TEST_FUZZ_EXAMPLES` sets how many requests each kind of test makes (100).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from jobqueue.api.app import OPERATIONS
from jobqueue.api.openapi import build_document
from jobqueue.api.operations import Operation
from tests.api.conftest import serving
from tests.support.api_keys import bearer, create_key
from tests.support.json_strategies import TEXTS, changed, to_bytes, values_of
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]

EXAMPLES = int(os.environ.get("JOBQUEUE_TEST_FUZZ_EXAMPLES", "100"))
DOCUMENT = json.loads(json.dumps(build_document(OPERATIONS)))
ASKED = [operation for operation in OPERATIONS if not operation.is_stream]
RAW = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"queue": "q", "payload": ' + b"[" * 300,
    b'{"a": 1} x',
    b"NaN",
    b'"\\ud800"',
)
fuzzing = partial(
    settings,
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True, slots=True)
class Target:
    """An application with jobs in it, and the loop that it runs in."""

    runner: asyncio.Runner
    client: httpx2.AsyncClient
    connection: Connection
    validators: dict[tuple[str, str, str], Draft202012Validator] = field(default_factory=dict)

    def ask(self, method: str, url: str, **options: Any) -> httpx2.Response:
        """The answer to one request."""
        return self.runner.run(self.client.request(method, url, **options))

    def jobs(self) -> list[str]:
        """Jobs in several statuses, made anew when the requests have deleted them."""
        found = [str(job) for (job,) in self.connection.execute("select id from jobqueue.job limit 20").fetchall()]
        if len(found) < 4:
            make_jobs(self.connection)
            return self.jobs()
        return found

    def job_count(self) -> int:
        """How many jobs are stored."""
        return int(value(self.connection, "select count(*) from jobqueue.job"))


def make_jobs(connection: Connection) -> None:
    """One failed, one delayed, one paused, one pending."""
    claimed = "(select * from jobqueue.claim(array['q'], gen_random_uuid(), 1)) c"
    connection.execute("select jobqueue.send('q')")
    connection.execute(
        f'select jobqueue.fail(c.id, c.claim_token, \'{{"class": "permanent"}}\') from {claimed}'.encode()
    )
    connection.execute("select jobqueue.pause(s.id, 'to have one') from jobqueue.send('q') s")
    connection.execute("select jobqueue.send('q', '{}', '{\"delay\": 100}'), jobqueue.send('q')")


@pytest.fixture
def target(dsn: str, connection: Connection) -> Iterator[Target]:
    """The API with a job in several statuses; the key may use tenants default and a."""
    connection.execute("select jobqueue.create_queue('q', '{\"keep_completed\": 0}')")
    key = create_key(connection, scopes=["admin"], tenants=["default", "a"], subject="ann")
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(serving(dsn, {"api_access_log": False})))
        client.headers.update(bearer(key))
        yield Target(runner, client, connection)
        runner.run(stack.aclose())


def path_parts() -> st.SearchStrategy[str | int]:
    """What may stand for an id or a name in a path; a number stands for one of the jobs."""
    odd = TEXTS.filter(lambda text: text not in {"", ".", ".."} and "/" not in text and "\ud800" not in text)
    real = st.integers(0, 5)
    return st.one_of(real, real, st.sampled_from(("q", "default")), st.uuids().map(str), odd)


def queries(operation: Operation) -> st.SearchStrategy[dict[str, str]]:
    """Query parameters, mostly known ones."""
    texts = TEXTS.filter(lambda text: "\ud800" not in text)
    known = {parameter.name: _texts_of(parameter.name, parameter.example, texts) for parameter in operation.query}
    if not known:
        return st.sampled_from(({}, {}, {}, {}, {"odd": "1"}, {"\0": "x"}))
    one = st.sampled_from(sorted(known)).flatmap(lambda name: known[name].map(lambda text: {name: text}))
    two = st.builds(lambda first, second: first | second, one, one)
    return st.one_of(st.just({}), one, one, two, st.builds(lambda few, more: few | more, one, st.just({"odd": "1"})))


def _texts_of(name: str, example: Any, texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    if name == "wait":
        return st.sampled_from(("0", "0.01", "-1", "soon", "1e9"))
    numbers = st.integers(-2, 10**12).map(str)
    times = st.sampled_from(("2030-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "infinity", "2030-13-01T00:00:00Z"))
    right = st.just(str(1 if example is None else example))
    return st.one_of(right, right, texts, numbers, times)


def check(target: Target, operation: Operation, answer: httpx2.Response, *, tenant: bool) -> None:
    """No 5xx; a documented status; a body of the documented form."""
    shown = (
        operation.name,
        str(answer.request.url),
        answer.request.content[:300],
        answer.status_code,
        answer.text[:600],
    )
    assert answer.status_code < 500, shown
    path = ("/tenants/{tenant}" if tenant else "") + operation.path
    replies = DOCUMENT["paths"][path][operation.method.lower()]["responses"]
    status = str(answer.status_code)
    assert status in replies or answer.status_code in {414, 431}, shown
    if status not in replies or not answer.content:
        return
    reply = replies[status]
    reply = DOCUMENT["components"]["responses"][reply["$ref"].rpartition("/")[2]] if "$ref" in reply else reply
    media = answer.headers["Content-Type"].split(";")[0]
    assert media in reply.get("content", {"application/json": {}}), shown
    if "json" not in media:
        return
    key = (path, operation.method, status)
    if key not in target.validators:
        schema = reply.get("content", {}).get("application/json", {}).get("schema", {})
        target.validators[key] = Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    # who asks for some fields only gets no others
    partial_job = "fields" in answer.request.url.params
    found = target.validators[key].iter_errors(answer.json())
    problem = next((error for error in found if not (partial_job and error.validator == "required")), None)
    assert problem is None, (*shown, problem.message, list(problem.absolute_path))


def test_every_route_answers_as_its_document_says(target: Target) -> None:
    @fuzzing()
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(ASKED))
        tenant = (
            data.draw(st.sampled_from(("", "", "", "", "default", "default", "a", "b"))) if operation.of_tenant else ""
        )
        path = operation.path
        for name in ("{id}", "{name}"):
            if name in path:
                part = data.draw(path_parts())
                known = target.jobs() if isinstance(part, int) else []
                path = path.replace(name, known[part % len(known)] if isinstance(part, int) else quote(part, safe=""))
        options: dict[str, Any] = {"params": data.draw(queries(operation)), "headers": data.draw(heads(operation))}
        if operation.request:
            options["content"] = to_bytes(data.draw(bodies(operation)))
            options["headers"]["Content-Type"] = "application/json"
        before = target.job_count()
        answer = target.ask(operation.method, (f"/tenants/{tenant}" if tenant else "") + path, **options)
        check(target, operation, answer, tenant=bool(tenant))
        if answer.status_code >= 400:
            assert target.job_count() == before, "something of a refused request was stored"

    ask()


def bodies(operation: Operation) -> st.SearchStrategy[Any]:
    """Bodies: those of the document's examples with a little changed, and those of its schemas."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in operation.request]
    examples = [{"queue": "q"}] if operation.name == "sendJob" else list(operation.request_examples.values())
    near = [changed(example, schemas[0], DOCUMENT) for example in examples]
    return st.one_of(st.sampled_from(examples or [{}]), *near, values_of({"anyOf": schemas}, DOCUMENT))


def heads(operation: Operation) -> st.SearchStrategy[dict[str, str]]:
    """Headers that the operation knows, with odd values."""
    texts = st.one_of(
        st.sampled_from(("*", 'W/"1-0"', '"', 'W/"', "a" * 300, "k")), st.text("abc-\"'*/ ,", max_size=20)
    )
    given_names = {parameter.name: texts.map(str.strip) for parameter in operation.headers}
    return st.fixed_dictionaries({}, optional={**given_names, "Accept": st.just("application/problem+json")})


def test_bodies_that_are_no_json_or_have_another_type_are_refused_and_nothing_is_stored(target: Target) -> None:
    target.jobs()
    before = target.job_count()
    for operation in ASKED:
        if not operation.request:
            continue
        path = operation.path.replace("{id}", target.jobs()[0]).replace("{name}", "q")
        for raw in RAW:
            answer = target.ask(operation.method, path, content=raw, headers={"Content-Type": "application/json"})
            check(target, operation, answer, tenant=False)
            if raw or operation.request_required:
                assert 400 <= answer.status_code < 500, (operation.name, raw)
        answer = target.ask(operation.method, path, content=b"{}", headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415, operation.name
    assert target.job_count() == before


def test_other_methods_and_paths_are_refused_in_the_same_form(target: Target) -> None:
    for operation in ASKED:
        path = operation.path.replace("{id}", target.jobs()[0]).replace("{name}", "q")
        answer = target.ask("PROPFIND", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
        assert operation.method in answer.headers["Allow"]
    for path in ("/", "//jobs", "/jobs/", "/jobs/x/y/z", "/tenants/", "/%00"):
        answer = target.ask("GET", path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] in {"NOT_FOUND", "JOB_NOT_FOUND"}
