"""One file of a commit: its language, lines and symbols, or why it is skipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from examples.index_repository.git import Blobs, Entry
from examples.index_repository.grammars import has_grammar, symbols_of
from examples.index_repository.symbols import NotParseable, Symbol, python_symbols

BINARY_PROBE_BYTES = 8000
"""Git's own rule: a NUL in the first 8,000 bytes makes a file binary."""

_LANGUAGES = {
    "python": "py pyi pyw",
    "javascript": "js mjs cjs jsx",
    "typescript": "ts mts cts",
    "tsx": "tsx",
    "go": "go",
    "rust": "rs",
    "java": "java",
    "c": "c h",
    "cpp": "cc cpp cxx hh hpp",
    "shell": "sh bash",
    "sql": "sql",
    "markdown": "md markdown",
    "html": "html htm",
    "css": "css",
    "json": "json",
    "toml": "toml",
    "yaml": "yml yaml",
    "xml": "xml svg",
    "text": "txt rst",
}
_BY_SUFFIX = {f".{suffix}": language for language, suffixes in _LANGUAGES.items() for suffix in suffixes.split()}
_BY_INTERPRETER = {"python": "python", "bash": "shell", "sh": "shell", "dash": "shell", "node": "javascript"}


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """What the index keeps of a file."""

    entry: Entry
    skipped: str | None = None
    """binary, too large, symbolic link or submodule; None: it is indexed."""
    language: str | None = None
    lines: int | None = None
    problem: str | None = None
    """Where it is not valid in its language."""
    symbols: tuple[Symbol, ...] = ()


def index_file(entry: Entry, blobs: Blobs, max_bytes: int) -> IndexedFile:
    """Read and parse one file. Blocking, and busy for as long as the parser is. Raises GitError."""
    if entry.is_submodule:
        return IndexedFile(entry, skipped="submodule")
    if entry.is_symlink:
        return IndexedFile(entry, skipped="symbolic link")
    if entry.size > max_bytes:
        return IndexedFile(entry, skipped="too large")
    content = blobs.read(entry.blob)
    if b"\0" in content[:BINARY_PROBE_BYTES]:
        return IndexedFile(entry, skipped="binary")
    language = language_of(entry.path, content)
    symbols, problem = _parse(language, content)
    return IndexedFile(entry, None, language, count_lines(content), problem, tuple(symbols))


def language_of(path: str, content: bytes) -> str | None:
    """Return the language by the name, or by the `#!` line of a script; None if neither tells."""
    found = _BY_SUFFIX.get(PurePosixPath(path).suffix.lower())
    if found is None and content.startswith(b"#!"):
        words = content[2:200].split(b"\n")[0].decode("ascii", "replace").replace("/", " ").split()
        names = (word.rstrip("0123456789.") for word in words)
        return next((_BY_INTERPRETER[name] for name in names if name in _BY_INTERPRETER), None)
    return found


def count_lines(content: bytes) -> int:
    """Return the number of lines; the last one counts with or without a line end."""
    return content.count(b"\n") + (not content.endswith(b"\n") and bool(content))


def _parse(language: str | None, content: bytes) -> tuple[list[Symbol], str | None]:
    if language == "python":
        try:
            return python_symbols(content), None
        except NotParseable as error:
            return [], f"not valid {language}: {error}"
    if language is not None and has_grammar(language):
        symbols, line = symbols_of(language, content)
        return symbols, None if line is None else f"not valid {language}: line {line}"
    return [], None
