"""Scripts, styles and icons: served from memory under a path with their hash, so that browsers keep them for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES: Mapping[str, str] = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Files with other endings are not served."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file. `hash`: the first 16 digits of its SHA-256, which stand in its path."""

    name: str
    hash: str
    content: bytes
    media_type: str


@cache
def assets() -> Mapping[str, Asset]:
    """Return all files by name, `ui.css` or `vendor/htmx.min.js`; read once."""
    return {
        found.name: found
        for path in sorted(STATIC.rglob("*"))
        if path.suffix in MEDIA_TYPES
        for found in [_read(path.relative_to(STATIC).as_posix(), path)]
    }


def path_of(name: str) -> str:
    """Return a file's path below `/ui`. Raises KeyError if there is none of this name."""
    return f"/static/{assets()[name].hash}/{name}"


class Static:
    """ASGI application of `/ui/static/{hash}/{name}`; anybody may read it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path_params"]
        asset = assets().get(path["name"])
        if asset is None or asset.hash != path["hash"]:
            response = Response("There is no such file.", 404, media_type="text/plain")
        elif scope["method"] not in {"GET", "HEAD"}:
            response = Response(status_code=405, headers={"Allow": "GET, HEAD"})
        else:
            headers = {"Cache-Control": "public, max-age=31536000, immutable"}
            response = Response(asset.content, headers=headers, media_type=asset.media_type)
        await response(scope, receive, send)


def _read(name: str, path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(name, hashlib.sha256(content).hexdigest()[:16], content, MEDIA_TYPES[path.suffix])
