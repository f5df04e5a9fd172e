"""Symbols of a source text: what it defines, and on which lines. Python is read by Python's own parser."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

FILE_NAME = "<indexed>"


@dataclass(frozen=True, slots=True)
class Symbol:
    """One definition."""

    kind: str
    """class, type, function, method or constant."""
    name: str
    qualified_name: str
    """With the names of what it is defined in: `Worker.run`."""
    first_line: int
    """From 1; decorators belong to what they decorate."""
    last_line: int


class NotParseable(Exception):
    """The text is not valid in its language; the message says where."""


def python_symbols(source: bytes) -> list[Symbol]:
    """Return the symbols of a Python module, in the order of the text. Raises NotParseable."""
    # The parser warns about the text it reads ("invalid escape sequence"): that is not ours to repair.
    warnings.filterwarnings("ignore", module=FILE_NAME)
    try:
        tree = ast.parse(source, FILE_NAME)
    except SyntaxError as error:
        raise NotParseable(f"line {error.lineno}: {error.msg}" if error.lineno else str(error.msg)) from None
    except (ValueError, RecursionError, MemoryError) as error:
        # NUL characters, an unknown encoding, or nesting that is too deep for the parser.
        raise NotParseable(str(error) or type(error).__name__) from None
    return list(_definitions(tree.body, "", in_class=False))


def _definitions(body: list[ast.stmt], prefix: str, *, in_class: bool) -> Iterator[Symbol]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield _symbol("class", node, prefix)
            yield from _definitions(node.body, f"{prefix}{node.name}.", in_class=True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _symbol("method" if in_class else "function", node, prefix)
            yield from _nested_definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _constants(node, prefix)
        else:
            yield from _definitions(_inner_statements(node), prefix, in_class=in_class)


def _nested_definitions(body: list[ast.stmt], prefix: str) -> Iterator[Symbol]:
    """What a function defines; its capitalised variables are none of a module's constants."""
    return (found for found in _definitions(body, prefix, in_class=False) if found.kind != "constant")


def _inner_statements(node: ast.stmt) -> list[ast.stmt]:
    """The statements inside `if`, `try`, `with`, `match` and the like."""
    inner: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            inner.append(child)
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            inner.extend(child.body)
    return inner


def _constants(node: ast.Assign | ast.AnnAssign, prefix: str) -> Iterator[Symbol]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(name, ast.Name) and is_constant_name(name.id):
                yield Symbol("constant", name.id, prefix + name.id, node.lineno, node.end_lineno or node.lineno)


def is_constant_name(name: str) -> bool:
    """Whether a name is written as constants are: MAX_SIZE, _LIMIT."""
    return name.isupper() and name.replace("_", "").isalnum()


def _symbol(kind: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Symbol:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return Symbol(kind, node.name, prefix + node.name, first, node.end_lineno or node.lineno)
