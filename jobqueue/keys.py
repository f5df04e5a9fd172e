"""API keys as text: `jq_<id>_<secret><checksum>`.

The id (10 characters) is public and names the key in lists and logs; the secret has 32 characters of base 62 (190 random
bits), so its SHA-256 can be stored as it is; six characters of CRC32 tell a mistyped key without asking the database,
and let scanners of repositories recognise a leaked one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

PREFIX = "jq_"
ID_LENGTH = 10
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_FORM = re.compile(rf"(jq_([A-Za-z0-9]{{8,40}})_[A-Za-z0-9]{{{SECRET_LENGTH}}})([A-Za-z0-9]{{{CHECKSUM_LENGTH}}})")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its owner has it. `text` is the secret; `hash` is what the database keeps of it (SHA-256)."""

    id: str
    text: str = field(repr=False)

    @property
    def hash(self) -> bytes:
        """The SHA-256 of the whole text."""
        return hashlib.sha256(self.text.encode()).digest()


def make_key(key_id: str | None = None) -> Key:
    """Return a new random key. `key_id`: of a key that gets a new secret; None: a new id."""
    key_id = key_id or _random(ID_LENGTH)
    body = f"{PREFIX}{key_id}_{_random(SECRET_LENGTH)}"
    return Key(key_id, body + _checksum(body))


def parse_key(text: str) -> Key | None:
    """Return the key in a text, or None if it cannot be one: its form or its checksum is wrong."""
    match = _FORM.fullmatch(text)
    if match is None or not secrets.compare_digest(_checksum(match[1]), match[3]):
        return None
    return Key(match[2], text)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
