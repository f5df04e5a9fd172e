"""Keys of the HTTP API in a test's database."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import psycopg

from jobqueue.keys import Key, make_key

Connection = psycopg.Connection[tuple[Any, ...]]


def create_key(connection: Connection, **options: Any) -> Key:
    """Let a new key in; `options` are those of jobqueue.create_api_key."""
    key = make_key()
    connection.execute("select jobqueue.create_api_key(%s, %s, %s::jsonb)", (key.id, key.hash, json.dumps(options)))
    return key


def bearer(key: Key | str) -> dict[str, str]:
    """The header that a client with this key sends."""
    return {"Authorization": f"Bearer {key.text if isinstance(key, Key) else key}"}


def forget_keys(client: httpx2.AsyncClient) -> None:
    """Let the application look at once whether keys have changed, as it does every second by itself."""
    client.app.state.services.authenticate.keys._trusted_until = 0.0  # type: ignore[attr-defined]
