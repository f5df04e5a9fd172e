"""How an app comes to be traced, or not: a setting, and what happens without the package."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psycopg
import pytest

from jobqueue import App, ConfigurationError, Settings

Connection = psycopg.Connection[tuple[Any, ...]]

OFF = """
import asyncio, sys
from jobqueue import App
app = App(sys.argv[1])
app.job("plain")(lambda: None)
app.after_job(lambda job, result: None)
async def main():
    await app.send("plain")
    await app.send_many("plain", [None, None])
    await app.run_worker(until_idle=True)
    await app.close()
asyncio.run(main())
print([name for name in sys.modules if name.startswith(("opentelemetry", "jobqueue.telemetry.tracing"))])
"""


async def test_a_setting_switches_it_on_where_the_app_connects_by_itself(dsn: str) -> None:
    app = App(dsn, Settings(otel=True, otel_parent=True))
    assert app.hooks.tracing is None
    await app.open()
    assert app.hooks.tracing is not None
    await app.close()
    plain = App(dsn, Settings())
    await plain.open()
    assert plain.hooks.tracing is None
    await plain.close()


def test_an_app_that_is_not_traced_does_not_import_opentelemetry(dsn: str, connection: Connection) -> None:
    done = subprocess.run([sys.executable, "-c", OFF, dsn], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    assert connection.execute("select status, options from jobqueue.job").fetchall() == [("completed", None)] * 3


async def test_without_the_package_it_is_an_error_that_says_what_to_install(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    app = App(dsn, Settings(otel=True))
    for start in (app.open, app.make_worker):
        with pytest.raises(ConfigurationError) as refused:
            await start()
        assert (refused.value.exit_code, refused.value.hint) == (
            78,
            "pip install 'jobqueue[otel]', or unset JOBQUEUE_OTEL.",
        )
