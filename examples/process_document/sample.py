"""Makes the PDF that the example is tried with: the letters about a globe, a page each. `fpdf2` draws it."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

from fpdf import FPDF

TITLE = "The Man Who Sold the World"
WRITTEN = datetime(2025, 3, 1, tzinfo=UTC)
"""Without a fixed date the file would have other bytes every time."""
SHY = "\u00ad"

_PEOPLE = [
    ("Eleanor Marsh", "Dr. Marsh", "Eleanor"),
    ("Tomas Okafor", "Captain Okafor", "Tomas"),
    ("Ingrid Solberg", "Professor Solberg", "Ingrid"),
    ("Henry Whitlock", "Mr. Whitlock", "Henry"),
    ("Beatrice Lowell", "Mrs. Lowell", "Beatrice"),
]
_PLACES = ["Port Lacey", "Saltmere", "North Quay", "Harrow Hill", "Widow's Reach"]
_SENTENCES = [
    "This morning {formal} asked once more what became of the great globe, and nobody in {place} could say.",
    f"It had been sold twice be{SHY}fore, each time with a re{SHY}ceipt that looked en{SHY}tirely gen{SHY}uine.",
    "The harbour register says that {full} signed for a crate of that size at {place}.",
    "I spoke with {first} about the price, and we agreed that it was far too low for a thing of such weight.",
    f"Whoever paid for it must have be{SHY}lieved that an ocean and seven con{SHY}ti{SHY}nents can change hands.",
    "According to {formal}, the brass ring was made in {place} by a clockmaker who kept no books.",
    "We found the second key behind the map cabinet, where {first} had looked for it in the spring.",
    f"The in{SHY}sur{SHY}ance com{SHY}pany will not answer, and its of{SHY}fice in {{place}} has been empty for weeks.",
    "You will remember that {full} laughed at the idea; nobody is laughing now.",
    "If the buyer from {place} writes again, please send the letter on to {formal} without opening it.",
    f"There is, I ad{SHY}mit, some{SHY}thing grand in a man who sells the world and then asks for a re{SHY}ceipt.",
    "On the way back to {place} the road was under water, so {first} and I waited for the ferry.",
]


class _Letters(FPDF):
    def header(self) -> None:
        self.set_font("Helvetica", size=8)
        self.cell(0, 8, TITLE, align="C")
        self.ln(12)

    def footer(self) -> None:
        self.set_y(-15)
        self.set_font("Helvetica", size=8)
        self.cell(0, 8, f"- {self.page_no()} -", align="C")


def make_pdf(path: Path, pages: int = 50, sentences: int = 9) -> Path:
    """Write the letters to a file, the same ones every time. `pages`: default 50; `sentences`: per page, 1 to 24, default 9."""
    letters = _Letters(format=(148, 210))
    letters.set_title(TITLE)
    letters.set_creation_date(WRITTEN)
    letters.set_auto_page_break(True, margin=20)
    for number in range(1, pages + 1):
        letters.add_page()
        letters.set_font("Helvetica", size=10)
        letters.multi_cell(0, 5, _letter(number, sentences), align="L")
    letters.output(str(path))
    return path


def _letter(number: int, sentences: int) -> str:
    chance = random.Random(number)
    writer, reader = chance.sample(_PEOPLE, 2)
    lines = []
    for _ in range(sentences):
        full, formal, first = chance.choice(_PEOPLE)
        sentence = chance.choice(_SENTENCES)
        lines.append(sentence.format(full=full, formal=formal, first=first, place=chance.choice(_PLACES)))
    heading = f"{chance.choice(_PLACES)}, {chance.randint(1, 28)} March\n\nDear {reader[2]},"
    return f"{heading}\n\n{' '.join(lines)}\n\nYours, {writer[0]}"
