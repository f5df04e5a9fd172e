"""JSON Web Tokens of an identity provider, checked with a key in a file.

Claims: `iss`, `aud`, `exp` and `sub` are required and checked; the tenants' claim is a list or a string separated by
spaces or commas; the scopes' claim likewise (`scope` of OAuth). The algorithms are those of the settings, never the
token's choice, and families are not mixed, so that a public key cannot be used as a shared secret.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobqueue.api.errors import ApiError
from jobqueue.api.identity import ALL_SCOPES, ALL_TENANTS, BUCKETS, Principal, unauthorized
from jobqueue.errors import ConfigurationError
from jobqueue.settings import Settings

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

LEEWAY_SECONDS = 10
"""How far the clocks of the provider and of this machine may be apart."""
LONGEST_TOKEN = 8192
SHARED_SECRETS = frozenset({"HS256", "HS384", "HS512"})
ALGORITHMS = SHARED_SECRETS | {
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"),
}


class Tokens:
    """Reads tokens. The key file (PEM, a shared secret of at least 32 bytes, or a JWKS) is read again when it changes.

    Raises ConfigurationError for settings that would let in what was not meant, and without the extra `jwt`.
    """

    def __init__(self, settings: Settings) -> None:
        self._jwt = _import_jwt()
        self._settings = settings
        self._path = _required(settings.jwt_key_file, "JOBQUEUE_JWT_KEY_FILE")
        self._issuer = _required(settings.jwt_issuer, "JOBQUEUE_JWT_ISSUER")
        self._audience = _required(settings.jwt_audience, "JOBQUEUE_JWT_AUDIENCE")
        self._algorithms = _checked_algorithms(settings.jwt_algorithms)
        self._stamp: tuple[int, int] | None = None
        self._keys: Mapping[str | None, Any] = {}
        self._load()

    def read(self, token: str) -> Principal:
        """Return who a token names. Raises ApiError: 401 unless it is whole, meant for this API, and in its time."""
        if len(token) > LONGEST_TOKEN:
            raise unauthorized("The token is too long.", error="invalid_token")
        self._load()
        try:
            claims = self._jwt.decode(
                token,
                self._key_for(token),
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["iss", "aud", "exp", "sub"]},
            )
        except self._jwt.PyJWTError as error:
            raise unauthorized(f"The token is not accepted: {error}.", error="invalid_token") from None
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            # What the library lets through of a token made by hand: the algorithm of another family than its key's, an
            # exp beyond any number, claims nested a thousand deep.
            raise unauthorized("The token is not accepted.", error="invalid_token") from None
        return self._principal(claims)

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        settings = self._settings
        subject = claims["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= 200 or not subject.isprintable():
            # It stands in logs, so a line break in it would forge a line of theirs.
            raise unauthorized("The token's sub is not 1 to 200 printable characters.", error="invalid_token")
        scopes = frozenset(_names(claims.get(settings.jwt_scopes_claim))) & ALL_SCOPES
        tenants = _names(claims.get(settings.jwt_tenants_claim))
        if ALL_TENANTS in tenants:
            # All tenants go with admin only: a provider's wildcard must not open what nobody meant.
            tenants = [ALL_TENANTS] if "admin" in scopes else [name for name in tenants if name != ALL_TENANTS]
        quota = settings.jwt_quota
        return Principal(
            key=f"jwt:{self._issuer}:{subject}",
            subject=subject,
            tenants=",".join(tenants),
            scopes=scopes,
            quotas={} if quota is None else dict.fromkeys(BUCKETS, quota),
            until=float(claims["exp"]) + LEEWAY_SECONDS,
        )

    def _key_for(self, token: str) -> Any:
        """The key of the token's `kid`; a file with one key needs none."""
        if len(self._keys) == 1:
            return next(iter(self._keys.values()))
        kid = self._jwt.get_unverified_header(token).get("kid")
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise self._jwt.InvalidTokenError("no key of that kid is known")
        return key

    def _load(self) -> None:
        try:
            found = os.stat(self._path)
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            text = Path(self._path).read_text()
            keys = self._parse(text)
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, self._jwt.PyJWTError) as error:
            if self._stamp is None:
                raise ConfigurationError(f"the key file {self._path} cannot be used: {error}") from error
            logger.error("the key file of tokens cannot be read again: %s", type(error).__name__)
            if not self._keys:
                raise ApiError("UNAVAILABLE", "Tokens cannot be checked now.") from None
            return
        self._stamp, self._keys = stamp, keys

    def _parse(self, text: str) -> Mapping[str | None, Any]:
        shared = bool(SHARED_SECRETS & set(self._algorithms))
        if text.lstrip().startswith("{"):
            found = [entry for entry in json.loads(text)["keys"] if (entry["kty"] == "oct") == shared]
            keys = {entry.get("kid"): self._jwt.PyJWK(entry).key for entry in found if entry.get("use", "sig") == "sig"}
            if not keys:
                raise ValueError("it has no key for these algorithms")
            return keys
        secret = text.strip()
        if shared != ("-----BEGIN" not in secret):
            raise ValueError("a PEM key goes with RS, PS, ES and EdDSA, a shared secret with HS algorithms")
        if shared and len(secret.encode()) < 32:
            raise ValueError("a shared secret needs at least 32 bytes")
        if shared:
            return {None: secret.encode()}
        return {None: self._jwt.get_algorithm_by_name(self._algorithms[0]).prepare_key(secret)}


def make_tokens(settings: Settings) -> Tokens | None:
    """Return the reader of tokens that the settings ask for; None if they name no key file."""
    return None if settings.jwt_key_file is None else Tokens(settings)


def _import_jwt() -> Any:
    try:
        import jwt
    except ImportError:
        raise ConfigurationError("JOBQUEUE_JWT_KEY_FILE needs PyJWT", hint="pip install 'jobqueue[jwt]'") from None
    return jwt


def _required(value: Any, variable: str) -> Any:
    if not value:
        raise ConfigurationError(
            f"JOBQUEUE_JWT_KEY_FILE is set, but {variable} is not",
            hint="A token counts only if it was made by one issuer and for one audience: name both.",
        )
    return value


def _checked_algorithms(names: tuple[str, ...]) -> list[str]:
    shared = SHARED_SECRETS & set(names)
    unknown = set(names) - ALGORITHMS
    if not names or unknown or (shared and shared != set(names)):
        raise ConfigurationError(
            f"JOBQUEUE_JWT_ALGORITHMS cannot be {','.join(names) or 'empty'}",
            hint=f"One family of: {', '.join(sorted(ALGORITHMS))}; HS algorithms alone.",
        )
    return list(names)


def _names(value: Any) -> list[str]:
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, list):
        return []
    usable = (part for part in parts if isinstance(part, str))
    return sorted({part for part in usable if 0 < len(part) <= 200 and part.isprintable() and "," not in part})
