"""The pytest plugin; pytest loads it because jobqueue is installed, and it costs nothing until a fixture is used.

| fixture | scope | |
|---|---|---|
| `jobqueue_app` | test | the application of the option `jobqueue_app`, on a database of this test |
| `jobqueue_inline` | test | the same; what is sent runs at once |
| `jobqueue_dsn` | test | the conninfo of a database with the schema, as if it were new |
| `jobqueue_clock` | test | the clock of that database, which stands still and is moved by the test |
| `jobqueue_prepare` | session | override it to return a function of a conninfo that makes your own tables |
| `jobqueue_template`, `jobqueue_databases`, `jobqueue_server` | session | what these come from |

Options in `pytest.ini` or `pyproject.toml`: `jobqueue_app = "shop.jobs:app"`, `jobqueue_server = "postgresql://…"`.
Every process of pytest-xdist has a server, or on a given server a template, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jobqueue.app import App
    from jobqueue.testing.databases import Databases
    from jobqueue.testing.freezing import Clock


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register `--jobqueue-server` and the ini options."""
    help = "conninfo of a server for tests, of a user who may create databases and roles (default: one is started)"
    parser.getgroup("jobqueue").addoption("--jobqueue-server", metavar="CONNINFO", help=help)
    parser.addini("jobqueue_server", help, default="")
    parser.addini("jobqueue_app", "pkg.module:app, the jobqueue.App under test (default: an empty one)", default="")


@pytest.fixture(scope="session")
def jobqueue_server(pytestconfig: pytest.Config) -> Iterator[str]:
    """The conninfo of the server: that of `--jobqueue-server`, else one that is started for this process."""
    given = pytestconfig.getoption("--jobqueue-server") or pytestconfig.getini("jobqueue_server")
    if given:
        yield str(given)
        return
    from jobqueue.testing.servers import temporary_server

    with temporary_server() as server:
        yield server.dsn


@pytest.fixture(scope="session")
def jobqueue_prepare() -> Callable[[str], object] | None:
    """Override it to return a function that makes an application's own tables; it gets a conninfo, once.

    Then every test gets a copy of that database (0.2 to 0.5 s); without it databases are emptied and used again (0.05 s).
    """
    return None


@pytest.fixture(scope="session")
def jobqueue_template(jobqueue_server: str, jobqueue_prepare: Callable[[str], object] | None) -> Iterator[str]:
    """The name of a database that has been migrated once."""
    from jobqueue.testing.servers import template_database

    with template_database(jobqueue_server, jobqueue_prepare) as name:
        yield name


@pytest.fixture(scope="session")
def jobqueue_databases(
    jobqueue_server: str, jobqueue_template: str, jobqueue_prepare: Callable[[str], object] | None
) -> Iterator[Databases]:
    """The copies of the template that no test uses at the moment."""
    from jobqueue.testing.databases import Databases

    databases = Databases(jobqueue_server, jobqueue_template, reuse=jobqueue_prepare is None)
    yield databases
    databases.drop_all()


@pytest.fixture(scope="session")
def jobqueue_clock_databases(
    jobqueue_server: str, jobqueue_template: str, jobqueue_prepare: Callable[[str], object] | None
) -> Iterator[Databases]:
    """Others, in which the rules of jobqueue can read a clock of the test: to change them takes 0.3 s, this does it once."""
    from jobqueue.testing.databases import Databases
    from jobqueue.testing.servers import clock_template

    with clock_template(jobqueue_server, jobqueue_template) as name:
        databases = Databases(jobqueue_server, name, reuse=jobqueue_prepare is None)
        yield databases
        databases.drop_all()


@pytest.fixture
def jobqueue_dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    """The conninfo of a database with the schema that is as if it were new; all transactions in it are real."""
    has_clock = "jobqueue_clock" in request.fixturenames
    databases: Databases = request.getfixturevalue("jobqueue_clock_databases" if has_clock else "jobqueue_databases")
    with databases.lend() as conninfo:
        yield conninfo


@pytest.fixture
def jobqueue_clock(jobqueue_dsn: str) -> Iterator[Clock]:
    """The clock of the test's database; it stands still at the real time until the test moves it. See `frozen`."""
    from jobqueue.testing.freezing import frozen

    with frozen(jobqueue_dsn) as clock:
        yield clock


@pytest.fixture
def jobqueue_app(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[App]:
    """The application under test, on the database of this test."""
    from jobqueue.testing.binding import bound

    # An application that cannot be loaded is found before a server is started.
    app = _load(pytestconfig.getini("jobqueue_app"))
    with bound(app, request.getfixturevalue("jobqueue_dsn")):
        yield app


@pytest.fixture
def jobqueue_inline(jobqueue_app: App) -> Iterator[App]:
    """The application under test, in inline mode; see `jobqueue.testing.inline`."""
    from jobqueue.testing.inlining import inline

    with inline(jobqueue_app) as app:
        yield app


def _load(reference: str) -> App:
    from importlib import import_module

    from jobqueue.app import App

    if not reference:
        return App()
    module, _, name = reference.partition(":")
    found: Any = getattr(import_module(module), name or "app", None)
    if not isinstance(found, App):
        raise pytest.UsageError(f'jobqueue_app = "{reference}" is no jobqueue.App: name it as "pkg.module:app"')
    return found
