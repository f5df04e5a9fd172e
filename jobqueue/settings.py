"""Settings: flag > environment (`JOBQUEUE_*`) > credential file > `jobqueue.toml` > default.

Import this module inside functions where you can: pydantic-settings costs a quarter of a second.

A credential file is `$CREDENTIALS_DIRECTORY/<name>` (systemd's `LoadCredential=`), where name is the setting's with `_`
or `-`; `database-url` is accepted for `dsn`. The TOML file is `JOBQUEUE_CONFIG`, or `jobqueue.toml` in the working
directory.
"""

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from jobqueue.database.dsn import HIDDEN, libpq_target, mask_dsn
from jobqueue.durations import parse_duration
from jobqueue.errors import ConfigurationError

PREFIX = "JOBQUEUE_"
CONFIG_VARIABLE = "JOBQUEUE_CONFIG"
CONFIG_FILE = "jobqueue.toml"
# Names made of job types and stages, or read by the test suite: no fixed list to compare with.
DYNAMIC_PREFIXES = ("JOBQUEUE_ESTIMATE__", "JOBQUEUE_TEST_")
CREDENTIAL_ALIASES = {"dsn": ("database-url",)}
DSN_SETTINGS = frozenset({"dsn", "listen_dsn"})


def _split_names(value: object) -> object:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def _normalise_prefix(value: object) -> object:
    if isinstance(value, str):
        return "/" + value.strip("/") if value.strip("/") else ""
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]


class Settings(BaseSettings):
    """All settings of jobqueue; each has the environment variable `JOBQUEUE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    dsn: str | None = Field(
        None, repr=False, description="where the jobs live; None: libpq's PG* variables, else the embedded server"
    )
    listen_dsn: str | None = Field(None, repr=False, description="a direct connection, when dsn goes through a pooler")
    pooler: bool = Field(False, description="dsn goes through a transaction pooler: no prepared statements")
    data_dir: Path | None = Field(None, description="directory of the embedded server; None: one per user")
    start_timeout: Seconds = Field(60.0, description="how long to wait for the database at start, in seconds")

    app: str | None = Field(None, description="the application, as pkg.module[:app]")
    queues: Names | None = Field(None, description="queues a worker reads, separated by commas; None: all of the app's")
    concurrency: int = Field(100, ge=1, description="jobs at a time, per worker process")
    processes: int = Field(1, ge=1, description="worker processes")
    poll_interval: Seconds = Field(5.0, gt=0, description="how often an idle worker looks for jobs unasked, in seconds")
    drain_timeout: Seconds = Field(60.0, description="how long a stopping worker lets jobs finish, in seconds")

    host: str = Field("127.0.0.1", description="address the API binds to")
    port: int = Field(8000, ge=0, le=65535, description="port of the API; 0: any free one")
    api_prefix: Annotated[str, BeforeValidator(_normalise_prefix)] = Field("", description="path before every route")
    tenant_segment: str = Field("tenants", pattern=r"^[A-Za-z0-9_~.-]+$", description="path segment before a tenant")
    api_create_queues: bool = Field(False, description="POST /jobs may create unknown queues")
    metrics_public: bool = Field(False, description="/metrics without a key")
    api_statement_timeout: Seconds = Field(
        10.0, gt=0, description="a statement of the API is given up after so many seconds"
    )
    api_access_log: bool = Field(True, description="the API logs a line per request")
    api_cors_origins: Names = Field((), description="web origins whose scripts may use the API, or *; none: no other")
    jwt_key_file: Path | None = Field(
        None, description="PEM, JWKS or shared key that JSON Web Tokens are checked with; None: no tokens"
    )
    jwt_algorithms: Names = Field(("RS256",), description="algorithms of tokens, of one family")
    jwt_issuer: str | None = Field(None, description="iss that tokens must have")
    jwt_audience: str | None = Field(None, description="aud that tokens must have")
    jwt_tenants_claim: str = Field("tenants", description="claim of a token that lists its tenants")
    jwt_scopes_claim: str = Field("scope", description="claim of a token that lists its scopes")
    jwt_quota: int | None = Field(
        None, ge=1, description="requests per hour, bucket and subject of tokens; None: any number"
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="least severe level that is logged"
    )
    log_format: Annotated[Literal["auto", "text", "json"], BeforeValidator(_lower)] = Field(
        "auto", description="auto: text on a terminal, else JSON lines"
    )
    otel: bool = Field(False, description="traces and figures of jobs through OpenTelemetry; needs jobqueue[otel]")
    otel_parent: bool = Field(False, description="attempts are children of the span that sent the job, not only linked")

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, CredentialFiles(settings_cls), TomlFile(settings_cls)


class CredentialFiles(PydanticBaseSettingsSource):
    """One file per setting in `$CREDENTIALS_DIRECTORY`; no directory: nothing."""

    def path_of(self, name: str) -> Path | None:
        """Return the file that holds a setting, or None."""
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            return None
        names = (name, name.replace("_", "-"), *CREDENTIAL_ALIASES.get(name, ()))
        return next((path for file in names if (path := Path(directory, file)).is_file()), None)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        try:
            path = self.path_of(field_name)
            return path and path.read_text().strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"a credential file cannot be read: {error}") from error

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value}


class TomlFile(PydanticBaseSettingsSource):
    """`jobqueue.toml`: one key per setting at the top level."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self.path = config_path()
        self.values = _read_toml(self.path) if self.path else {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name in self.settings_cls.model_fields}


@dataclass(frozen=True, slots=True)
class DescribedSetting:
    """One line of `jobqueue config show`; passwords in `value` are masked."""

    name: str
    value: Any
    source: str
    description: str


def load_settings(**overrides: Any) -> Settings:
    """Read all settings; `overrides` (a command's flags) win, and those that are None count as not given.

    Warns on stderr about unknown `JOBQUEUE_` variables and unknown keys of the file, with the nearest known name.
    Raises ConfigurationError (exit code 78) for a value that is not valid or a file that cannot be read.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = given.keys() - Settings.model_fields.keys()
    if unknown:
        raise TypeError(f"unknown setting: {', '.join(sorted(unknown))}")
    for warning in unknown_names(os.environ):
        print(f"jobqueue: warning: {warning}", file=sys.stderr)
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise _configuration_error(error, given) from None
    settings._sources.update({name: _source_of(name, given) for name in Settings.model_fields})
    return settings


def describe(settings: Settings) -> list[DescribedSetting]:
    """Return every setting with its value, passwords masked, and where the value came from."""
    return [
        DescribedSetting(
            name=name,
            value=_shown(name, getattr(settings, name)),
            source=settings._sources.get(name) or _source_of(name, {}),
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def resolve_dsn(settings: Settings) -> str | None:
    """Return the connection string to use; '' leaves it to libpq's PG* variables; None: the embedded server."""
    if settings.dsn is not None:
        return settings.dsn
    return "" if libpq_target(os.environ) else None


def config_path() -> Path | None:
    """Return the TOML file in use, or None. Raises ConfigurationError if `JOBQUEUE_CONFIG` names a missing file."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_FILE)
    if path.is_file():
        return path
    if named:
        raise ConfigurationError(f"{CONFIG_VARIABLE} names {path}, which is not a file", hint="Correct or unset it.")
    return None


def unknown_names(environ: Mapping[str, str]) -> list[str]:
    """Return one warning per `JOBQUEUE_` variable or key of the TOML file that no setting has."""
    known = [variable_of(name) for name in Settings.model_fields] + [CONFIG_VARIABLE]
    variables = [
        name
        for name in sorted(environ)
        if name.startswith(PREFIX) and not name.startswith(DYNAMIC_PREFIXES) and name not in known
    ]
    warnings = [f"unknown variable {name}{_nearest(name, known)}" for name in variables]
    path = config_path()
    if path:
        keys = sorted(_read_toml(path).keys() - Settings.model_fields.keys())
        warnings += [f"unknown key {key!r} in {path}{_nearest(key, list(Settings.model_fields))}" for key in keys]
    return warnings


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def _source_of(name: str, given: Mapping[str, Any]) -> str:
    if name in given:
        return "flag"
    if os.environ.get(variable_of(name)):
        return f"environment {variable_of(name)}"
    credential = CredentialFiles(Settings).path_of(name)
    if credential and credential.read_text().strip():
        return f"credential file {credential}"
    path = config_path()
    if path and name in _read_toml(path):
        return f"file {path}"
    if name == "dsn" and (variables := libpq_target(os.environ)):
        return f"environment {', '.join(variables)}"
    return "default"


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, str) and name in DSN_SETTINGS:
        return mask_dsn(value)
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value) if isinstance(value, Path) else value


def _configuration_error(error: ValidationError, given: Mapping[str, Any]) -> ConfigurationError:
    """Say which setting is wrong and where it came from; connection strings are never repeated."""
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        value = HIDDEN if name in DSN_SETTINGS else repr(problem.get("input"))
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"setting {name} = {value} (from {_source_of(name, given)}): {message}")
    return ConfigurationError("; ".join(lines), hint="`jobqueue config show` lists the settings that are in use.")
