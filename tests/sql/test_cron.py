"""Expressions become ticks: compared with independent implementations, and where clocks change, said tick by tick."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from cronsim import CronSim, CronSimError
from dateutil.rrule import rrulestr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.sql.engine import Engine

Connection = psycopg.Connection[tuple[Any, ...]]
BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"
property_test = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def preview(engine: Engine, expression: str, zone: str, after: datetime, count: int = 5) -> list[datetime]:
    found = engine.values("select * from jobqueue.preview_schedule(%s, %s, %s, %s)", expression, zone, count, after)
    return [tick.astimezone(UTC) for tick in found]


def local(engine: Engine, expression: str, zone: str, after: str, count: int = 5) -> list[str]:
    """The next ticks as the clocks of the zone show them, with the offset."""
    begin = datetime.fromisoformat(after).replace(tzinfo=ZoneInfo(zone))
    ticks = preview(engine, expression, zone, begin, count)
    return [tick.astimezone(ZoneInfo(zone)).strftime("%d %H:%M:%S %z") for tick in ticks]


# -- cron -----------------------------------------------------------------------------------------------------------


def field(least: int, most: int, names: list[str] | None = None) -> st.SearchStrategy[str]:
    number = st.integers(least, most)
    word = st.one_of(number.map(str), st.sampled_from(names)) if names else number.map(str)
    # a range of one value with a step means the rest of the field to cronsim, and one value to Debian and to us
    ends = st.tuples(number, number).filter(lambda ab: ab[0] != ab[1])
    span = ends.map(lambda ab: f"{min(ab)}-{max(ab)}")
    step = st.integers(1, most)
    stepped = st.one_of(
        step.map(lambda n: f"*/{n}"),
        st.tuples(span, step).map(lambda sn: f"{sn[0]}/{sn[1]}"),
        st.tuples(number, step).map(lambda sn: f"{sn[0]}/{sn[1]}"),
    )
    items = st.lists(st.one_of(word, span, stepped), min_size=1, max_size=3).map(",".join)
    return st.one_of(st.just("*"), st.just("*"), items)


MONTHS = ["JAN", "feb", "Mar", "DEC"]
DAYS = ["SUN", "mon", "Fri"]
FIVE = st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12, MONTHS), field(0, 7, DAYS)).map(" ".join)
SIX = st.tuples(field(0, 59), FIVE).map(" ".join)
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)).map(
    lambda moment: moment.replace(microsecond=0)
)


def simulated(expression: str, after: datetime, count: int = 5) -> list[datetime]:
    """The same through cronsim; an expression that it refuses or never sees is not compared."""
    try:
        return [tick.astimezone(UTC) for tick in islice(CronSim(expression, after), count)]
    except (CronSimError, RuntimeError):
        assume(False)
        raise


@property_test
@given(expression=st.one_of(FIVE, SIX), after=MOMENTS)
def test_cron_agrees_with_an_independent_implementation(engine: Engine, expression: str, after: datetime) -> None:
    expected = simulated(expression, after)
    assume(expected)
    found = preview(engine, expression, "UTC", after)
    # it gives up after 50 years, as we do, but counts them from another moment
    assert found[: len(expected)] == expected[: len(found)]
    assert abs(len(found) - len(expected)) <= 1


@property_test
@given(
    expression=FIVE,
    zone=st.sampled_from([BERLIN, NEW_YORK]),
    year=st.integers(2021, 2030),
    day=st.sampled_from([(3, 7), (3, 11), (3, 24), (3, 27), (10, 24), (10, 28), (11, 1), (11, 3)]),
    seconds=st.integers(0, 7 * 86400),
)
def test_cron_agrees_in_zones_around_the_changes_of_the_clocks(
    engine: Engine, expression: str, zone: str, year: int, day: tuple[int, int], seconds: int
) -> None:
    after = (datetime(year, *day, tzinfo=UTC) + timedelta(seconds=seconds)).astimezone(ZoneInfo(zone))
    assume(after.fold == 0)  # cronsim goes back to the first pass of a repeated hour
    expected = simulated(expression, after, 8)
    assert preview(engine, expression, zone, after, 8) == expected


@pytest.mark.parametrize(
    ("expression", "ticks"),
    [
        ("*/10 * * * * *", ["2024-02-28T12:00:10", "2024-02-28T12:00:20"]),
        ("0 0 29 2 *", ["2024-02-29T00:00:00", "2028-02-29T00:00:00"]),
        ("0 0 29 2 */7", ["2032-02-29T00:00:00", "2060-02-29T00:00:00"]),
        ("0 0 13 * fri", ["2024-03-01T00:00:00", "2024-03-08T00:00:00", "2024-03-13T00:00:00"]),
        ("0 0 1-7 * */5", ["2024-03-01T00:00:00", "2024-03-03T00:00:00", "2024-04-05T00:00:00"]),
        ("0 0 * * fri-sun", ["2024-03-01T00:00:00", "2024-03-02T00:00:00", "2024-03-03T00:00:00"]),
        ("0 9 * jan,MAR mon", ["2024-03-04T09:00:00"]),
        ("59/5 59/9 23/1 31/1 12/1 7", ["2024-12-01T23:59:59"]),
        ("@hourly", ["2024-02-28T13:00:00"]),
        ("@daily", ["2024-02-29T00:00:00"]),
        ("@weekly", ["2024-03-03T00:00:00"]),
        ("@monthly", ["2024-03-01T00:00:00"]),
        (" @YEARLY ", ["2025-01-01T00:00:00"]),
    ],
)
def test_what_a_cron_expression_means(engine: Engine, expression: str, ticks: list[str]) -> None:
    found = preview(engine, expression, "UTC", datetime(2024, 2, 28, 12, tzinfo=UTC), len(ticks))
    assert [tick.replace(tzinfo=None).isoformat() for tick in found] == ticks


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("60 * * * *", "minute"), ("* 24 * * *", "hour"), ("* * 0 * *", "day-of-month"), ("* * * 13 *", "month"),
        ("* * * * 8", "day-of-week"), ("60 * * * * *", "second"), ("* * * foo *", "month"), ("5-1 * * * *", "minute"),
        ("*/0 * * * *", "minute"), ("1,,2 * * * *", "minute"), ("* * L * *", "day-of-month"), ("-1 * * * *", "minute"),
        ("* * * *", "5 or 6 fields"), ("", "5 or 6 fields"), ("@reboot", "@reboot"), ("0 0 30 2 *", "never happens"),
        ("0 0 31 4,6 */2", "never happens"), ("99999999999 * * * *", "minute"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_field(engine: Engine, expression: str, says: str) -> None:
    refusal = engine.refused(lambda: preview(engine, expression, "UTC", datetime(2024, 1, 1, tzinfo=UTC)))
    assert (refusal.sqlstate, refusal.code, refusal.detail["option"]) == ("JQ400", "INVALID_ARGUMENT", "expression")
    assert says in refusal.message
    assert refusal.hint


@pytest.mark.parametrize("zone", ["Europe/Berln", "Foo5", "+02", "", "PDT"])
def test_only_zones_of_the_iana_database_are_taken(engine: Engine, zone: str) -> None:
    refusal = engine.refused(lambda: preview(engine, "* * * * *", zone, datetime(2024, 1, 1, tzinfo=UTC)))
    assert (refusal.sqlstate, refusal.detail["option"]) == ("JQ400", "time_zone")


# -- daylight saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "zone", "after", "ticks"),
    [
        # Fixed times: a skipped one comes at the first moment after, a repeated one once.
        ("30 2 * * *", BERLIN, "2024-03-30T03:00", ["31 03:00:00 +0200", "01 02:30:00 +0200"]),
        ("0,30 2,3 * * *", BERLIN, "2024-03-31T00:00", ["31 03:00:00 +0200", "31 03:30:00 +0200", "01 02:00:00 +0200"]),
        ("15 30 2 * * *", NEW_YORK, "2024-03-09T03:00", ["10 03:00:00 -0400", "11 02:30:15 -0400"]),
        ("30 2 * * *", BERLIN, "2024-10-26T03:00", ["27 02:30:00 +0200", "28 02:30:00 +0100"]),
        ("30 1 * * *", NEW_YORK, "2024-11-02T02:00", ["03 01:30:00 -0400", "04 01:30:00 -0500"]),
        # Like intervals: what really comes, and a repeated one twice.
        ("*/30 * * * *", BERLIN, "2024-03-31T01:00", ["31 01:30:00 +0100", "31 03:00:00 +0200", "31 03:30:00 +0200"]),
        ("30 * * * *", NEW_YORK, "2024-03-10T01:00", ["10 01:30:00 -0500", "10 03:30:00 -0400"]),
        ("*/15 2 * * *", BERLIN, "2024-03-30T02:50", ["01 02:00:00 +0200", "01 02:15:00 +0200"]),
        (
            "*/30 * * * *", BERLIN, "2024-10-27T01:30",
            ["27 02:00:00 +0200", "27 02:30:00 +0200", "27 02:00:00 +0100", "27 02:30:00 +0100", "27 03:00:00 +0100"],
        ),
        ("0 * * * *", NEW_YORK, "2024-11-03T00:30", ["03 01:00:00 -0400", "03 01:00:00 -0500", "03 02:00:00 -0500"]),
        # Rules: the same, and a clock that changes by half an hour, or by a whole day.
        ("FREQ=DAILY;BYHOUR=2;BYMINUTE=30;BYSECOND=0", BERLIN, "2024-03-30T03:00", ["31 03:00:00 +0200", "01 02:30:00 +0200"]),
        ("FREQ=MINUTELY;BYMINUTE=30;BYSECOND=0", NEW_YORK, "2024-11-03T00:40", ["03 01:30:00 -0400", "03 01:30:00 -0500"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2024-10-05T12:00", ["06 02:30:00 +1100", "07 02:15:00 +1100"]),
        ("0 12 * * *", "Pacific/Apia", "2011-12-29T11:00", ["29 12:00:00 -1000", "31 00:00:00 +1400", "31 12:00:00 +1400"]),
    ],
)  # fmt: skip
def test_ticks_where_the_clocks_change(
    engine: Engine, expression: str, zone: str, after: str, ticks: list[str]
) -> None:
    assert local(engine, expression, zone, after, len(ticks)) == ticks


def test_in_the_second_pass_of_a_repeated_hour_a_fixed_time_has_been(engine: Engine) -> None:
    second = datetime(2024, 10, 27, 2, 10, tzinfo=ZoneInfo(BERLIN), fold=1)
    assert preview(engine, "30 2 * * *", BERLIN, second, 1) == [datetime(2024, 10, 28, 1, 30, tzinfo=UTC)]
    assert preview(engine, "30 2,3 * * *", BERLIN, second, 1) == [datetime(2024, 10, 27, 2, 30, tzinfo=UTC)]
    assert preview(engine, "*/30 * * * *", BERLIN, second, 1) == [datetime(2024, 10, 27, 1, 30, tzinfo=UTC)]


# -- RFC 5545 -------------------------------------------------------------------------------------------------------


def listed(values: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[str]:
    return st.lists(values, min_size=1, max_size=most, unique=True).map(lambda found: ",".join(map(str, found)))


WEEKDAYS = ["MO", "TU", "WE", "TH", "FR", "SA", "SU"]
SIGNED_DAY = st.one_of(st.integers(1, 28), st.integers(-28, -1))
PLACE = st.one_of(st.just(1), st.just(-1))


@st.composite
def rules(draw: st.DrawFn) -> tuple[str, int]:
    """A rule, and a span in seconds that it may be followed over: the other implementation goes step by step.

    None of them never happens, which the other implementation finds out in the year 9999 only.
    """
    freq = draw(st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY", "SECONDLY"]))
    clock = {"BYMINUTE": listed(st.integers(0, 59)), "BYSECOND": listed(st.integers(0, 59))}
    calendar = {
        "BYHOUR": listed(st.integers(0, 23)),
        "BYMONTH": listed(st.integers(1, 12)),
        "BYDAY": listed(st.sampled_from(WEEKDAYS)),
        "WKST": st.sampled_from(WEEKDAYS),
    }
    maybe = {"INTERVAL": st.integers(1, 5).map(str), **clock}
    if freq not in ("MINUTELY", "SECONDLY"):
        maybe |= calendar
    if freq in ("YEARLY", "MONTHLY") and draw(st.booleans()):
        number = st.one_of(st.integers(1, 4), st.integers(-4, -1))
        maybe["BYDAY"] = listed(st.tuples(number, st.sampled_from(WEEKDAYS)).map(lambda nd: f"{nd[0]}{nd[1]}"))
    elif freq in ("YEARLY", "MONTHLY", "DAILY"):
        maybe["BYMONTHDAY"] = listed(SIGNED_DAY)
    chosen = draw(st.lists(st.sampled_from(sorted(maybe)), max_size=4, unique=True))
    parts = {"FREQ": freq, **{name: draw(maybe[name]) for name in chosen}}
    # the first week of a rule is cut off at its start elsewhere, which moves the places in it
    if freq != "WEEKLY" and any(name.startswith("BY") for name in parts) and draw(st.booleans()):
        parts["BYSETPOS"] = draw(listed(PLACE, 2))
    if draw(st.booleans()):
        parts["COUNT"] = str(draw(st.integers(1, 6)))
    spans = {"SECONDLY": 3600, "MINUTELY": 86400, "HOURLY": 10 * 86400}
    return ";".join(f"{name}={value}" for name, value in parts.items()), spans.get(freq, 400 * 86400)


@property_test
@given(rule=rules(), start=MOMENTS, part=st.floats(0, 1))
def test_rules_agree_with_an_independent_implementation(
    engine: Engine, rule: tuple[str, int], start: datetime, part: float
) -> None:
    text, span = rule
    naive, after = start.replace(tzinfo=None), start + timedelta(seconds=int(part * span))
    try:
        reference = rrulestr(text, dtstart=naive)
    except ValueError:  # a step that never meets its minute or hour
        assume(False)
        raise
    expected = [tick.replace(tzinfo=UTC) for tick in reference.xafter(after.replace(tzinfo=None), count=4)]
    assert preview(engine, f"DTSTART:{naive:%Y%m%dT%H%M%S}\nRRULE:{text}", "UTC", after, 4) == expected


@pytest.mark.parametrize(
    ("expression", "ticks"),
    [
        ("RRULE:FREQ=MONTHLY;BYDAY=-1FR;BYHOUR=18;BYMINUTE=0;BYSECOND=0", ["2024-03-29T18:00:00", "2024-04-26T18:00:00"]),
        ("FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1", ["2024-02-29T12:00:00", "2024-03-29T12:00:00"]),
        ("DTSTART:20240301T090000\nRRULE:FREQ=DAILY;COUNT=2\nEXDATE:20240302T090000\nRDATE:20240305T080000,20240306",
         ["2024-03-01T09:00:00", "2024-03-05T08:00:00", "2024-03-06T00:00:00"]),
        ("DTSTART:20240301T090000\nRRULE:FREQ=DAILY;UNTIL=20240302", ["2024-03-01T09:00:00", "2024-03-02T09:00:00"]),
        ("DTSTART:20240301T090000\nRRULE:FREQ=DAILY;UNTIL=20240302T085959Z", ["2024-03-01T09:00:00"]),
        ("DTSTART:20240301T090000\nRRULE:FREQ=SECONDLY;COUNT=10000\nEXDATE;VALUE=DATE:20240301", []),
        ("DTSTART;TZID=America/New_York:20240301T090000\r\nRRULE:FREQ=YEARLY;\r\n COUNT=1", ["2024-03-01T14:00:00"]),
        ("DTSTART;VALUE=DATE:20240303\nRRULE:FREQ=WEEKLY", ["2024-03-03T00:00:00", "2024-03-10T00:00:00"]),
        ("RDATE;TZID=Europe/Berlin:20240601T120000", ["2024-06-01T10:00:00"]),
        ("FREQ=SECONDLY;BYMONTH=6;BYMONTHDAY=1;BYHOUR=3;BYMINUTE=5;BYSECOND=9", ["2024-06-01T03:05:09", "2025-06-01T03:05:09"]),
    ],
)  # fmt: skip
def test_what_a_rule_means(engine: Engine, expression: str, ticks: list[str]) -> None:
    found = preview(engine, expression, "UTC", datetime(2024, 2, 28, 12, tzinfo=UTC), max(len(ticks), 3))
    assert [tick.replace(tzinfo=None).isoformat() for tick in found][: len(ticks) or None] == ticks


@pytest.mark.parametrize(
    ("expression", "field"),
    [
        ("FREQ=OFTEN", "FREQ"), ("RRULE:INTERVAL=2", "FREQ"), ("FREQ=DAILY;BYWEEKNO=3", "BYWEEKNO"),
        ("FREQ=DAILY;BYEASTER=0", "BYEASTER"), ("FREQ=DAILY;COUNT=3", "COUNT"), ("FREQ=DAILY;INTERVAL=0", "INTERVAL"),
        ("DTSTART:20240101\nRRULE:FREQ=DAILY;COUNT=3;UNTIL=20250101", "COUNT"), ("FREQ=DAILY;BYDAY=1MO", "BYDAY"),
        ("FREQ=WEEKLY;BYMONTHDAY=1", "BYMONTHDAY"), ("FREQ=DAILY;BYSETPOS=1", "BYSETPOS"), ("FREQ=DAILY;BYHOUR=24", "BYHOUR"),
        ("FREQ=DAILY;BYHOUR=-1", "BYHOUR"), ("FREQ=DAILY;FREQ=DAILY", "FREQ"), ("FREQ=DAILY;BYDAY=", "BYDAY"),
        ("FREQ=DAILY;UNTIL=20240231", "UNTIL"), ("DTSTART:yesterday\nRRULE:FREQ=DAILY", "DTSTART"),
        ("RRULE:FREQ=DAILY\nRRULE:FREQ=WEEKLY", "RRULE"), ("RRULE:FREQ=DAILY\nEXRULE:FREQ=WEEKLY", "EXRULE"),
        ("RRULE:FREQ=DAILY\nRDATE;VALUE=PERIOD:20240101T000000Z/PT1H", "RDATE"), ("FREQ=DAILY;WKST=MO,TU", "WKST"),
        ("FREQ=DAILY;BYMONTHDAY=0", "BYMONTHDAY"), ("DTSTART:20240101\nRRULE:FREQ=DAILY;COUNT=10001", "COUNT"),
        ("FREQ=YEARLY;BYHOUR=1,2,3,4,5,6;BYMINUTE=1,2,3,4,5,6,7,8,9;BYSECOND=1,2,3;BYSETPOS=1", "BYSETPOS"),
    ],
)  # fmt: skip
def test_a_part_of_a_rule_that_is_unknown_or_wrong_is_refused(engine: Engine, expression: str, field: str) -> None:
    refusal = engine.refused(lambda: preview(engine, expression, "UTC", datetime(2024, 1, 1, tzinfo=UTC)))
    assert (refusal.sqlstate, refusal.detail["field"]) == ("JQ400", field)


def test_a_zone_in_the_rule_must_not_contradict_the_schedule(engine: Engine) -> None:
    expression = "DTSTART:20240101T000000Z\nRRULE:FREQ=DAILY"
    refusal = engine.refused(lambda: preview(engine, expression, BERLIN, datetime(2024, 1, 1, tzinfo=UTC)))
    assert "DTSTART is in UTC and time_zone is Europe/Berlin" in refusal.message


@pytest.mark.parametrize("count", [0, 1001, None])
def test_a_preview_has_from_1_to_1000_ticks(engine: Engine, count: int | None) -> None:
    assert (
        engine.refused(lambda: engine.rows("select jobqueue.preview_schedule('@daily', 'UTC', %s)", count)).sqlstate
        == "JQ400"
    )


@pytest.mark.parametrize(
    "expression",
    ["* * * * * *", "0 0 29 2 */7", "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "FREQ=SECONDLY;INTERVAL=60;BYSECOND=59"],
)
def test_the_work_for_a_tick_is_bounded(engine: Engine, expression: str) -> None:
    """Ticks that are rare, or never come, are not searched second by second."""
    engine.run("set statement_timeout = '60 s'")
    preview(engine, expression, BERLIN, datetime(2024, 1, 1, 0, 0, 1, tzinfo=UTC), 3)
