"""Pages as a browser without scripts sees them: their forms, links and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode

import httpx2
import psycopg

from jobqueue.keys import Key

Connection = psycopg.Connection[tuple[Any, ...]]

OWN = {"Sec-Fetch-Site": "same-origin"}
"""What a browser says with a form of ours."""
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(slots=True)
class Form:
    """A form: where it is sent, its fields as they are filled in, and the fields that must be."""

    method: str
    action: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    required: set[str] = field(default_factory=set)


class Page(HTMLParser):
    """A page: every element with its attributes, the text, the forms."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.forms: list[Form] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "form":
            self.forms.append(Form(attributes.get("method") or "get", attributes.get("action") or ""))
        elif tag == "input" and self.forms and attributes.get("type") != "checkbox" and attributes.get("name"):
            self.forms[-1].fields.append((attributes["name"] or "", attributes.get("value") or ""))
            if "required" in attributes:
                self.forms[-1].required.add(attributes["name"] or "")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        """All that can be read."""
        return " ".join(self.words)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The elements of a tag with these attributes."""
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]

    def enabled(self) -> list[str]:
        """What can be pressed to act: links to actions, and buttons that are not disabled."""
        links = [found.get("href") or "" for found in self.all("a") if "data-dialog" in found]
        buttons = [str(found.get("value")) for found in self.all("button", name="action") if "disabled" not in found]
        return links + buttons


async def see(client: httpx2.AsyncClient, path: str, status: int = 200, **options: Any) -> Page:
    """A page of the dashboard; it has the status that is expected."""
    answer = await client.get("/ui" + path, **options)
    assert answer.status_code == status, (answer.status_code, answer.text[:2000])
    return Page(answer.text)


async def press(client: httpx2.AsyncClient, form: Form, **filled: str) -> httpx2.Response:
    """Send a form as a browser does, with fields filled in; no redirect is followed."""
    fields = [(name, filled.get(name, value)) for name, value in form.fields]
    fields += [(name, value) for name, value in filled.items() if name not in dict(form.fields)]
    return await client.post(form.action, content=urlencode(fields), headers={**OWN, **FORM})


async def log_in(client: httpx2.AsyncClient, key: Key) -> httpx2.Response:
    """Show a key; the client keeps the session's cookie."""
    (form,) = (await see(client, "/login")).forms
    answer = await press(client, form, key=key.text)
    assert answer.status_code == 303, answer.text
    return answer


def job_of(connection: Connection, options: str = "{}", queue: str = "q", payload: str = "{}") -> str:
    """Send a job and return its id."""
    row = connection.execute(
        "select s.id::text from jobqueue.send(%s, %s::jsonb, %s::jsonb) s", (queue, payload, options)
    ).fetchone()
    assert row is not None
    return str(row[0])


def fail_next(connection: Connection, error: str = '{"class": "permanent", "message": "no"}') -> str:
    """Claim the next job of `q` and let it fail; its id."""
    row = connection.execute(
        "select id::text, claim_token::text from jobqueue.claim(array['q'], gen_random_uuid(), 1)"
    ).fetchone()
    assert row is not None
    connection.execute("select jobqueue.fail(%s, %s, %s::jsonb)", (*row, error))
    return str(row[0])
