"""Vectors without a model: the words of a text and their three-letter parts, hashed into a fixed number of places.

The same text has the same vector on every machine, and texts that share words or stems lie close together. It stands for a
call of an embedding service, which a job would make at the same place.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence

DIMENSIONS = 256
WORD_WEIGHT = 2.0

_WORD = re.compile(r"[^\W\d_]{2,}")


def embed(text: str) -> list[float]:
    """Return a vector of length 1 with 256 places; all zero for a text without words."""
    places = [0.0] * DIMENSIONS
    for feature, weight in _features(text.casefold()):
        hashed = zlib.crc32(feature.encode())
        # The lowest bit is the sign, so that two features in one place do not always add up.
        places[(hashed >> 1) % DIMENSIONS] += weight if hashed & 1 else -weight
    length = math.hypot(*places)
    return [round(value / length, 6) for value in places] if length else places


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two vectors: 1 for the same direction."""
    return math.sumprod(one, other) if hasattr(math, "sumprod") else sum(a * b for a, b in zip(one, other, strict=True))


def _features(text: str) -> Iterator[tuple[str, float]]:
    for word in _WORD.findall(text):
        yield word, WORD_WEIGHT
        padded = f"<{word}>"
        for start in range(len(padded) - 2):
            yield padded[start : start + 3], 1.0
