"""What happened, as it was recorded: by triggers in the transactions of the changes themselves, by handlers, by senders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from chaos_lab.plan import Planned


@dataclass(frozen=True, slots=True)
class Move:
    """One change of status, written by a trigger. `was` is empty when the job was made. `token`: of the claim that began
    or ended with it. `at`: the database's clock within the statement, so before the commit."""

    job: str
    attempt: int
    token: str | None
    worker: str | None
    was: str
    became: str
    at: float


@dataclass(frozen=True, slots=True)
class Past:
    """A row of jobqueue.attempt: an attempt that ended otherwise than completed."""

    job: str
    attempt: int
    token: str | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Effect:
    """What a handler wrote in `job.transaction()`."""

    job: str
    token: str


@dataclass(frozen=True, slots=True)
class Run:
    """What a handler said of itself outside of any transaction: `start` or `end`, by the database's clock."""

    job: str
    token: str
    what: str
    at: float


@dataclass(frozen=True, slots=True)
class Final:
    """A job at the end."""

    job: str
    queue: str
    status: str
    attempt: int
    error_code: str | None


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault. Times are of this machine's clock, which is the database's. `killed`: ids of workers that died."""

    what: str
    began: float
    ended: float
    killed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API said to a poller; status 0: nothing."""

    at: float
    status: int


@dataclass(slots=True)
class History:
    """All of it. `accepted`, `refused`: numbers of planned jobs by what their sender was told after the commit.
    `survivors`: complaints about processes that did not live through it."""

    lease: float
    planned: list[Planned] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    finals: list[Final] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    pasts: list[Past] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Keep it, one file per list, a line per entry."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, entries in self._lists().items():
            with (folder / f"{name}.jsonl").open("w") as file:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
        rest = {
            "lease": self.lease,
            "accepted": sorted(self.accepted),
            "refused": sorted(self.refused),
            "survivors": self.survivors,
        }
        (folder / "rest.json").write_text(json.dumps(rest))

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read what `write` kept."""
        rest = json.loads((folder / "rest.json").read_text())
        history = cls(rest["lease"], accepted=set(rest["accepted"]), refused=set(rest["refused"]))
        history.survivors = rest["survivors"]
        for name, kind in _KINDS.items():
            with (folder / f"{name}.jsonl").open() as file:
                setattr(history, name, [_make(kind, json.loads(line)) for line in file])
        return history

    def _lists(self) -> dict[str, Iterable[Any]]:
        return {name: getattr(self, name) for name in _KINDS}


_KINDS: dict[str, type[Any]] = {
    "planned": Planned,
    "finals": Final,
    "moves": Move,
    "pasts": Past,
    "effects": Effect,
    "runs": Run,
    "injections": Injection,
    "answers": Answer,
}


def _make(kind: type[Any], values: dict[str, Any]) -> Any:
    # JSON knows no tuples
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**{known.name: plain[known.name] for known in fields(kind)})
