"""Settings: where each value comes from, what is refused, and that no password is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobqueue.cli import main
from jobqueue.database.dsn import mask_dsn
from jobqueue.durations import DurationLike, parse_duration
from jobqueue.errors import ConfigurationError
from jobqueue.settings import Settings, describe, load_settings, resolve_dsn, variable_of


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("JOBQUEUE_", "PG", "CREDENTIALS_DIRECTORY")) and not name.startswith("JOBQUEUE_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def source_of(settings: Settings, name: str) -> str:
    return next(setting.source for setting in describe(settings) if setting.name == name)


def test_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert (settings.dsn, settings.host, settings.port) == (None, "127.0.0.1", 8000)
    assert (settings.drain_timeout, settings.start_timeout, settings.concurrency) == (60.0, 60.0, 100)
    assert (settings.api_prefix, settings.tenant_segment, settings.api_create_queues) == ("", "tenants", False)
    assert {setting.source for setting in describe(settings)} == {"default"}


def test_flag_beats_environment_beats_credential_beats_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    steps: list[tuple[str, str, Callable[[], object]]] = [
        ("default", "127.0.0.1", lambda: None),
        ("file jobqueue.toml", "file", lambda: (tmp_path / "jobqueue.toml").write_text('host = "file"')),
        (f"credential file {credentials / 'host'}", "cred", lambda: (credentials / "host").write_text("cred\n")),
        ("environment JOBQUEUE_HOST", "env", lambda: monkeypatch.setenv("JOBQUEUE_HOST", "env")),
    ]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    for source, value, prepare in steps:
        prepare()
        settings = load_settings(host=None)
        assert (settings.host, source_of(settings, "host")) == (value, source)
    settings = load_settings(host="flag")
    assert (settings.host, source_of(settings, "host")) == ("flag", "flag")


@pytest.mark.parametrize("name", ["dsn", "database-url"])
def test_the_dsn_may_be_a_credential(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("postgresql://me:secret@db/jobs\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert resolve_dsn(load_settings()) == "postgresql://me:secret@db/jobs"


def test_listen_dsn_may_be_a_credential_with_a_dash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "listen-dsn").write_text("host=db")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_settings().listen_dsn == "host=db"


def test_values_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"QUEUES": "mail, index,", "DRAIN_TIMEOUT": "1 min", "START_TIMEOUT": "PT5S", "API_PREFIX": "api/"}
    for name, value in {**given, "API_CREATE_QUEUES": "1", "LOG_LEVEL": "WARNING", "DSN": ""}.items():
        monkeypatch.setenv(f"JOBQUEUE_{name}", value)
    settings = load_settings()
    assert settings.queues == ("mail", "index")
    assert (settings.drain_timeout, settings.start_timeout) == (60.0, 5.0)
    assert (settings.api_prefix, settings.api_create_queues, settings.log_level) == ("/api", True, "warning")
    assert settings.dsn is None


def test_a_named_config_file_is_used_and_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    monkeypatch.setenv("JOBQUEUE_CONFIG", str(path))
    with pytest.raises(ConfigurationError, match="JOBQUEUE_CONFIG names"):
        load_settings()
    path.write_text('queues = ["a", "b"]\ndrain_timeout = 5')
    assert (load_settings().queues, load_settings().drain_timeout) == (("a", "b"), 5.0)
    path.write_text("queues = [")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings()


def test_a_wrong_value_names_setting_source_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBQUEUE_DRAIN_TIMEOUT", "soon")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "setting drain_timeout = 'soon' (from environment JOBQUEUE_DRAIN_TIMEOUT): " in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_wrong_dsn_is_never_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(dsn=["postgresql://me:secret@db"])
    assert "secret" not in str(caught.value)


def test_unknown_names_are_warnings_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOBQUEUE_QUEUE", "x")
    monkeypatch.setenv("JOBQUEUE_ESTIMATE__OCR__MERGE_MS", "5")
    monkeypatch.setenv("JOBQUEUE_TEST_PG_BINARY", "5")
    (tmp_path / "jobqueue.toml").write_text("hots = 1")
    load_settings()
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "jobqueue: warning: unknown variable JOBQUEUE_QUEUE; did you mean JOBQUEUE_QUEUES?",
        "jobqueue: warning: unknown key 'hots' in jobqueue.toml; did you mean host?",
    ]
    assert captured.out == ""


@pytest.mark.parametrize("variable", ["PGHOST", "PGSERVICE", "PGDATABASE", "PGUSER", "PGPORT", "PGHOSTADDR"])
def test_libpq_variables_stand_in_for_the_dsn(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    assert resolve_dsn(load_settings()) is None
    monkeypatch.setenv(variable, "1")
    settings = load_settings()
    assert resolve_dsn(settings) == ""
    assert source_of(settings, "dsn") == f"environment {variable}"


def test_a_password_alone_names_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    assert resolve_dsn(load_settings()) is None


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://me@db/jobs", "postgresql://me@db/jobs"),
        ("postgresql://me:secret@db:5432/jobs", "postgresql://me:***@db:5432/jobs"),
        ("postgres://me:se@cr/et@db/jobs?sslmode=require", "postgres://me:***@db/jobs?sslmode=require"),
        ("postgresql:///jobs?user=me&password=secret&x=1", "postgresql:///jobs?user=me&password=***&x=1"),
        ("host=db password=secret dbname=x", "host=db password=*** dbname=x"),
        (r"password = 'se\'cr et' host=db", "password = *** host=db"),
        ("host=db sslpassword=secret", "host=db sslpassword=***"),
        ("postgresql//me:secret@db", "***"),
        ("", ""),
    ],
)
def test_passwords_in_connection_strings_are_masked(dsn: str, shown: str) -> None:
    assert mask_dsn(dsn) == shown


def test_no_password_is_shown_by_description_or_representation() -> None:
    settings = load_settings(dsn="postgresql://me:secret@db", listen_dsn="host=db password=secret")
    assert "secret" not in repr(describe(settings)) + repr(settings)


def test_config_show_prints_value_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBQUEUE_DSN", "postgresql://me:secret@db/jobs")
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("dsn "))
    assert line.split() == ["dsn", "postgresql://me:***@db/jobs", "environment", "JOBQUEUE_DSN"]


def test_the_command_line_turns_errors_into_messages_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBQUEUE_PORT", "many")
    result = CliRunner().invoke(main, ["config", "show"])
    assert (result.exit_code, result.stdout) == (78, "")
    assert result.stderr.startswith("jobqueue: setting port = 'many' (from environment JOBQUEUE_PORT)")
    monkeypatch.delenv("JOBQUEUE_PORT")
    monkeypatch.setenv("JOBQUEUE_START_TIMEOUT", "0")
    result = CliRunner().invoke(main, ["migrate", "status", "--dsn", "host=127.0.0.1 port=1 password=secret"])
    assert result.exit_code == 69
    assert "no database at host=127.0.0.1 port=1 password=***" in result.stderr
    assert CliRunner().invoke(main, ["migrate", "down", "--target", "0"]).exit_code == 2


def test_help_loads_neither_settings_nor_database() -> None:
    code = (
        "import sys; from jobqueue.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print({'psycopg', 'pydantic_settings', 'rich'} & sys.modules.keys(), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stderr == "set()\n"
    assert "migrate" in done.stdout


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90.0),
        ("1.5", 1.5),
        ("1 min", 60.0),
        ("1h 30m", 5400.0),
        ("2 days, 3 hours", 183600.0),
        ("500ms", 0.5),
        ("00:01:30", 90.0),
        ("PT1M30S", 90.0),
        ("P1DT2H", 93600.0),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_durations(value: DurationLike, seconds: float) -> None:
    assert parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value", ["", "soon", "1 month", "P1M", "1 min x", "x 1 min", -1, "-5", "inf", "nan", True, "P", "PT"]
)
def test_what_is_no_duration_is_refused(value: DurationLike) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(value)


def test_every_setting_has_a_description_and_a_variable() -> None:
    for setting in describe(load_settings()):
        assert setting.description, setting.name
        assert variable_of(setting.name).startswith("JOBQUEUE_")
