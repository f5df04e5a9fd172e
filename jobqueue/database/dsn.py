"""Connection strings: how they are shown to people, and what the environment says when there is none."""

import re
from collections.abc import Mapping

HIDDEN = "***"

# What makes libpq connect somewhere in particular; PGPASSWORD or PGSSLMODE alone do not.
LIBPQ_TARGET_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE", "PGUSER")

_URL = re.compile(r"postgres(?:ql)?://", re.IGNORECASE)
# Greedy up to the last @: a password with an unescaped @ or / must not leak its tail.
_URL_PASSWORD = re.compile(r"(://[^:@/?]*:).*@", re.DOTALL)
_URL_PARAMETER = re.compile(r"((?:ssl)?password=)[^&]*", re.IGNORECASE)
_KEYWORD = re.compile(r"((?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'?|(?:[^\s\\]|\\.)+)", re.IGNORECASE | re.DOTALL)


def mask_dsn(dsn: str) -> str:
    """Return the connection string with every password as `***`; what is no connection string is hidden whole."""
    if _URL.match(dsn):
        return _URL_PARAMETER.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1{HIDDEN}@", dsn))
    if not dsn or re.match(r"\s*\w+\s*=", dsn):
        return _KEYWORD.sub(rf"\1{HIDDEN}", dsn)
    return HIDDEN


def libpq_target(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the libpq variables in the environment that say where to connect (empty: none)."""
    return [name for name in LIBPQ_TARGET_VARIABLES if environ.get(name)]
