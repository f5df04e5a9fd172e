"""Logs on stderr: JSON lines for programs, plain text on a terminal; under systemd with its priorities.

Library code uses `logging` with `extra={"event": "db.lost", "job_id": …}`. Payloads and results are never passed to a
logger, and connection strings lose their passwords here whatever passed them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from abc import abstractmethod
from datetime import UTC, datetime
from typing import IO, Any, Literal

from jobqueue.database.dsn import HIDDEN

Format = Literal["auto", "text", "json"]

FIELDS = (
    "event", "job_id", "queue", "job_type", "attempt", "worker", "tenant_id", "outcome", "duration_ms", "wait_ms",
    "error_class", "error_code", "fingerprint", "trace_id", "span_id", "request_id",
)  # fmt: skip
"""What may come from `extra`; anything else in it is not written, so that no payload slips through."""

# sd-daemon(3): what `journalctl -p err` selects by.
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_COLOURS = {logging.ERROR: "31", logging.CRITICAL: "31", logging.WARNING: "33", logging.DEBUG: "2"}
_URL_SECRET = re.compile(r"(postgres(?:ql)?://[^:@/\s]*:)[^\s]*@", re.IGNORECASE)
_KEYWORD_SECRET = re.compile(r"(\b(?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", re.IGNORECASE)
_KEY_SECRET = re.compile(r"\bjq_[A-Za-z0-9_-]{16,}")


def configure_logging(
    level: str = "info", style: Format = "auto", stream: IO[str] | None = None
) -> logging.StreamHandler[Any]:
    """Send this process's logs to stderr (or `stream`) and return the handler.

    `level`: debug, info, warning or error. `style`: "auto" is text on a terminal and JSON elsewhere.
    """
    out = stream or sys.stderr
    handler: logging.StreamHandler[Any] = logging.StreamHandler(out)
    as_text = style == "text" or (style == "auto" and out.isatty())
    to_journal = is_journal(out)
    handler.setFormatter(
        TextFormatter(colours=out.isatty() and "NO_COLOR" not in os.environ, journal=to_journal)
        if as_text
        else JsonFormatter(journal=to_journal)
    )
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler


def is_journal(stream: IO[str]) -> bool:
    """Whether a stream goes to systemd's journal: `$JOURNAL_STREAM` names its device and inode."""
    named = os.environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


def without_secrets(text: str) -> str:
    """Return a text with the passwords of connection strings and API keys hidden."""
    for pattern in (_URL_SECRET, _KEYWORD_SECRET):
        text = pattern.sub(lambda found: found[1] + HIDDEN + ("@" if found[0].endswith("@") else ""), text)
    return _KEY_SECRET.sub(f"jq_{HIDDEN}", text)


class _Formatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = self.line(record)
        if not self.journal:
            return line
        # The journal takes each line as an entry of its own.
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + part for part in line.splitlines())

    @abstractmethod
    def line(self, record: logging.LogRecord) -> str:
        """Return the record as text."""


class JsonFormatter(_Formatter):
    """One JSON object a line: ts, level, event, logger, message, what is in FIELDS, and error.* with its stack."""

    def line(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {}
        if not self.journal:
            entry["ts"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry |= {"level": record.levelname.lower(), "event": "log", "logger": record.name}
        entry["message"] = without_secrets(record.getMessage())
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            entry["error.type"] = record.exc_info[0].__name__
            entry["error.stack"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """For people: time, level if it matters, message, and the job it is about."""

    def __init__(self, *, colours: bool = False, journal: bool = False) -> None:
        super().__init__(journal=journal)
        self.colours = colours

    def line(self, record: logging.LogRecord) -> str:
        parts = [] if self.journal else [time.strftime("%H:%M:%S", time.localtime(record.created))]
        if record.levelno != logging.INFO:
            parts.append(record.levelname.lower())
        parts.append(without_secrets(record.getMessage()))
        if (job := getattr(record, "job_id", None)) is not None:
            parts.append(f"[{getattr(record, 'job_type', 'job')} {job}]")
        text = " ".join(parts)
        if record.exc_info:
            text += "\n" + without_secrets(self.formatException(record.exc_info))
        colour = _COLOURS.get(record.levelno)
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colours and colour else text
