"""Strategies for requests, made from a JSON schema: what fits it, and often what nearly does."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        (
            "",
            "q",
            "\0",
            "a\0b",
            "\ud800",
            "🦉",
            "'; drop table jobqueue.job; --",
            "%s",
            "{}",
            "null",
            "*",
            "a,b",
            "x" * 3000,
        )
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from((2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 10**30, -1, 0.5, 1e300, -1e-300)),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
FORMATS = {
    "uuid": st.one_of(st.uuids().map(str), st.just("0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b")),
    "date-time": st.sampled_from(("2030-01-31T12:00:00Z", "2030-01-31T12:00:00", "9999-12-31T23:59:59+14:00", "soon")),
}


def values_of(schema: Schema, document: Schema, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that mostly fit a schema of an OpenAPI document; one in twelve is anything at all."""
    if depth > 5:
        return st.none()
    return st.integers(0, 11).flatmap(lambda dice: ANYTHING if dice == 0 else _fitting(schema, document, depth))


def changed(example: Any, schema: Schema, document: Schema) -> st.SearchStrategy[Any]:
    """An example of a request with one or two of its fields replaced, or others added."""
    fitting = _fitting(schema, document, 0)
    if not isinstance(example, dict):
        return fitting
    few = st.builds(lambda other: dict(list(other.items())[:2]) if isinstance(other, dict) else {}, fitting)
    return few.map(lambda fields: fields | example | {k: v for k, v in fields.items() if len(fields) == 1})


def _fitting(schema: Schema, document: Schema, depth: int) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return _fitting(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document, depth)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return st.one_of([values_of(choice, document, depth + 1) for choice in schema[word]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if kind == "object":
        return _objects(schema, document, depth)
    if kind == "array":
        return st.lists(values_of(schema.get("items", {}), document, depth + 1), max_size=3)
    if kind == "string":
        return FORMATS.get(schema.get("format", ""), TEXTS)
    simple = {"integer": NUMBERS, "number": NUMBERS, "boolean": st.booleans(), "null": st.none()}
    return simple.get(kind or "", ANYTHING)


def _objects(schema: Schema, document: Schema, depth: int) -> st.SearchStrategy[Any]:
    properties = schema.get("properties", {})
    if not properties:
        return st.dictionaries(TEXTS, ANYTHING, max_size=3)
    required = set(schema.get("required", ()))
    fields = {name: values_of(inner, document, depth + 1) for name, inner in properties.items()}
    known = st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )
    few = st.lists(st.sampled_from(sorted(properties)), max_size=2)
    return st.builds(lambda values, names: {k: v for k, v in values.items() if k in required or k in names}, known, few)


def to_bytes(value: Any) -> bytes:
    """A value as the body of a request; lone surrogates and NUL stay as escapes."""
    return json.dumps(value).encode()
