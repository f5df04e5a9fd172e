"""Who is let in: keys, tokens, an application's own users; and nobody from elsewhere as long as there are no keys."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from jobqueue.api import create_app
from jobqueue.api.app import OPERATIONS
from jobqueue.api.authenticators import TRUSTED_SECONDS, first_of
from jobqueue.api.identity import SCOPES, Principal
from jobqueue.api.operations import Operation
from jobqueue.errors import ConfigurationError
from jobqueue.keys import make_key, parse_key
from jobqueue.settings import load_settings
from tests.api.conftest import serving
from tests.support.api_keys import bearer, create_key, forget_keys
from tests.support.command import run
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
UNKNOWN = "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"


def path_of(operation: Operation) -> str:
    """A path of an operation; nothing of its name exists."""
    return operation.path.replace("{id}", UNKNOWN).replace("{name}", "nothing")


async def ask(client: httpx2.AsyncClient, operation: Operation, **options: Any) -> httpx2.Response:
    """A request of an operation, with an empty body where one may be."""
    body = {"json": {}} if operation.request else {}
    return await client.request(operation.method, path_of(operation), **body, **options)


def challenge(answer: httpx2.Response) -> tuple[int, str]:
    """Status and WWW-Authenticate of a refusal."""
    return answer.status_code, answer.headers.get("WWW-Authenticate", "")


# -- Without keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "host", "status"),
    [
        ("127.0.0.1", "localhost:8000", 404),
        ("127.0.0.1", "127.0.0.1:8000", 404),
        ("::1", "[::1]:8000", 404),
        ("::ffff:127.0.0.1", "app.localhost", 404),
        ("192.0.2.7", "localhost", 403),
        ("2001:db8::1", "localhost", 403),
        # a foreign page whose own name was pointed here, or a proxy in front
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "evil.example:8000", 403),
    ],
)
async def test_without_keys_only_this_machine_under_its_own_name_is_answered(
    dsn: str, address: str, host: str, status: int
) -> None:
    app = create_app(load_settings(dsn=dsn))
    transport = httpx2.ASGITransport(app=app, client=(address, 5000))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get(f"/jobs/{UNKNOWN}", headers={"Host": host})
        assert answer.status_code == status
        assert (await client.get("/livez", headers={"Host": host})).status_code == 200
    await app.state.services.database.close()


async def test_as_soon_as_a_key_exists_every_route_but_the_probes_needs_one(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    assert (await client.post("/jobs", json={"queue": "q"})).status_code == 202
    key = create_key(connection, scopes=["admin"], tenants=["*"])
    assert TRUSTED_SECONDS <= 1
    deadline = time.monotonic() + 60
    while (await client.get(f"/jobs/{UNKNOWN}")).status_code != 401:
        assert time.monotonic() < deadline, "the key takes no effect"
        await asyncio.sleep(0.02)
    for operation in OPERATIONS:
        if operation.is_probe:
            assert (await ask(client, operation)).status_code == 200
        else:
            assert challenge(await ask(client, operation)) == (401, 'Bearer realm="jobqueue"'), operation.name
    assert (await client.get("/livez", headers=bearer("nonsense"))).status_code == 200
    assert (await client.post("/jobs", json={"queue": "q"}, headers=bearer(key))).status_code == 202
    connection.execute("select jobqueue.revoke_api_key(%s, 'the last one')", (key.id,))
    forget_keys(client)
    assert (await client.get(f"/jobs/{UNKNOWN}")).status_code == 401, "revoking the last key must not open the server"


# -- Keys -------------------------------------------------------------------------------------------------------------


def test_a_mistyped_key_is_known_by_its_checksum() -> None:
    key = make_key()
    assert parse_key(key.text) == key
    assert key.text not in repr(key)
    last = "0" if key.text[-1] != "0" else "1"
    swapped = key.text[:20] + key.text[21] + key.text[20] + key.text[22:]
    for wrong in (key.text[:-1] + last, key.text[:-1], key.text + "0", key.text.upper(), "", "jq_", swapped):
        if wrong != key.text:
            assert parse_key(wrong) is None, wrong


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ([("Authorization", "Basic dTpw")], None),
        ([("Authorization", "Bearer")], "invalid_request"),
        ([("Authorization", "Bearer jq_abc")], "invalid_token"),
        ([("Authorization", "Bearer " + make_key().text)], "invalid_token"),
        ([("Authorization", "Bearer eyJ0.eyJ0.x")], "invalid_token"),
        ([("Authorization", "Bearer " + "x" * 20_000)], "invalid_token"),
        ([("Authorization", "Bearer a"), ("Authorization", "Bearer b")], "invalid_request"),
    ],
)
async def test_what_is_no_key_is_401_and_says_why(
    dsn: str, connection: Connection, headers: list[tuple[str, str]], error: str | None
) -> None:
    create_key(connection)
    async with serving(dsn) as client:
        answer = await client.get(f"/jobs/{UNKNOWN}", headers=headers)
    expected = 'Bearer realm="jobqueue"' + (f', error="{error}"' if error else "")
    assert challenge(answer) == (401, expected)
    assert answer.json()["error"]["code"] == "UNAUTHORIZED"


async def test_each_operation_asks_for_its_scope_and_admin_holds_all(dsn: str, connection: Connection) -> None:
    keys = {scope: create_key(connection, scopes=[scope], tenants=["*"]) for scope in SCOPES}
    async with serving(dsn) as client:
        for operation in OPERATIONS:
            if operation.is_probe or operation.is_stream:
                continue
            for scope, key in keys.items():
                answer = await ask(client, operation, headers=bearer(key))
                allowed = not operation.scopes or scope in operation.scopes or scope == "admin"
                refused = answer.status_code == 403 and "needs the scope" in answer.text
                assert refused is not allowed, (operation.name, scope, answer.text)
                assert answer.status_code != 401
                if refused:
                    assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


async def test_a_key_ends_when_it_is_revoked_expires_or_was_rotated_long_enough_ago(
    dsn: str, connection: Connection
) -> None:
    revoked, expiring, rotated = (create_key(connection, expires_in=expires) for expires in (None, 3600, None))
    fresh = make_key(rotated.id)
    async with serving(dsn) as client:

        async def status(key: Any) -> int:
            forget_keys(client)
            return (await client.get(f"/jobs/{UNKNOWN}", headers=bearer(key))).status_code

        assert [await status(key) for key in (revoked, expiring, rotated, fresh)] == [404, 404, 404, 401]
        connection.execute("select jobqueue.revoke_api_key(%s, 'leaked')", (revoked.id,))
        connection.execute("update jobqueue.api_key set expires_at = now() where id = %s", (expiring.id,))
        connection.execute("select jobqueue.rotate_api_key(%s, %s, '1 hour')", (fresh.id, fresh.hash))
        assert [await status(key) for key in (revoked, expiring, rotated, fresh)] == [401, 401, 404, 404]
        connection.execute("update jobqueue.api_key set previous_until = now() where id = %s", (fresh.id,))
        assert [await status(rotated), await status(fresh)] == [401, 404]
        connection.execute("select jobqueue.rotate_api_key(%s, %s, '0')", (rotated.id, rotated.hash))
        assert [await status(rotated), await status(fresh)] == [404, 401]
        refused = await client.get(f"/jobs/{UNKNOWN}", headers=bearer(revoked))
        assert "was revoked" in refused.json()["error"]["message"]
        live = [
            value(connection, "select jobqueue.api_key_is_live(%s)", (key.id,)) for key in (revoked, expiring, fresh)
        ]
        assert live == [False, False, True]
    told = rows(connection, "select action, target, reason from jobqueue.audit where action like '%%_key' order by id")
    assert ("revoke_key", revoked.id, "leaked") in told
    assert [action for action, target, _ in told if target == rotated.id] == ["create_key", "rotate_key", "rotate_key"]
    with pytest.raises(psycopg.Error, match="was revoked"):
        connection.execute("select jobqueue.rotate_api_key(%s, %s)", (revoked.id, revoked.hash))


async def test_an_unknown_key_is_looked_up_once_until_any_key_changes(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_key(connection)
    stranger = make_key()
    async with serving(dsn) as client:
        database = client.app.state.services.database  # type: ignore[attr-defined]
        run, looks = database.rows, []

        async def note(query: str, *arguments: Any, **options: Any) -> Any:
            looks.append("find_api_key" in query)
            return await run(query, *arguments, **options)

        monkeypatch.setattr(database, "rows", note)

        async def ask() -> set[int]:
            answers = [client.get("/jobs", headers=bearer(stranger)) for _ in range(5)]
            return {answer.status_code for answer in await asyncio.gather(*answers)}

        assert (await ask(), await ask(), sum(looks)) == ({401}, {401}, 1)
        # let in at last: at once, not after the second for which it is believed that no key has changed
        connection.execute("select jobqueue.create_api_key(%s, %s)", (stranger.id, stranger.hash))
        assert (await ask(), sum(looks)) == ({200}, 2)


def test_a_change_by_hand_is_noticed_and_a_mere_use_is_not(connection: Connection) -> None:
    """The trigger api_key_changed raises the version that API processes look at."""
    state = "select version, any_keys from jobqueue.api_keys_state()"
    assert rows(connection, state) == [(0, False)]
    key = create_key(connection)
    assert rows(connection, state) == [(1, True)]
    connection.execute("select * from jobqueue.find_api_key(%s, %s)", (key.id, key.hash))
    connection.execute("update jobqueue.api_key set name = 'another'")
    assert rows(connection, state) == [(1, True)]
    live = "select jobqueue.api_key_is_live(%s)"
    assert value(connection, live, (key.id,))
    assert value(connection, live, ("jwt:https://id.example:ann",)), "who a token names ends with the token"
    connection.execute("update jobqueue.api_key set name = name, expires_at = null, scopes = '{admin}'")
    connection.execute("delete from jobqueue.api_key")
    assert rows(connection, state) == [(3, False)]


async def test_keys_are_stored_as_hashes_and_a_thousand_requests_are_not_a_thousand_writes(
    dsn: str, connection: Connection
) -> None:
    key = create_key(connection)
    assert key.text not in str(rows(connection, "select * from jobqueue.api_key"))
    assert value(connection, "select last_used_at is null from jobqueue.api_keys")
    version = "select xmin::text from jobqueue.api_key"
    async with serving(dsn) as client:
        await client.get(f"/jobs/{UNKNOWN}", headers=bearer(key))
        assert value(connection, "select last_used_at > now() - interval '1 min' from jobqueue.api_keys")
        written = value(connection, version)
        for _ in range(20):
            forget_keys(client)
            await client.get(f"/jobs/{UNKNOWN}", headers=bearer(key))
        assert value(connection, version) == written
    connection.execute("update jobqueue.api_key set last_used_at = now() - interval '61 s'")
    async with serving(dsn) as client:
        await client.get(f"/jobs/{UNKNOWN}", headers=bearer(key))
    assert value(connection, "select last_used_at > now() - interval '1 min' from jobqueue.api_keys")


async def test_created_by_is_the_subject_and_another_needs_act_as_or_admin(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    plain, named, acting, admin = (
        create_key(connection),
        create_key(connection, subject="ann"),
        create_key(connection, subject="bot", act_as=True),
        create_key(connection, subject="root", scopes=["admin"]),
    )
    expected: list[tuple[Any, Any, Any]] = [
        (plain, None, None),
        (plain, "ann", 403),
        (named, None, "ann"),
        (named, "ann", "ann"),
        (named, "eve", 403),
        (acting, None, "bot"),
        (acting, "eve", "eve"),
        (admin, None, "root"),
        (admin, "eve", "eve"),
    ]
    async with serving(dsn) as client:
        for key, given, result in expected:
            job = {"queue": "q"} if given is None else {"queue": "q", "created_by": given}
            one = await client.post("/jobs", json=job, headers=bearer(key))
            many = await client.post("/jobs", json={"jobs": [{"queue": "q"}, job]}, headers=bearer(key))
            if result == 403:
                assert (one.status_code, many.status_code) == (403, 403), (given, one.text)
            else:
                assert one.json()["created_by"] == many.json()["data"][1]["created_by"] == result


def test_the_command_prints_the_secret_once_and_only_on_stdout(dsn: str, connection: Connection) -> None:
    made = run("keys", "create", "--name", "ci", "--tenant", "a,b", "--scope", "jobs:read", "--quota", 5, dsn=dsn)
    key = parse_key(made.stdout.strip())
    assert made.returncode == 0
    assert key is not None
    assert key.text not in made.stderr
    (listed,) = json.loads(run("keys", "list", "-o", "json", dsn=dsn).stdout)
    assert (listed["name"], listed["tenants"], listed["scopes"]) == ("ci", ["a", "b"], ["jobs:read"])
    assert [listed[f"quota_{bucket}"] for bucket in ("reads", "writes", "streams")] == [5, 5, 5]
    assert "hash" not in str(listed)
    rotated = parse_key(json.loads(run("keys", "rotate", key.id, "-o", "json", dsn=dsn).stdout)["key"])
    assert rotated is not None
    assert (rotated.id, rotated.text != key.text) == (key.id, True)
    assert run("keys", "revoke", rotated.text, "--reason", "over", dsn=dsn).returncode == 0
    assert json.loads(run("keys", "list", "-o", "json", dsn=dsn).stdout) == []
    assert "revoked" in run("keys", "list", "--all", dsn=dsn).stdout
    admin = parse_key(run("keys", "create", "--scope", "admin", "--expires-in", "90 days", dsn=dsn).stdout.strip())
    assert admin is not None
    query = "select tenants::text, expires_at - created_at from jobqueue.api_keys where id = %s"
    ((tenants, lasts),) = rows(connection, query, (admin.id,))
    assert (tenants, lasts.days) == ("{*}", 90)
    assert run("keys", "revoke", "nobody00", "-r", "x", dsn=dsn).returncode == 3
    assert run("keys", "create", "--scope", "everything", dsn=dsn).returncode == 2
    assert run("keys", "create", "--tenant", "a", "--tenant", "*", dsn=dsn).returncode == 2


async def test_no_secret_reaches_the_log(dsn: str, connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    key = create_key(connection)
    with caplog.at_level(logging.DEBUG):
        async with serving(dsn) as client:
            await client.get(f"/jobs/{UNKNOWN}?ticket=geheim", headers=bearer(key))
            await client.get("/jobs", headers=bearer(key.text[:-1]))
    # not what the client logs
    logged = "".join(str(vars(record)) for record in caplog.records if record.name.startswith("jobqueue"))
    assert f"/jobs/{UNKNOWN} 400" in logged
    assert f"by {key.id}" in logged
    assert key.text[14:40] not in logged
    assert "geheim" not in logged


# -- Tokens -----------------------------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> str:
    """The public half of a key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())


def token(key: Any = RSA, algorithm: str = "RS256", kid: str | None = None, **claims: Any) -> str:
    """A token of the provider; `claims` replace the right ones, None takes one away."""
    right = {"iss": "https://id.example", "aud": "jobs", "sub": "ann", "exp": time.time() + 600}
    right |= {"tenants": ["default"], "scope": "jobs:read jobs:write openid"} | claims
    content = {name: claim for name, claim in right.items() if claim is not None}
    return jwt.encode(content, key, algorithm, headers={"kid": kid} if kid else None)


@asynccontextmanager
async def serving_tokens(dsn: str, file: Path, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """The API with tokens of https://id.example for jobs."""
    given = {"jwt_key_file": file, "jwt_issuer": "https://id.example", "jwt_audience": "jobs", **settings}
    async with serving(dsn, given) as client:
        yield client


async def test_a_token_counts_only_if_it_is_whole_meant_for_us_and_in_its_time(
    dsn: str, connection: Connection, tmp_path: Path
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    file = tmp_path / "key.pem"
    file.write_text(pem(RSA))
    unsigned = jwt.encode(
        {"iss": "https://id.example", "aud": "jobs", "sub": "x", "exp": time.time() + 9}, None, "none"
    )
    bad = {
        "another key": token(OTHER_RSA),
        "another issuer": token(iss="https://evil.example"),
        "another audience": token(aud="mail"),
        "over": token(exp=time.time() - 60),
        "not yet": token(nbf=time.time() + 600),
        "no end": token(exp=None),
        "no subject": token(sub=None),
        "no audience": token(aud=None),
        "empty subject": token(sub=""),
        "no signature": unsigned,
        "public key as shared secret": hs256_with(pem(RSA)),
        "another algorithm": token(algorithm="RS512"),
        "cut": token()[:-5],
        "too long": token(x="y" * 9000),
    }
    async with serving_tokens(dsn, file) as client:
        # with tokens there is no open door, even without any key
        assert (await client.get(f"/jobs/{UNKNOWN}")).status_code == 401
        for what, text in bad.items():
            answer = await client.get(f"/jobs/{UNKNOWN}", headers=bearer(text))
            assert challenge(answer) == (401, 'Bearer realm="jobqueue", error="invalid_token"'), what
        sent = await client.post("/jobs", json={"queue": "q"}, headers=bearer(token()))
        assert (sent.status_code, sent.json()["created_by"]) == (202, "ann")
        # what a token does not grant
        assert (await client.post(f"/jobs/{UNKNOWN}/cancel", headers=bearer(token()))).status_code == 403
        assert (await client.post("/jobs", json={"queue": "q"}, headers=bearer(token(scope=None)))).status_code == 403
        path = f"/jobs/{sent.json()['id']}"
        for tenants, status in (
            ("a default", 200),
            ([], 404),
            (None, 404),
            (["*"], 404),
            (["a,default"], 404),
            (7, 404),
        ):
            assert (await client.get(path, headers=bearer(token(tenants=tenants)))).status_code == status, tenants
        everything = token(tenants=["*"], scope="admin")
        assert (await client.get(path, headers=bearer(everything))).status_code == 200
        # beside tokens, keys go on
        assert (await client.get(path, headers=bearer(create_key(connection)))).status_code == 200


def hs256_with(public: str) -> str:
    """A token signed with the public key as if it were a shared secret; PyJWT itself refuses to make one."""
    import base64
    import hashlib
    import hmac

    def part(content: bytes) -> bytes:
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    claims = {"iss": "https://id.example", "aud": "jobs", "sub": "eve", "exp": time.time() + 600}
    body = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode()) + b"." + part(json.dumps(claims).encode())
    return (body + b"." + part(hmac.digest(public.encode(), body, hashlib.sha256))).decode()


async def test_the_key_of_a_token_is_chosen_by_its_kid_and_the_file_may_change(dsn: str, tmp_path: Path) -> None:
    def jwks(**keys: Any) -> str:
        to_jwk: Callable[..., Any] = jwt.algorithms.ECAlgorithm.to_jwk
        return json.dumps({"keys": [{**to_jwk(key.public_key(), True), "kid": kid} for kid, key in keys.items()]})

    second = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "jwks.json"
    file.write_text(jwks(one=EC, two=second))

    async with serving_tokens(dsn, file, jwt_algorithms=("ES256",)) as client:

        async def status(key: Any, kid: str | None) -> int:
            headers = bearer(token(key, "ES256", kid))
            return (await client.get(f"/jobs/{UNKNOWN}", headers=headers)).status_code

        assert [await status(EC, "one"), await status(second, "two")] == [404, 404]
        assert [await status(EC, "two"), await status(EC, "three"), await status(EC, None)] == [401, 401, 401]
        third = ec.generate_private_key(ec.SECP256R1())
        file.write_text(jwks(third=third, again=EC) + "\n")
        assert [await status(third, "third"), await status(second, "two")] == [404, 401]
        file.write_text("half a fi")
        assert await status(third, "third") == 404, "a broken file must not lock everybody out"


@pytest.mark.parametrize(
    "settings",
    [
        {"jwt_issuer": None},
        {"jwt_audience": None},
        {"jwt_algorithms": ("none",)},
        {"jwt_algorithms": ("RS256", "HS256")},
        {"jwt_algorithms": ()},
        {"jwt_algorithms": ("HS256",)},
        {"jwt_key_file": Path("/nonexistent")},
    ],
)
def test_settings_that_would_let_in_what_was_not_meant_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    file = tmp_path / "key.pem"
    file.write_text(pem(RSA))
    given = {"jwt_key_file": file, "jwt_issuer": "i", "jwt_audience": "a"} | settings
    loaded = load_settings().model_copy(update=given)
    with pytest.raises(ConfigurationError):
        create_app(loaded)


# -- An application's own users ---------------------------------------------------------------------------------------


async def test_an_application_mounts_the_api_and_says_who_asks(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")

    async def by_header(asking: HTTPConnection) -> Principal | None:
        user = asking.headers.get("x-user")
        scopes = frozenset({"jobs:read", "jobs:write"})
        return Principal(key=f"user:{user}", subject=user, tenants="acme", scopes=scopes) if user else None

    async def nobody(asking: HTTPConnection) -> Principal | None:
        return None

    inner = create_app(load_settings(dsn=dsn), authenticator=first_of(nobody, by_header))
    outer = Starlette(routes=[Mount("/queue", inner)])
    transport = httpx2.ASGITransport(app=outer)
    async with httpx2.AsyncClient(transport=transport, base_url="http://www.example.com") as client:
        assert (await client.get(f"/queue/jobs/{UNKNOWN}")).status_code == 401
        sent = await client.post("/queue/jobs", json={"queue": "q"}, headers={"X-User": "ann"})
        assert (sent.status_code, sent.json()["created_by"], sent.json()["tenant"]) == (202, "ann", "acme")
        assert sent.headers["Location"] == sent.json()["links"]["self"] == f"/queue/jobs/{sent.json()['id']}"
        assert (
            await client.get(f"/queue/admin/jobs/{sent.json()['id']}", headers={"X-User": "ann"})
        ).status_code == 403
    await inner.state.services.database.close()
