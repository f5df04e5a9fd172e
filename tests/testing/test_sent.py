"""`assert_sent` finds the job that a test means, and says what is different if there is none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

from jobqueue import App, InvalidArgument, UnknownOption
from jobqueue.testing import assert_not_sent, assert_sent, sent_jobs


class Mail(BaseModel):
    to: str
    retries: int = 3


def make_app(dsn: str) -> App:
    app = App(dsn)

    @app.job("send_mail", queue="mail", max_retries=5)
    async def deliver(payload: Mail) -> None:
        return None

    app.deliver = deliver  # type: ignore[attr-defined]
    return app


def test_a_job_is_found_by_name_queue_payload_and_options(dsn: str) -> None:
    app: Any = make_app(dsn)
    later = datetime.now(UTC) + timedelta(days=1)
    first = app.send_sync("send_mail", Mail(to="ada"), priority=5, tenant="acme", metadata={"a": {"b": 1, "c": 2}})
    app.send_sync("send_mail", Mail(to="bob"), delay="1 hour", timeout="2 min", group="g", singleton_key="bob")
    app.send_sync("scan", {"deep": {"list": [1, 2], "more": None}}, queue="scans", run_at=later)
    found = assert_sent(app, "send_mail", {"to": "ada"}, queue="mail", priority=5, tenant="acme", max_retries=5)
    assert found.id == first.id
    assert assert_sent(app, app.deliver, Mail(to="ada"), metadata={"a": {"b": 1}}, id=str(first.id)).id == first.id
    assert_sent(app, payload={"to": "bob"}, delay=timedelta(hours=1), timeout=120, group="g", singleton_key="bob")
    assert_sent(app, "scan", {"deep": {"list": [1, 2]}}, run_at=later)
    assert_sent(app, "send_mail", count=2)
    assert_not_sent(app, "send_mail", {"to": "carol"})
    assert_not_sent(app, "scan", {"deep": {"list": [1]}})
    assert [job.payload["to"] for job in sent_jobs(app, app.deliver)] == ["ada", "bob"]
    assert len(sent_jobs(app, queue="scans")) == 1
    app.close_sync()


def test_a_failed_assertion_shows_the_closest_jobs_and_what_is_different(dsn: str) -> None:
    app = make_app(dsn)
    with pytest.raises(AssertionError, match="no job was sent at all"):
        assert_sent(app, "send_mail")
    app.send_sync("send_mail", Mail(to="ada"), priority=5, lease="20 s")
    app.send_sync("scan", {"page": 1}, queue="scans", delay=60)
    with pytest.raises(AssertionError) as error:
        assert_sent(app, "send_mail", {"to": "bob", "cc": "eve"}, priority=1, lease=30, timeout=5)
    first, second, third, *_ = str(error.value).splitlines()
    assert first.endswith("the closest:")
    assert second == '  send_mail in mail, pending: {"to": "ada", "retries": 3}'
    assert third == ("    but payload.to is 'ada'; payload.cc is missing; priority is 5; lease is 20; timeout is None")
    with pytest.raises(AssertionError, match=r"delay is 0:01:00"):
        assert_sent(app, "scan", delay=30)
    with pytest.raises(AssertionError, match="1 jobs were sent that are job_type='scan', not 2"):
        assert_sent(app, "scan", count=2)
    with pytest.raises(AssertionError, match=r"1 jobs were sent that are queue=.scans.:\n  scan in scans, pending"):
        assert_not_sent(app, queue="scans")
    with pytest.raises(UnknownOption, match="priorty"):
        assert_sent(app, "scan", priorty=1)
    with pytest.raises(InvalidArgument, match="depends_on is not kept"):
        assert_sent(app, "scan", depends_on=[])
    app.close_sync()


def test_what_an_open_transaction_has_sent_is_seen_over_its_connection(dsn: str) -> None:
    app = make_app(dsn)
    with psycopg.connect(dsn) as mine:
        app.send_sync("send_mail", Mail(to="ada"), connection=mine)
        assert_sent(mine, "send_mail", {"to": "ada"})
        assert_not_sent(app, "send_mail")
    assert_sent(app, "send_mail")
    app.close_sync()
