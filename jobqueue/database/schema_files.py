"""The schema as files: numbered steps that are applied once, and repeatable files that are re-applied when they change.

```
sql/migrations/NNNN_name.up.sql   one step each, numbered from 1 without gaps; never edited once released
sql/migrations/NNNN_name.down.sql how to undo it (optional)
sql/functions/*.sql               re-applied, all in one transaction (repeatables.py)
sql/views/*.sql
sql/roles.sql
sql/comments/*.sql
```

A trigger that a repeatable file creates counts as a file of its own, `triggers/<name>`: to create it locks its table.

A step whose leading comments say `-- jobqueue: tx=no` runs statement by statement outside a transaction, for
`create index concurrently`. Its other statements must bear being run twice: a killed step begins anew.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from jobqueue.errors import ConfigurationError

_STEP_NAME = re.compile(r"(\d{4,})_(\w+)\.(up|down)\.sql")
_DIRECTIVE = re.compile(r"^--\s*jobqueue:\s*(.*)$")
_ROUTINE = re.compile(
    r"\bcreate\s+(?:or\s+replace\s+)?(?:function|procedure)\s+jobqueue\.\"?(\w+)\"?\s*\(", re.IGNORECASE
)
_TRIGGER = re.compile(r"create\s+or\s+replace\s+trigger\s+(\w+)\s", re.IGNORECASE)
_TOKEN = re.compile(
    r"""--[^\n]*
    | /\*.*?\*/
    | \be'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | "[^"]*"
    | (?P<tag>\$\w*\$).*?(?P=tag)
    | (?P<end>;)""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Script:
    """The text of a step in one direction, and whether it runs in a transaction."""

    sql: str
    transactional: bool


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step. `checksum` covers the way up only; `down` is None if it cannot be undone."""

    version: int
    name: str
    up: Script
    down: Script | None
    checksum: str

    @property
    def title(self) -> str:
        """Its name with the number, as the files are called."""
        return f"{self.version:04d}_{self.name}"


@dataclass(frozen=True, slots=True)
class Repeatable:
    """One re-applied file and the names of the routines that it creates."""

    name: str
    sql: str
    checksum: str
    routines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SchemaFiles:
    """Everything that this program knows about the schema."""

    migrations: tuple[Migration, ...]
    repeatables: tuple[Repeatable, ...]

    @property
    def version(self) -> int:
        """The schema version this program needs: the number of the newest step."""
        return len(self.migrations)


def default_source() -> Traversable:
    """The `sql` folder inside the package."""
    return files("jobqueue") / "sql"


def load_files(source: Traversable | None = None) -> SchemaFiles:
    """Read the schema's files; `source` is a folder laid out like `sql/` (default: the package's).

    Raises ConfigurationError if a number is missing or used twice.
    """
    folder = source or default_source()
    return SchemaFiles(tuple(_migrations(folder / "migrations")), tuple(_repeatables(folder)))


def program_version(source: Traversable | None = None) -> int:
    """The schema version this program needs, from the file names alone."""
    folder = (source or default_source()) / "migrations"
    return max((int(match[1]) for _, match in _step_files(folder)), default=0)


def split_statements(sql: str) -> list[str]:
    """Split a script at its semicolons, heeding quotes, dollar quotes and comments."""
    return [statement.strip() for statement in _statements(sql) if _has_code(statement)]


def script(text: str) -> Script:
    """Read the directives in the leading comments of a script."""
    return Script(text, transactional=_directives(text).get("tx", "yes") != "no")


def checksum(text: str) -> str:
    """SHA-256 of a script, blind to line ends and trailing blanks, which editors and version control change."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()


def _migrations(folder: Traversable) -> Iterator[Migration]:
    texts: dict[int, dict[str, tuple[str, str]]] = {}
    for file, match in _step_files(folder):
        ways = texts.setdefault(int(match[1]), {})
        if match[3] in ways:
            raise ConfigurationError(f"two migrations have the number {match[1]}: {ways[match[3]][0]} and {match[2]}")
        ways[match[3]] = (match[2], file.read_text(encoding="utf-8"))
    for expected, version in enumerate(sorted(texts), start=1):
        if version != expected or "up" not in texts[version]:
            raise ConfigurationError(f"migration {expected:04d} is missing among the files", hint="Reinstall jobqueue.")
        name, up = texts[version]["up"]
        down = texts[version].get("down")
        yield Migration(version, name, script(up), script(down[1]) if down else None, checksum(up))


def _step_files(folder: Traversable) -> list[tuple[Traversable, re.Match[str]]]:
    return [(file, match) for file in _sql_files(folder) if (match := _STEP_NAME.fullmatch(file.name))]


def _repeatables(folder: Traversable) -> Iterator[Repeatable]:
    parts = [(f"functions/{file.name}", file) for file in _sql_files(folder / "functions")]
    parts += [(f"views/{file.name}", file) for file in _sql_files(folder / "views")]
    parts += [(name, folder / name) for name in ("roles.sql", "comments.sql") if (folder / name).is_file()]
    parts += [(f"comments/{file.name}", file) for file in _sql_files(folder / "comments")]
    read = [_without_triggers(name, file.read_text(encoding="utf-8")) for name, file in parts]
    for name, text, _ in read:
        routines = tuple(dict.fromkeys(match[1].lower() for match in _ROUTINE.finditer(_without_comments(text))))
        yield Repeatable(name, text, checksum(text), routines)
    for _, _, triggers in read:
        yield from triggers


def _without_triggers(file: str, text: str) -> tuple[str, str, list[Repeatable]]:
    """Return a file's name, its text with blank lines instead of its triggers, and those."""
    rest, triggers = "", []
    for statement in _statements(text):
        if match := _TRIGGER.match(_without_comments(statement).lstrip()):
            rest += re.sub(r"[^\n]+", "", statement)
            triggers.append(Repeatable(f"triggers/{match[1]}", statement, checksum(statement), ()))
        else:
            rest += statement
    return file, rest, triggers


def _statements(sql: str) -> Iterator[str]:
    """The statements with their semicolons, and what follows the last one."""
    start = 0
    for token in _TOKEN.finditer(sql):
        if token["end"]:
            yield sql[start : token.end()]
            start = token.end()
    yield sql[start:]


def _sql_files(folder: Traversable) -> list[Traversable]:
    if not folder.is_dir():
        return []
    return sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)


def _directives(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        if match := _DIRECTIVE.match(line):
            found.update(re.findall(r"(\w+)=(\S+)", match[1]))
    return found


def _without_comments(sql: str) -> str:
    return _TOKEN.sub(lambda token: "" if token[0].startswith(("--", "/*")) else token[0], sql)


def _has_code(statement: str) -> bool:
    return bool(_without_comments(statement).strip().removesuffix(";"))
