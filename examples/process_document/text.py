"""From pages to one text, and from the text to passages."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

PASSAGE_WORDS = 120
OVERLAP_WORDS = 20
"""A sentence on the border of two passages is whole in one of them."""
REPEATED_ON = 0.5
"""A first or last line that stands on more than half of the pages is a running head."""

_HYPHENATED = re.compile(r"(?<=[a-zà-ÿ])(?:-|\u00ad)\n(?=[a-zà-ÿ])")
_PAGE_NUMBER = re.compile(r"\W*\d{1,4}\W*")


@dataclass(frozen=True, slots=True)
class Merged:
    """The document as one text."""

    text: str
    page_starts: tuple[int, ...]
    """Where each page begins in the text."""

    def page_at(self, offset: int) -> int:
        """Return the page, from 1, that a place in the text belongs to."""
        return bisect_right(self.page_starts, offset) or 1


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the text, small enough to be one vector."""

    number: int
    first_page: int
    last_page: int
    text: str


def merge(pages: Sequence[str]) -> Merged:
    """Join pages: without running heads and page numbers, hyphenated words whole, a line per paragraph."""
    lines = [[line.strip() for line in page.splitlines() if line.strip()] for page in pages]
    heads = _repeated([page[0] for page in lines if page])
    feet = _repeated([page[-1] for page in lines if page])
    parts: list[str] = []
    starts: list[int] = []
    length = 0
    for page in lines:
        body = _body(page, heads, feet)
        starts.append(length)
        if body:
            parts.append(body)
            length += len(body) + 1
    return Merged("\n".join(parts), tuple(starts))


def split(merged: Merged) -> list[Passage]:
    """Cut a text into overlapping passages that know their pages."""
    words = list(re.finditer(r"\S+", merged.text))
    step = PASSAGE_WORDS - OVERLAP_WORDS
    found: list[Passage] = []
    for start in range(0, max(1, len(words) - OVERLAP_WORDS), step):
        part = words[start : start + PASSAGE_WORDS]
        if part:
            first, last = part[0].start(), part[-1].start()
            text = merged.text[first : part[-1].end()]
            found.append(Passage(len(found) + 1, merged.page_at(first), merged.page_at(last), text))
    return found


def _body(page: list[str], heads: set[str], feet: set[str]) -> str:
    if page and page[0] in heads:
        page = page[1:]
    if page and (page[-1] in feet or _PAGE_NUMBER.fullmatch(page[-1])):
        page = page[:-1]
    return _HYPHENATED.sub("", "\n".join(page)).replace("\n", " ")


def _repeated(lines: list[str]) -> set[str]:
    return {line for line, count in Counter(lines).items() if count > 1 and count > REPEATED_ON * len(lines)}
