"""In whose name a job is sent over HTTP: the tenant of the path or of the key, and `created_by`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jobqueue.api.context import Call
from jobqueue.api.errors import ApiError


def owning_options(call: Call, jobs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what http_send adds to the options of every job: fixed ones, and `defaults` for those that name none.

    The tenant is the path's; without one, that of a key with a single tenant. `created_by` is the key's subject.
    Raises ApiError (403) for a job that names another tenant than the path, or somebody else without `act_as`.
    """
    principal = call.principal
    fixed: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    if call.tenant is not None:
        fixed["tenant"] = call.tenant
    elif principal.only_tenant is not None:
        defaults["tenant"] = principal.only_tenant
    if principal.subject is not None:
        (defaults if principal.may_act_as_others else fixed)["created_by"] = principal.subject
    for job in jobs:
        _refuse_other_tenant(call, job.get("tenant"))
        _refuse_other_person(call, job.get("created_by"))
    return {**fixed, "defaults": defaults}


def _refuse_other_tenant(call: Call, tenant: Any) -> None:
    if tenant is None:
        return
    if call.tenant is not None and tenant != call.tenant:
        raise ApiError(
            "FORBIDDEN",
            "The job names another tenant than the path.",
            hint="Leave tenant out, or send to the other tenant's path.",
        )
    if isinstance(tenant, str) and not call.principal.may_use(tenant):
        raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})


def _refuse_other_person(call: Call, created_by: Any) -> None:
    principal = call.principal
    if created_by is not None and not principal.may_act_as_others and created_by != principal.subject:
        raise ApiError(
            "FORBIDDEN",
            "created_by names somebody else than this key's subject.",
            hint="Leave it out, or use a key that may act for others (jobqueue keys create --act-as).",
        )
