"""Names of people and places in a text, and which of them mean the same person.

By rules, so that it needs no model: a name is a run of capitalized words that does not only begin a sentence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

TITLES = ("Mr", "Mrs", "Ms", "Miss", "Dr", "Prof", "Professor", "Captain", "Colonel", "Judge", "Lady", "Lord", "Sir")

_CAPITALIZED = r"[A-ZÀ-Ý][\w'\u2019]*"
# A dot ends a name, except after a title or an initial; so does the end of a page.
_NAME = re.compile(rf"\b(?:(?:{'|'.join(TITLES)}|[A-ZÀ-Ý])\.? |{_CAPITALIZED} )*{_CAPITALIZED}")
_BEFORE_A_SENTENCE = re.compile(r"(?:\A|\n|[.!?:][\"'\u201d\u2019)]?)\s*[\"'\u201c\u2018(]?$")
_OTHER_WORDS = """
    I I'm I've Dear Yours The This That These A An It He She We You They If On In At There Then When According Whoever
    January February March April May June July August September October November December
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
"""
_NO_NAMES = frozenset(_OTHER_WORDS.split())


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody, with all the names by which the text calls them."""

    name: str
    aliases: tuple[str, ...]
    passages: tuple[int, ...]
    """The numbers of the passages that name them."""


def find_names(text: str) -> list[str]:
    """Return the names in a text, each once, in alphabetical order."""
    found: set[str] = set()
    for match in _NAME.finditer(text):
        text_of_name = match[0].removesuffix("'s").removesuffix("\u2019s").replace(".", "")
        words = [word for word in text_of_name.split() if word not in _NO_NAMES]
        starts_sentence = _BEFORE_A_SENTENCE.search(text[max(0, match.start() - 4) : match.start()]) is not None
        if words and words[-1] not in TITLES and not (starts_sentence and len(words) == 1):
            found.add(" ".join(words))
    return sorted(found)


def resolve(passages: Mapping[str, set[int]]) -> list[Person]:
    """Put names together that mean the same person: `Dr Marsh`, `E Marsh`, `Eleanor` and `Eleanor Marsh`.

    `passages`: for each name the passages that have it. A short name that fits several full names stays on its own. Who is
    in most passages comes first.
    """
    full = {name for name in passages if len(_plain(name)) > 1 and not _is_initial(_plain(name)[0])}
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for name in full:
        words = _plain(name)
        parts[words[0]].add(" ".join(words))
        parts[words[-1]].add(" ".join(words))
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name in passages:
        names[_meant_by(name, parts)].add(name)
    people = [_person(meant, spoken, passages) for meant, spoken in names.items()]
    return sorted(people, key=lambda person: (-len(person.passages), person.name))


def _meant_by(name: str, parts: Mapping[str, set[str]]) -> str:
    words = _plain(name)
    if len(words) > 1 and not _is_initial(words[0]):
        return " ".join(words)
    if not words:
        return name
    candidates = parts.get(words[-1], set())
    if len(words) > 1:
        candidates = {full for full in candidates if full.startswith(words[0])}
    return next(iter(candidates)) if len(candidates) == 1 else " ".join(words)


def _person(meant: str, spoken: set[str], passages: Mapping[str, set[int]]) -> Person:
    everywhere = set().union(*(passages[name] for name in spoken))
    return Person(meant, tuple(sorted(spoken - {meant})), tuple(sorted(everywhere)))


def _plain(name: str) -> list[str]:
    return [word for word in name.split() if word not in TITLES]


def _is_initial(word: str) -> bool:
    return len(word) == 1
