"""jobqueue inside of a web application: its API under a prefix, its connections and a worker with its lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from jobqueue import App, SchemaOutdated
from jobqueue.api import create_app
from jobqueue.integrations.lifespan import lifespan
from jobqueue.settings import Settings
from tests.support.application import has, seen


def make_jobs(dsn: str) -> App:
    jobs = App(dsn)

    @jobs.job
    async def greet(payload: dict[str, Any]) -> str:
        return f"hello {payload['name']}"

    return jobs


@asynccontextmanager
async def running(web: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """The application as a server runs it: lifespan first, then requests."""
    async with web.router.lifespan_context(web):
        transport = httpx2.ASGITransport(web)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


async def check_mounted(client: httpx2.AsyncClient, jobs: App, prefix: str) -> None:
    """Whatever the API says about itself leads back to it, through the prefix."""
    sent = await client.post(f"{prefix}/jobs", json={"queue": "greet", "payload": {"name": "Ada"}})
    assert sent.status_code == 202, sent.text
    assert sent.headers["location"] == f"{prefix}/jobs/{sent.json()['id']}"
    await seen(jobs, sent.json()["id"], has("completed"))
    read = await client.get(sent.headers["location"])
    assert read.json()["result"] == "hello Ada"
    links = read.json()["links"]
    assert all(link.startswith(f"{prefix}/jobs/") for link in links.values())
    assert (await client.get(links["attempts"])).status_code == 200
    document = (await client.get(f"{prefix}/openapi.json")).json()
    assert document["servers"] == [{"url": prefix}]
    assert f"All paths begin with <code>{prefix}" in (await client.get(f"{prefix}/docs")).text
    assert (await client.get(f"{prefix}/readyz")).status_code == 200


async def test_fastapi_serves_the_api_under_a_prefix_and_works_on_its_jobs(dsn: str) -> None:
    jobs = make_jobs(dsn)
    api = create_app(Settings(start_timeout=60, api_create_queues=True), dsn=dsn)
    order: list[str] = []

    @asynccontextmanager
    async def mine(web: Any) -> AsyncIterator[dict[str, str]]:
        order.append("begins")
        yield {"shop": "open"}
        order.append("ends")

    web = FastAPI(lifespan=lifespan(jobs, api=api, worker={"concurrency": 2}, around=mine))
    web.mount("/shop/queue", api)

    @web.post("/greetings")
    async def greetings(name: str) -> dict[str, str]:
        return {"job": str((await jobs.send("greet", {"name": name})).id)}

    async with running(web) as client:
        assert order == ["begins"]
        await check_mounted(client, jobs, "/shop/queue")
        own = (await client.post("/greetings", params={"name": "Bob"})).json()["job"]
        assert (await seen(jobs, own, has("completed"))).result == "hello Bob"
    assert order == ["begins", "ends"]
    assert jobs._connections is not None
    assert jobs._connections._pool is None


async def test_starlette_does_too(dsn: str) -> None:
    jobs = make_jobs(dsn)
    api = create_app(Settings(start_timeout=60, api_prefix="/v1", api_create_queues=True), dsn=dsn)

    async def send(request: Request) -> JSONResponse:
        return JSONResponse({"job": str((await jobs.send("greet", {"name": "Eve"})).id)})

    routes = [Route("/send", send, methods=["POST"]), Mount("/queue", api)]
    web = Starlette(routes=routes, lifespan=lifespan(jobs, api=api, worker=True))
    async with running(web) as client:
        await check_mounted(client, jobs, "/queue/v1")


async def test_a_server_that_gives_up_waiting_gets_the_running_job_back_into_the_queue(dsn: str) -> None:
    jobs = App(dsn)
    begun, stopping = asyncio.Event(), asyncio.Event()
    jobs.on_worker_stopping(lambda worker: stopping.set())

    @jobs.job
    async def long() -> None:
        begun.set()
        await asyncio.sleep(600)

    web = Starlette(lifespan=lifespan(jobs, worker=True))
    entered, leave = asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with web.router.lifespan_context(web):
            entered.set()
            await leave.wait()

    task = asyncio.create_task(serve())
    async with asyncio.timeout(60):
        await entered.wait()
        sent = await jobs.send("long")
        await begun.wait()
        leave.set()
        await stopping.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.done()
    async with jobs:
        assert (await jobs.get(sent.id)).status == "pending"


async def test_a_missing_schema_is_found_at_the_start(empty_dsn: str) -> None:
    web = Starlette(lifespan=lifespan(App(empty_dsn)))
    with pytest.raises(SchemaOutdated, match="this program needs"):
        async with web.router.lifespan_context(web):
            pass
