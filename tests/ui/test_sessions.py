"""Who is let in: login and logout, what ends a session, and whose pages may send something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import psycopg
import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from jobqueue.api import create_app, streams
from jobqueue.api.identity import Principal
from jobqueue.api.ui import sessions
from jobqueue.keys import make_key
from jobqueue.settings import load_settings
from tests.api.conftest import serving
from tests.api.test_streams import streaming, until
from tests.support.api_keys import create_key, forget_keys
from tests.support.server import rows, value
from tests.ui.pages import FORM, OWN, job_of, log_in, press, see

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def client(dsn: str, connection: Connection) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the dashboard with the queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as client:
        yield client


async def test_a_browser_shows_its_key_once_and_stays_logged_in_until_it_logs_out(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    key = create_key(connection, scopes=["jobs:read"], tenants=["acme"], subject="anna")
    forget_keys(client)
    answer = await client.get("/ui/jobs?status=failed&queue=q")
    assert (answer.status_code, answer.headers["Location"]) == (
        303, "/ui/login?next=%2Fjobs%3Fstatus%3Dfailed%26queue%3Dq",
    )  # fmt: skip
    (form,) = (await see(client, "/login?next=%2Fjobs%3Fstatus%3Dfailed")).forms
    for wrong in ("", "nonsense", key.text[:-1], make_key().text):
        answer = await press(client, form, key=wrong)
        assert answer.status_code == 401
        assert "is not let in" in answer.text
        assert "set-cookie" not in answer.headers
        assert not wrong or wrong not in answer.text, "what was typed may be a key"
    answer = await press(client, form, key=f" {key.text}\n")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/jobs?status=failed")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{sessions.COOKIE}=")
    for attribute in ("HttpOnly", "SameSite=strict", "Path=/ui;", "expires="):
        assert attribute in cookie + ";", cookie
    assert "Secure" not in cookie, "over plain HTTP a browser would not keep it"
    token = client.cookies[sessions.COOKIE]
    stored = rows(connection, "select encode(hash, 'hex'), key_id, encode(key_hash, 'hex') from jobqueue.ui_session")
    assert len(stored) == 1
    assert stored[0][1:] == (key.id, key.hash.hex())
    assert token not in str(stored)
    await log_in(client, key)
    assert client.cookies[sessions.COOKIE] != token
    assert value(connection, "select count(*) from jobqueue.ui_session") == 1, "a new login ends the session before"
    page = await see(client, "/jobs")
    assert "anna" in page.text
    (form,) = page.forms[:1]
    assert form.action == "/ui/logout"
    assert "Log out" in (await see(client, "/logout")).text
    answer = await press(client, form)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/login?done=logout")
    assert "You are logged out." in (await see(client, "/login?done=logout")).text
    assert value(connection, "select count(*) from jobqueue.ui_session") == 0
    client.cookies.set(sessions.COOKIE, token, path="/ui")
    assert (await client.get("/ui/jobs")).status_code == 303, "the token of a session that was ended"


async def test_a_session_ends_with_its_key_and_with_its_time(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    keys = [create_key(connection, tenants=["*"], scopes=["admin"]) for _ in range(4)]
    forget_keys(client)
    revoked, rotated, expired, old = keys
    endings = {
        revoked: f"select jobqueue.revoke_api_key('{revoked.id}', 'lost')",
        rotated: f"select jobqueue.rotate_api_key('{rotated.id}', sha256('x'), interval '0')",
        expired: f"update jobqueue.api_key set expires_at = now() where id = '{expired.id}'",
        old: "update jobqueue.ui_session set expires_at = now()",
    }
    for key, ending in endings.items():
        await log_in(client, key)
        assert (await client.get("/ui/jobs")).status_code == 200
        connection.execute("update jobqueue.ui_session set last_used_at = now() - interval '5 min'")
        assert (await client.get("/ui/jobs")).status_code == 200
        assert value(connection, "select max(last_used_at) > now() - interval '1 min' from jobqueue.ui_session")
        connection.execute(ending)
        answer = await client.get("/ui/jobs")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/login?next=%2Fjobs"), ending
        stream = await client.get("/ui/live", headers={"Accept": "text/event-stream"})
        assert stream.status_code == 401, "a stream is no page and is not sent to one"
    assert rows(connection, "select * from jobqueue.find_ui_session(sha256('unknown'))") == []
    fresh = create_key(connection, expires_in=3600)
    lasts = "select jobqueue.start_ui_session(sha256('a'), %s, %s, interval '2 hours') < now() + interval '61 min'"
    assert connection.execute(lasts, (fresh.id, fresh.hash)).fetchone() == (True,), "it lasts no longer than its key"
    assert value(connection, "select count(*) from jobqueue.ui_session where expires_at <= now()") == 0, "cleared away"
    connection.execute("select jobqueue.end_ui_session(sha256('a'))")


async def test_a_page_hears_what_changes_until_its_session_ends(
    client: httpx2.AsyncClient, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    key = create_key(connection, tenants=["acme"], scopes=["jobs:read"])
    forget_keys(client)
    await log_in(client, key)
    cookie = {"Cookie": f"{sessions.COOKIE}={client.cookies[sessions.COOKIE]}"}
    ours, theirs = job_of(connection, '{"tenant": "acme"}'), job_of(connection, '{"tenant": "other"}')
    async with streaming(client.app, "/ui/live", cookie) as stream:  # type: ignore[attr-defined]
        await stream.next("resync")
        await until(lambda: stream.comments > 3, "it is still let in at each beat")
        connection.execute("select jobqueue.cancel(id, 'r') from jobqueue.job where id in (%s, %s)", (theirs, ours))
        heard = []
        while not heard:
            name, data, *_ = await stream.next()
            heard = data if name == "jobs" else []
        assert [job["id"] for job in heard] == [ours]
        connection.execute("delete from jobqueue.ui_session")
        await asyncio.wait_for(stream.ended.wait(), 60)


async def test_the_cookie_is_for_the_dashboard_only(client: httpx2.AsyncClient, connection: Connection) -> None:
    key = create_key(connection, tenants=["*"], scopes=["admin"])
    forget_keys(client)
    await log_in(client, key)
    cookie = {"Cookie": f"{sessions.COOKIE}={client.cookies[sessions.COOKIE]}"}
    assert (await client.get("/ui/jobs", headers=cookie)).status_code == 200
    for path in ("/jobs", "/queues", "/events"):
        assert (await client.get(path, headers=cookie)).status_code == 401, path
    assert (await client.get("/ui/jobs", headers={"Authorization": f"Bearer {key.text}"})).status_code == 200
    secure = httpx2.ASGITransport(app=client.app)  # type: ignore[attr-defined]
    async with httpx2.AsyncClient(transport=secure, base_url="https://test") as over_tls:
        assert "; Secure" in (await log_in(over_tls, key)).headers["set-cookie"]


async def test_only_a_page_of_ours_may_send_something(client: httpx2.AsyncClient, connection: Connection) -> None:
    job = job_of(connection)
    sends = [
        (200, {"Sec-Fetch-Site": "same-origin"}),
        (200, {"Sec-Fetch-Site": "same-origin", "Origin": "null"}),
        (200, {"Origin": "http://test"}),
        (403, {}),
        (403, {"Referer": "http://test/ui/jobs"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "https://test"}),
        (403, {"Origin": "http://test:8000"}),
        (403, {"Origin": "http://test.evil.example"}),
        (403, {"Sec-Fetch-Site": "none"}),
        (403, {"Sec-Fetch-Site": "same-site", "Origin": "http://test"}),
        (403, {"Sec-Fetch-Site": "cross-site", "Origin": "http://test"}),
        (403, {"Sec-Fetch-Site": "same-origin, cross-site"}),
        (403, {"Sec-Fetch-Site": ""}),
    ]
    for path, content in ((f"/ui/jobs/{job}/cancel", ""), ("/ui/bulk", f"action=cancel&id={job}"), ("/ui/logout", "")):
        for expected, headers in sends:
            answer = await client.post(path, content=content, headers={**FORM, **headers})
            let_in = answer.status_code in {303, 422}
            assert let_in == (expected == 200), (path, headers, answer.status_code)
            assert let_in or answer.status_code == 403
    twice = [*FORM.items(), ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")]
    assert (await client.post("/ui/logout", headers=twice)).status_code == 403
    assert value(connection, "select status from jobqueue.job") == "pending"


async def test_forms_are_read_within_bounds(client: httpx2.AsyncClient, connection: Connection) -> None:
    path = f"/ui/jobs/{job_of(connection)}/cancel"
    for status, headers, content in (
        (415, {"Content-Type": "application/json"}, "{}"),
        (413, FORM, "reason=" + "x" * 1_100_000),
        (422, FORM, "reason=%00"),
        (422, FORM, "&".join(f"a{n}=1" for n in range(2100))),
        (422, FORM, "reason=" + "x" * 2001),
        (422, FORM, "reason=%FF"),
    ):
        answer = await client.post(path, content=content, headers={**OWN, **headers})
        assert answer.status_code == status, (status, answer.text[-500:])
    assert (await client.put(path, headers=OWN)).status_code == 405
    assert (await client.post("/ui/jobs", headers={**OWN, **FORM})).status_code == 405
    assert value(connection, "select status from jobqueue.job") == "pending"


async def test_after_login_nobody_is_led_elsewhere(client: httpx2.AsyncClient, connection: Connection) -> None:
    key = create_key(connection)
    forget_keys(client)
    (form,) = (await see(client, "/login")).forms
    for given in (
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nX: y",
        "/../elsewhere",
        "/%2E%2e/elsewhere",
        "",
    ):
        location = (await press(client, form, key=key.text, next=given)).headers["Location"]
        assert location.startswith("/ui/"), (given, location)
        assert "\n" not in location
        assert "elsewhere" not in location
    # parameters have any name
    location = (await press(client, form, key=key.text, next="/jobs?path=1&self=2")).headers["Location"]
    assert location == "/ui/jobs?path=1&self=2"


async def test_an_application_that_knows_its_users_has_no_login_here(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    connection.execute('select jobqueue.send(\'q\', \'{}\', \'{"display_name": "theirs", "tenant": "acme"}\')')
    key = create_key(connection, tenants=["*"], scopes=["admin"])

    async def by_header(request: HTTPConnection) -> Principal | None:
        user = request.headers.get("x-user")
        return (
            None if user is None else Principal(key=user, subject=user, tenants="acme", scopes=frozenset({"jobs:read"}))
        )

    inner = create_app(load_settings(dsn=dsn, api_prefix="/v1"), authenticator=by_header)
    app = Starlette(routes=[Mount("/queue", inner)])
    transport = httpx2.ASGITransport(app=app)
    async with inner.router.lifespan_context(inner):
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/queue/v1/ui/jobs", headers={"X-User": "ben"})
            assert answer.status_code == 200
            assert "theirs" in answer.text
            assert 'href="/queue/v1/ui/jobs' in answer.text, "links hold where it is mounted"
            assert "Log out" not in answer.text
            assert (await client.get("/queue/v1/ui/jobs")).status_code == 401
            assert (await client.get("/queue/v1/ui/login")).status_code == 404
            form = {"key": key.text}
            posted = await client.post("/queue/v1/ui/login", data=form, headers=OWN)
            assert posted.status_code == 404, "keys are not what this application lets in"
            answer = await client.get("/queue/v1/ui", headers={"X-User": "ben"})
            assert (answer.status_code, answer.headers["Location"]) == (307, "/queue/v1/ui/")


async def test_without_keys_only_this_machine_is_answered(dsn: str, connection: Connection) -> None:
    app = create_app(load_settings(dsn=dsn))
    for address, status in (("127.0.0.1", 200), ("192.0.2.7", 403)):
        transport = httpx2.ASGITransport(app=app, client=(address, 5000))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/ui/jobs")
            assert answer.status_code == status
            assert "Without an API key" in answer.text or status == 200
    await app.state.services.database.close()
