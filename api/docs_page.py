"""`GET /docs`: the OpenAPI document as one page. No script, nothing from elsewhere; its style is named by its hash."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from typing import Any

from starlette.responses import Response

from jobqueue.api.context import Call

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem 1.5rem 4rem;color:#1b1f24;background:#fff}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #d0d7de;text-transform:capitalize}
details{border:1px solid #d0d7de;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}summary{cursor:pointer}
code,pre{font:14px/1.4 ui-monospace,monospace}pre{background:#f6f8fa;padding:.6rem;overflow:auto}
b.method{display:inline-block;min-width:4.5rem;color:#0a5}table{border-collapse:collapse}
th,td{text-align:left;vertical-align:top;padding:.15rem 1rem .15rem 0}nav a{margin-right:1rem;text-transform:capitalize}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}pre{background:#161b22}
h2,details{border-color:#30363d}a{color:#58a6ff}b.method{color:#3fb950}}
"""
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{_HASH}'"

BEGIN = "All paths begin with <code>"


async def get_docs(call: Call) -> Response:
    """Answer with the page."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    # Mounted in another application, paths begin with its path for us.
    mounted_at = escape(call.scope.get("root_path", ""))
    page = call.scope["app"].state.docs.replace(BEGIN, BEGIN + mounted_at, 1)
    return Response(page, headers=headers, media_type="text/html; charset=utf-8")


def build_page(document: dict[str, Any]) -> str:
    """Return the page of an OpenAPI document; routes under a tenant are named once, beside their twins."""
    groups: dict[str, list[str]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if not operation["operationId"].endswith("OfTenant"):
                groups[operation["tags"][0]].append(_operation(document, path, method.upper(), operation))
    info = document["info"]
    links = " ".join(f'<a href="#{escape(tag)}">{escape(tag)}</a>' for tag in groups)
    sections = "".join(f'<h2 id="{escape(tag)}">{escape(tag)}</h2>{"".join(rows)}' for tag, rows in groups.items())
    base = escape(document["servers"][0]["url"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} HTTP API</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} HTTP API</h1><p>{escape(info['description'])}</p>"
        f'<p>{BEGIN}{base}</code>. The same as data: <a href="openapi.json">openapi.json</a>.</p>'
        f"<nav>{links}</nav><main>{sections}</main></body></html>"
    )


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    twin = f"/{_tenant_segment(document)}/{{tenant}}{path}"
    parts = [_paragraph(operation.get("description", ""))]
    if twin in document["paths"]:
        parts.append(f"<p>Also under a tenant: <code>{escape(twin)}</code></p>")
    if scopes := operation.get("x-scopes"):
        parts.append(f"<p>Scope: <code>{escape(' or '.join(scopes))}</code></p>")
    parts.append(_table("Parameters", map(_parameter, operation["parameters"])))
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        examples = content.get("examples", {})
        parts += [f"<p>{escape(name)}:</p><pre>{_json(shown['value'])}</pre>" for name, shown in examples.items()]
    parts.append(_table("Answers", (_reply(document, *pair) for pair in operation["responses"].items())))
    title = f'<b class="method">{method}</b> <code>{escape(path)}</code> {escape(operation["summary"])}'
    return f'<details id="{escape(operation["operationId"])}"><summary>{title}</summary>{"".join(parts)}</details>'


def _tenant_segment(document: dict[str, Any]) -> str:
    found = next((path for path in document["paths"] if path.split("/")[2:3] == ["{tenant}"]), "/tenants/")
    return str(found.split("/")[1])


def _parameter(parameter: dict[str, Any]) -> tuple[str, str, str]:
    return parameter["name"], parameter["in"], parameter.get("description", "")


def _reply(document: dict[str, Any], status: str, reply: dict[str, Any]) -> tuple[str, str, str]:
    if "$ref" in reply:
        reply = document["components"]["responses"][reply["$ref"].rsplit("/", 1)[1]]
    return status, ", ".join(reply.get("headers", {})), reply["description"]


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><th><code>{escape(name)}</code></th><td>{escape(place)}</td><td>{escape(text)}</td></tr>"
        for name, place, text in rows
    )
    return f"<p><b>{title}</b></p><table>{cells}</table>" if cells else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _json(value: Any) -> str:
    return escape(json.dumps(value, indent=2, ensure_ascii=False))
