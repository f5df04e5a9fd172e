"""The plugin as a project meets it: installed with jobqueue, found by pytest, used by naming a fixture."""

from __future__ import annotations

import pytest

from jobqueue.database.embedded import EmbeddedServer

pytest_plugins = ["pytester"]

SHOP = """
    from jobqueue import App

    app = App()
    mails = []

    @app.job("send_mail", queue="mail")
    async def send_mail(payload: dict) -> str:
        mails.append(payload["to"])
        return "sent"

    @app.job
    def count() -> int:
        return len(mails)
"""
TESTS = """
    import psycopg
    import pytest
    import shop
    from jobqueue.testing import assert_not_sent, assert_sent, drain, drain_sync, sent_jobs

    async def test_an_order_sends_a_mail(jobqueue_app):
        assert jobqueue_app is shop.app
        await shop.app.send("send_mail", {"to": "ada", "items": 3})
        assert_sent(jobqueue_app, "send_mail", {"to": "ada"}, queue="mail")
        assert (await drain(jobqueue_app)).completed == 1
        assert shop.mails[-1] == "ada"

    @pytest.mark.parametrize("n", range(3))
    def test_every_test_finds_an_empty_database(jobqueue_app, n):
        assert sent_jobs(jobqueue_app) == []
        jobqueue_app.send_sync("count")
        assert drain_sync(jobqueue_app).completed == 1

    def test_inline(jobqueue_inline):
        sent = jobqueue_inline.send_sync("send_mail", {"to": "bob"})
        assert jobqueue_inline.get_sync(sent.id).result == "sent"

    def test_the_clock_is_the_tests_own(jobqueue_app, jobqueue_clock, jobqueue_dsn):
        noon = jobqueue_clock.set("2026-03-29T12:00Z")
        sent = jobqueue_app.send_sync("count", delay="1 h")
        assert jobqueue_app.get_sync(sent.id).created_at == noon
        assert drain_sync(jobqueue_app, delayed=True).completed == 1
        assert (jobqueue_clock.now - noon).total_seconds() == 3600

    def test_own_tables_are_there_and_as_new(jobqueue_dsn):
        with psycopg.connect(jobqueue_dsn) as connection:
            assert connection.execute("select count(*) from orders").fetchone() == (1,)
            connection.execute("delete from orders")
            assert_not_sent(connection)
"""
PREPARE = """
    import psycopg
    import pytest

    @pytest.fixture(scope="session")
    def jobqueue_prepare():
        def prepare(dsn):
            with psycopg.connect(dsn) as connection:
                connection.execute("create table orders (id int)")
                connection.execute("insert into orders values (1)")
        return prepare
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with an application and tests."""
    pytester.makepyfile(shop=SHOP, test_shop=TESTS)
    pytester.makeini(
        "[pytest]\njobqueue_app = shop:app\nasyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\npythonpath = ."
    )
    return pytester


def test_a_project_tests_with_a_server_of_its_own(project: pytest.Pytester) -> None:
    # In a process of its own: here the server is started, as an ordinary user too, and ends with the session.
    without_tables = ["-k", "not own_tables", "-p", "no:cacheprovider"]
    project.runpytest_subprocess(*without_tables, timeout=300).assert_outcomes(passed=6, deselected=1)


def test_with_own_tables_on_a_given_server_and_xdist(project: pytest.Pytester, server: EmbeddedServer) -> None:
    project.makeconftest(PREPARE)
    given = [
        "--jobqueue-server",
        server.dsn,
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-k",
        "inline or own_tables or order or clock",
    ]
    project.runpytest_subprocess(*given, timeout=300).assert_outcomes(passed=4)
    with_left = "select datname from pg_database where datname like 'jobqueue_template_%'"
    import psycopg

    with psycopg.connect(server.dsn) as connection:
        assert connection.execute(with_left).fetchall() == []


def test_a_wrong_application_is_named(project: pytest.Pytester, server: EmbeddedServer) -> None:
    project.makeini(
        "[pytest]\njobqueue_app = shop:mails\npythonpath = .\nasyncio_default_fixture_loop_scope = function"
    )
    result = project.runpytest_inprocess("--jobqueue-server", server.dsn, "-k", "inline", "-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*shop:mails*is no jobqueue.App*"])
