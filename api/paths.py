"""Which path a request means, found word by word: one look per segment, however many paths there are.

Starlette tries its routes one after the other; `/jobs/{id}` was the eleventh, which cost 35 us, a sixth of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from starlette.datastructures import URLPath
from starlette.routing import BaseRoute, Match, NoMatchFound, Route
from starlette.types import Receive, Scope, Send


@dataclass(eq=False, slots=True)
class _Place:
    """What may follow some segments: fixed words, anything else, or nothing (`route`, with the names in its path)."""

    words: dict[str, _Place] = field(default_factory=dict)
    other: _Place | None = None
    route: Route | None = None
    names: tuple[str, ...] = ()

    def find(self, segments: Sequence[str], at: int, values: list[str]) -> _Place | None:
        """Return the place of a path; fixed words win over `{…}`, whose values are added to `values`."""
        if at == len(segments):
            return self if self.route is not None else None
        segment = segments[at]
        word = self.words.get(segment)
        if word is not None and (found := word.find(segments, at + 1, values)) is not None:
            return found
        if self.other is None or not segment:
            return None
        values.append(segment)
        found = self.other.find(segments, at + 1, values)
        if found is None:
            values.pop()
        return found


class Paths(BaseRoute):
    """Many routes as one. Their endpoints are ASGI applications that know their methods; `{…}` is one segment."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Place()
        for route in routes:
            self._add(route)

    def _add(self, route: Route) -> None:
        place, names = self._root, list[str]()
        for segment in route.path.split("/")[1:]:
            if segment.startswith("{"):
                names.append(segment[1:-1])
                place.other = place.other or _Place()
                place = place.other
            else:
                place = place.words.setdefault(segment, _Place())
        assert place.route is None, f"two routes have the path {route.path}"
        place.route, place.names = route, tuple(names)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a path is one of these; the scope then has its route, endpoint and parameters."""
        if scope["type"] != "http":
            return Match.NONE, {}
        values: list[str] = []
        place = self._root.find(_segments_of(scope), 0, values)
        if place is None or place.route is None:
            return Match.NONE, {}
        parameters = {**scope.get("path_params", {}), **dict(zip(place.names, values, strict=True))}
        return Match.FULL, {"route": place.route, "endpoint": place.route.endpoint, "path_params": parameters}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request over to the endpoint that `matches` found."""
        await scope["endpoint"](scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: object) -> URLPath:
        """Raise NoMatchFound: paths of the API are in the operation table."""
        raise NoMatchFound(name, path_params)


def _segments_of(scope: Scope) -> list[str]:
    """The segments of the path below the place at which the application is mounted."""
    path: str = scope["path"]
    mounted_at: str = scope.get("root_path", "")
    is_below = bool(mounted_at) and path.startswith(f"{mounted_at}/")
    raw: bytes = scope.get("raw_path") or b""
    if b"%2F" in raw or b"%2f" in raw:
        # A slash within a name, such as the queue a/b: the decoded path does not tell it from others.
        segments = [unquote(segment) for segment in raw.decode("latin-1").partition("?")[0].split("/")]
        if "/".join(segments) == path:
            return segments[1 + mounted_at.count("/") * is_below :]
    return (path[len(mounted_at) :] if is_below else path).split("/")[1:]
