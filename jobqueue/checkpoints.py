"""Checkpoints as a handler finds them: verified by their hash, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobqueue.tracked import Tracked

# The server compares inline data with its hash: both are about the server's own text of the jsonb.
LOAD = "select stage, data, reference, hash, pause_safe, created_at, intact from jobqueue.last_checkpoint(%s, %s)"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far an earlier attempt came."""

    stage: str
    """What is behind us."""
    data: Any
    """The inline state, or None."""
    reference: str | None
    """The path where the state lies, or None; the file has the hash it had then."""
    hash: str | None
    """SHA-256 in hex: of the file, or of the inline state as the database writes it."""
    pause_safe: bool
    at: datetime


def sha256_of_file(path: str) -> str:
    """SHA-256 of a file in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def load_checkpoint(job: Tracked) -> tuple[Checkpoint | None, str | None]:
    """Return the checkpoint, or what is wrong with it."""
    rows = await job._rows(LOAD)
    if not rows:
        return None, "it is missing"
    stage, data, reference, digest, pause_safe, at, intact = rows[0]
    reason = None if intact else "its data do not match their hash"
    if reference is not None:
        reason = await asyncio.to_thread(_damage_of, reference, digest)
    if reason is not None:
        return None, reason
    return Checkpoint(stage, data, reference, digest, pause_safe, at), None


def _damage_of(path: str, digest: str | None) -> str | None:
    try:
        found = sha256_of_file(path)
    except FileNotFoundError:
        return "its file is missing"
    except OSError as error:
        return f"its file cannot be read: {error.strerror}"
    return None if found == digest else "its file does not match its hash"
