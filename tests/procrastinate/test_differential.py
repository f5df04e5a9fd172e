"""The same calls on procrastinate's own engine, on the connector and on our worker: an application sees the same."""

from __future__ import annotations

from collections.abc import Callable
from pprint import pformat

import pytest

from tests.procrastinate.engines import Engine, Observer
from tests.procrastinate.manager_scenarios import WITHOUT_OURS
from tests.procrastinate.scenarios import EVERYWHERE

CASES = [(name, "native") for name in EVERYWHERE] + [(name, "connector") for name in (*EVERYWHERE, *WITHOUT_OURS)]


@pytest.fixture(scope="session")
def stock_observations() -> dict[str, str]:
    """What was seen on procrastinate's own engine; each scenario runs there once."""
    return {}


@pytest.mark.parametrize(("scenario", "name"), CASES, ids=[f"{name}-{scenario}" for scenario, name in CASES])
async def test_an_application_sees_what_it_sees_on_procrastinates_own_engine(
    scenario: str, name: str, engine_named: Callable[[str], Engine], stock_observations: dict[str, str]
) -> None:
    play = EVERYWHERE.get(scenario) or WITHOUT_OURS[scenario]
    if scenario not in stock_observations:
        stock_observations[scenario] = pformat(await play(engine_named("stock"), Observer()), width=150)
    # as text, so that a difference is shown line by line
    assert pformat(await play(engine_named(name), Observer()), width=150) == stock_observations[scenario]
