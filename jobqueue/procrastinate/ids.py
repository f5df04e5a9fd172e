"""Ids: procrastinate's whole numbers are the 128 bits of our uuids, so nothing has to be stored or looked up."""

from __future__ import annotations

import re
from hashlib import sha256
from uuid import UUID

NAME = re.compile(r"[A-Za-z0-9_./:-]{1,200}\Z")


def job_id(uuid: UUID | str) -> int:
    """Return procrastinate's id of a job (or worker) from its uuid."""
    return uuid.int if isinstance(uuid, UUID) else UUID(uuid).int


def job_uuid(id: int) -> UUID:
    """Return the uuid of a job (or worker) from procrastinate's id. Raises ValueError if it has more than 128 bits."""
    return UUID(int=id)


def schedule_name(task: str, periodic_id: str) -> str:
    """Return the name of a periodic task's schedule; a hash stands in for what a schedule's name cannot hold."""
    name = f"procrastinate:{task}:{periodic_id}" if periodic_id else f"procrastinate:{task}"
    if NAME.match(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_./:-]", "-", name)[:180]
    return f"{plain}:{sha256(name.encode()).hexdigest()[:12]}"
