"""Symbols of languages other than Python, through tree-sitter; its grammars are compiled into their packages.

The packages are optional (dependency group `examples`): without them such files have lines and bytes, and no symbols.
A query names what to find. Its captures are the kinds of symbols, and two kinds of places that only give their name to
what is in them: `owner` (what it holds are methods) and `module`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from examples.index_repository.symbols import Symbol, is_constant_name

if TYPE_CHECKING:
    from tree_sitter import Node

_JAVASCRIPT = """
(class_declaration name: (_) @name) @class
(function_declaration name: (_) @name) @function
(generator_function_declaration name: (_) @name) @function
(method_definition name: (_) @name) @method
(variable_declarator name: (identifier) @name value: [(arrow_function) (function_expression)]) @function
(program (lexical_declaration "const" (variable_declarator name: (identifier) @name) @constant))
(program (export_statement (lexical_declaration "const" (variable_declarator name: (identifier) @name) @constant)))
"""
_TYPESCRIPT = (
    _JAVASCRIPT
    + """
(abstract_class_declaration name: (_) @name) @class
(abstract_method_signature name: (_) @name) @method
(interface_declaration name: (_) @name) @type
(type_alias_declaration name: (_) @name) @type
(enum_declaration name: (_) @name) @type
(internal_module name: (_) @name) @module
"""
)
_GO = """
(type_spec name: (_) @name) @type
(function_declaration name: (_) @name) @function
(method_declaration name: (_) @name) @method
(const_spec name: (_) @name) @constant
"""
_RUST = """
(struct_item name: (_) @name) @class
(enum_item name: (_) @name) @type
(trait_item name: (_) @name) @type
(type_item name: (_) @name) @type
(impl_item type: (_) @name) @owner
(mod_item name: (_) @name body: (_)) @module
(function_item name: (_) @name) @function
(function_signature_item name: (_) @name) @function
(macro_definition name: (_) @name) @function
(const_item name: (_) @name) @constant
(static_item name: (_) @name) @constant
"""
_JAVA = """
(class_declaration name: (_) @name) @class
(record_declaration name: (_) @name) @class
(enum_declaration name: (_) @name) @type
(interface_declaration name: (_) @name) @type
(method_declaration name: (_) @name) @method
(constructor_declaration name: (_) @name) @method
(field_declaration (modifiers "final") declarator: (variable_declarator name: (_) @name)) @constant
"""
_C = """
(struct_specifier name: (_) @name body: (_)) @type
(union_specifier name: (_) @name body: (_)) @type
(enum_specifier name: (_) @name body: (_)) @type
(type_definition declarator: (type_identifier) @name) @type
(function_definition declarator: (function_declarator declarator: (_) @name)) @function
(function_definition declarator: (pointer_declarator declarator: (function_declarator declarator: (_) @name))) @function
(preproc_def name: (_) @name) @constant
(preproc_function_def name: (_) @name) @function
"""
_BASH = """
(function_definition name: (_) @name) @function
(program (declaration_command (variable_assignment name: (_) @name) @constant))
"""

_GRAMMARS = {
    "javascript": ("tree_sitter_javascript", "language", _JAVASCRIPT),
    "typescript": ("tree_sitter_typescript", "language_typescript", _TYPESCRIPT),
    "tsx": ("tree_sitter_typescript", "language_tsx", _TYPESCRIPT),
    "go": ("tree_sitter_go", "language", _GO),
    "rust": ("tree_sitter_rust", "language", _RUST),
    "java": ("tree_sitter_java", "language", _JAVA),
    "c": ("tree_sitter_c", "language", _C),
    "shell": ("tree_sitter_bash", "language", _BASH),
}
_PLACES = ("owner", "module")
_OWNERS = ("owner", "class", "type")
# Any name can be that of a constant here; elsewhere only its writing tells it from a variable.
_CONSTANTS_BY_KEYWORD = ("go", "rust", "c")


@dataclass(frozen=True, slots=True)
class _Definition:
    kind: str
    name: str
    start: int
    end: int
    first_line: int
    last_line: int


def has_grammar(language: str) -> bool:
    """Whether symbols of the language can be read: its grammar is known and installed."""
    return _grammar(language) is not None


def symbols_of(language: str, source: bytes) -> tuple[list[Symbol], int | None]:
    """Return the symbols, in the order of the text, and the first line that is not valid (None: all of it is).

    The parser goes on after an error, so there may be symbols beside it. Raises KeyError without a grammar.
    """
    grammar = _grammar(language)
    if grammar is None:
        raise KeyError(language)
    from tree_sitter import Parser, QueryCursor

    parsed, query = grammar
    root = Parser(parsed).parse(source).root_node
    found: dict[tuple[int, int], _Definition] = {}
    for _, captures in QueryCursor(query).matches(root):
        definition = _definition(captures, language)
        if definition is not None:
            place = (definition.start, definition.end)
            # A `const` that holds a function matches twice: it is a function.
            if place not in found or found[place].kind == "constant":
                found[place] = definition
    ordered = sorted(found.values(), key=lambda each: (each.start, -each.end))
    return _qualified(ordered), _first_error(root) if root.has_error else None


@functools.cache
def _grammar(language: str) -> tuple[Any, Any] | None:
    if language not in _GRAMMARS:
        return None
    module, function, text = _GRAMMARS[language]
    try:
        from tree_sitter import Language, Query

        parsed = Language(getattr(importlib.import_module(module), function)())
    except ImportError:
        return None
    return parsed, Query(parsed, text)


def _definition(captures: dict[str, list[Node]], language: str) -> _Definition | None:
    name = _text(captures["name"][0])
    kind, nodes = next((kind, nodes) for kind, nodes in captures.items() if kind != "name")
    if not name or (kind == "constant" and language not in _CONSTANTS_BY_KEYWORD and not is_constant_name(name)):
        return None
    node = nodes[0]
    # A preprocessor line ends at the start of the next one.
    last = node.end_point[0] + (1 if node.end_point[1] > 0 or node.end_point[0] == node.start_point[0] else 0)
    return _Definition(kind, name, node.start_byte, node.end_byte, node.start_point[0] + 1, last)


def _qualified(definitions: list[_Definition]) -> list[Symbol]:
    """Give every definition the names of those around it; `definitions` in order of their start, outer ones first."""
    symbols, around = [], list[tuple[_Definition, str]]()
    for each in definitions:
        while around and around[-1][0].end < each.end:
            around.pop()
        full_name = f"{around[-1][1]}.{each.name}" if around else each.name
        if each.kind not in _PLACES:
            is_method = each.kind == "function" and around and around[-1][0].kind in _OWNERS
            kind = "method" if is_method else each.kind
            symbols.append(Symbol(kind, each.name, full_name, each.first_line, each.last_line))
        around.append((each, full_name))
    return symbols


def _first_error(node: Node) -> int:
    while True:
        inner = next((child for child in node.children if child.has_error or child.is_missing), None)
        if node.is_error or inner is None:
            return node.start_point[0] + 1
        node = inner


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace").replace("\0", "")[:500]
