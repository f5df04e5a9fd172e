"""How handlers are called, and what is refused when they are registered."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from pydantic import BaseModel

from jobqueue.errors import Cancelled, ConfigurationError, InvalidArgument, InvalidInput, UnknownOption
from jobqueue.handlers import Handler, ResultInvalid, make_handler
from jobqueue.job import Job, current_job
from jobqueue.null_job import NullJob


class Model(BaseModel):
    path: str
    at: datetime | None = None


@dataclass
class Data:
    path: str


async def takes_nothing() -> Any:
    return "nothing"


async def takes_job(job: Job) -> Any:
    return job


async def takes_optional_job(job: Job | None = None) -> Any:
    return job


async def takes_dict(payload: dict[str, Any]) -> Any:
    return payload


async def takes_both(job: Job, payload: Model) -> Any:
    return payload


async def takes_both_reversed(payload: Data, job: Job) -> Any:
    return payload


async def takes_untyped(job, payload):  # type: ignore[no-untyped-def]
    return payload


def blocking(payload: Model) -> Any:
    return payload


async def takes_jobs(jobs: list[Job]) -> Any:
    return [job.payload for job in jobs]


def run(function: Callable[..., Any], payload: Any) -> Any:
    handler = make_handler(function)
    result = handler.invoke(NullJob(payload))
    return asyncio.run(result) if handler.executor == "async" else result


def test_every_shape_of_call() -> None:
    given = {"path": "."}
    assert run(takes_nothing, given) == "nothing"
    assert run(takes_job, given).payload == given
    assert run(takes_optional_job, given).payload == given
    assert run(takes_dict, given) == given
    assert run(takes_both, given) == Model(path=".")
    assert run(takes_both_reversed, given) == Data(path=".")
    assert run(takes_untyped, given) == given
    assert run(blocking, given) == Model(path=".")
    assert run(takes_jobs, given) == [given]


def test_types_that_are_local_to_a_function_are_found() -> None:
    from jobqueue import App

    class Local(BaseModel):
        size: int

    app = App()

    @app.job("local")
    async def handler(payload: Local) -> None: ...

    assert app.registry["local"].payload.validated('{"size": 3}') == Local(size=3)


@pytest.mark.parametrize("function", [takes_both, takes_both_reversed, blocking, takes_dict])
def test_a_bad_payload_is_invalid_input_when_it_runs(function: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="payload of") as caught:
        run(function, ["no", "object"])
    assert caught.value.code == "INVALID_PAYLOAD"


def test_a_bad_payload_never_shows_its_values() -> None:
    with pytest.raises(InvalidArgument) as caught:
        make_handler(takes_both).payload.encode({"path": {"password": "secret"}})
    assert "secret" not in str(caught.value)
    assert "path" in str(caught.value)


def test_the_job_is_the_current_one_in_its_handler() -> None:
    seen = []

    def handler(job: Job) -> None:
        seen.append(current_job() is job)

    context = contextvars.Context()
    context.run(make_handler(handler).invoke, NullJob())
    assert seen == [True]
    assert context.run(current_job) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": "thread"}, "async def"),
        ({"executor": "fiber"}, "no executor"),
        ({"batch_size": 5}, "list\\[Job\\]"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_contradictions_are_refused_at_registration(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_handler(takes_job, **arguments)


def test_a_signature_that_cannot_be_served_is_refused() -> None:
    async def three(job: Job, one: dict[str, Any], two: dict[str, Any]) -> None: ...

    with pytest.raises(TypeError, match="takes 3 arguments"):
        make_handler(three)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownOption) as caught:
        make_handler(takes_job, options={"max_retry": 3})
    assert "max_retries" in (caught.value.hint or "")


def test_a_label_must_be_one_that_the_database_renders_too() -> None:
    with pytest.raises(TypeError, match="label"):
        make_handler(takes_both, label="{payload.path:>10}")
    handler = make_handler(takes_both, label="Indexing: {payload.path}{metadata.mode}")
    assert handler.display_name('{"path":"src"}', None) == "Indexing: src"
    assert make_handler(takes_both, label=lambda p, m: p.path.upper()).display_name('{"path":"src"}', {}) == "SRC"


def test_results_become_json_or_are_refused() -> None:
    handler: Handler = make_handler(takes_job)
    assert handler.encode_result(None) is None
    assert handler.encode_result({"a": Model(path="x")}) == '{"a":{"path":"x","at":null}}'
    assert handler.encode_result("\\u0000") == '"\\\\u0000"'
    for bad in (float("nan"), "a\0b", "\ud800", object(), {"deep": b"bytes"}):
        with pytest.raises(ResultInvalid) as caught:
            handler.encode_result(bad)
        assert caught.value.code == "RESULT_INVALID"


def test_a_process_handler_must_be_importable() -> None:
    def local() -> None: ...

    assert make_handler(blocking, executor="process").reference == f"{__name__}:blocking"
    with pytest.raises(ConfigurationError, match="top of a module"):
        _ = make_handler(local, executor="process").reference


async def test_a_handler_works_without_a_job() -> None:
    async def handler(job: Job | None, pages: list[int]) -> list[int]:
        job = job or NullJob()
        seen: list[int] = []
        async with job.stage("ocr", of=2) as stage:
            assert not stage.done
            seen += [page async for page in job.remaining(pages, key=str)]
        chunks = job.chunks(2)
        async for index in chunks:
            async with chunks.chunk(index, pages=(1, 25)):
                await job.progress(index, 2, "working")
        async with chunks.merging():
            await job.checkpoint("merged", {"pages": len(seen)})
        return seen

    assert await handler(None, [1, 2, 3]) == [1, 2, 3]


def test_the_blocking_form_works_without_a_job_and_without_a_loop() -> None:
    job = NullJob()
    with job.sync.stage("scan") as stage:
        stage.save({"files": 1})
        assert list(job.sync.track(["a", "b"], message="{number}/{total}")) == ["a", "b"]
    chunks = job.sync.chunks(2)
    for index in chunks:
        with chunks.chunk(index):
            job.sync.progress(index, 2)
    assert stage.output == {"files": 1}


async def test_the_blocking_form_refuses_to_block_the_loop() -> None:
    with pytest.raises(RuntimeError, match="await job"):
        NullJob().sync.progress(1, 2)


async def test_every_call_raises_once_a_cancel_was_asked_for() -> None:
    job = NullJob()
    job.deliver("cancel")
    job.deliver("pause")
    assert job.cancel_requested
    with pytest.raises(Cancelled):
        await job.progress(1, 2)


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_payloads_that_were_not_decoded_yet(kind: Callable[[bytes], Any]) -> None:
    raw = kind(b'{"path": "src"}')
    assert run(takes_both, raw) == Model(path="src")
    assert run(takes_dict, raw) == {"path": "src"}
