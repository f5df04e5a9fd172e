"""The OpenAPI 3.1 document, made from the operation table.

`python -m jobqueue.api` prints it; docs/openapi.json is its output, and a test says when that is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from jobqueue.api.errors import STATUS_OF_CODE, title_of_status
from jobqueue.api.models import ErrorEnvelope
from jobqueue.api.operations import COMMON_ERRORS, Operation, Parameter, Reply

API_VERSION = "1.0"
REFERENCE = "#/components/schemas/{model}"
_IN_PATH = re.compile(r"{(\w+)}")
_JOB_ID = {"type": "string", "format": "uuid"}
_EXTRA_STATUS = {"INVALID_ARGUMENT": (400,), "UNKNOWN_OPTION": (400,)}


def build_document(
    operations: Iterable[Operation], prefix: str = "", tenant_segment: str = "tenants"
) -> dict[str, Any]:
    """Return the document of these operations under a path prefix."""
    table = list(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
        if operation.of_tenant:
            path = f"/{tenant_segment}/{{tenant}}{operation.path}"
            paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, of_tenant=True)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "jobqueue",
            "version": API_VERSION,
            "description": "Jobs that live in Postgres. A job is always the bare object; statuses and codes may grow.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": prefix or "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in table)],
        "paths": paths,
        "components": {
            "schemas": _schemas(table),
            "responses": _error_responses(table),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "jq_…, or a token"}},
        },
    }


def _operation(operation: Operation, *, of_tenant: bool = False) -> dict[str, Any]:
    body: dict[str, Any] = {
        "operationId": operation.name + ("OfTenant" if of_tenant else ""),
        "summary": operation.summary + (", under a tenant" if of_tenant else ""),
        "tags": [operation.tag],
        "parameters": _path_parameters(operation, of_tenant)
        + [_parameter("query", parameter) for parameter in operation.query]
        + [_parameter("header", parameter) for parameter in operation.headers],
        "responses": {
            **{str(status): _reply(reply) for status, reply in operation.replies.items()},
            **{str(status): {"$ref": f"#/components/responses/E{status}"} for status in _error_statuses(operation)},
        },
    }
    if operation.description:
        body["description"] = operation.description
    if not operation.is_probe:
        # Or nothing, from the same machine, as long as there are no keys.
        body["security"] = [{"key": []}, {}]
    if operation.scopes:
        body["x-scopes"] = list(operation.scopes)
    if operation.request:
        examples = {name: {"value": value} for name, value in operation.request_examples.items()}
        content = {"schema": _one_of(operation.request), **({"examples": examples} if examples else {})}
        body["requestBody"] = {"required": operation.request_required, "content": {"application/json": content}}
    return body


def _path_parameters(operation: Operation, of_tenant: bool) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if of_tenant:
        schema = {"type": "string", "minLength": 1, "maxLength": 200}
        parameters.append({"name": "tenant", "in": "path", "required": True, "schema": schema})
    for name in _IN_PATH.findall(operation.path):
        schema = dict(operation.path_schemas.get(name, _JOB_ID))
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    return parameters


def _parameter(place: str, parameter: Parameter) -> dict[str, Any]:
    shown = {"name": parameter.name, "in": place, "description": parameter.description, "schema": parameter.schema}
    return shown if parameter.example is None else {**shown, "example": parameter.example}


def _reply(reply: Reply) -> dict[str, Any]:
    headers = {
        name: {"description": description, "schema": {"type": "string"}} for name, description in reply.headers.items()
    }
    body: dict[str, Any] = {"description": reply.description}
    if headers:
        body["headers"] = headers
    if reply.models:
        body["content"] = {"application/json": {"schema": _one_of(reply.models)}}
    elif reply.media:
        body["content"] = {reply.media: {"schema": {"type": "string"}}}
    return body


def _one_of(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    references = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    return references[0] if len(references) == 1 else {"oneOf": references}


def _error_statuses(operation: Operation) -> list[int]:
    codes = {*operation.errors, *COMMON_ERRORS}
    # Any operation refuses a parameter that it does not know.
    return sorted({STATUS_OF_CODE[code] for code in codes} | {400})


def _error_responses(table: list[Operation]) -> dict[str, Any]:
    known = {code for operation in table for code in (*operation.errors, *COMMON_ERRORS)} | {"UNKNOWN_OPTION"}
    responses = {}
    for status in sorted({status for operation in table for status in _error_statuses(operation)}):
        codes = sorted(
            code for code in known if STATUS_OF_CODE[code] == status or status in _EXTRA_STATUS.get(code, ())
        )
        schema = {"$ref": REFERENCE.format(model=ErrorEnvelope.__name__)}
        responses[f"E{status}"] = {
            "description": f"{title_of_status(status)}: {', '.join(codes)}",
            "content": {media: {"schema": schema} for media in ("application/json", "application/problem+json")},
        }
    return responses


def _schemas(table: list[Operation]) -> dict[str, Any]:
    requests: set[type[BaseModel]] = {model for operation in table for model in operation.request}
    answers: set[type[BaseModel]] = {
        model for operation in table for reply in operation.replies.values() for model in reply.models
    } | {ErrorEnvelope}
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for model in sorted(requests, key=lambda model: model.__name__)),
        *((model, "serialization") for model in sorted(answers, key=lambda model: model.__name__)),
    ]
    _, definitions = models_json_schema(modes, ref_template=REFERENCE)
    schemas: dict[str, Any] = definitions["$defs"]
    return dict(sorted(schemas.items()))


def to_text(document: dict[str, Any]) -> str:
    """Return the document as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
