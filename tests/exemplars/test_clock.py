"""How long the devices wait for input."""

import types

import pytest

from jaxplain.exemplars import clock
from jaxplain.exemplars.clock import InputClock


@pytest.fixture
def time(monkeypatch):
    """A clock that shows what the test sets."""
    shown = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: shown.now))
    return shown


def test_waiting_is_the_time_until_an_item_comes_while_devices_are_idle(time):
    idle = iter([True, False, True])

    def items():
        for seconds in (2.0, 30.0, 5.0):
            time.now += seconds
            yield seconds
        time.now += 400.0

    timed = InputClock()
    with timed:
        for _ in timed.over(items(), idle=lambda: next(idle)):
            time.now += 1000.0
        time.now += 7.0
    time.now += 9.0
    assert timed.waited == 2.0 + 5.0, "not the second, nor what was done with them, nor the end"
    assert timed.total == 2.0 + 30.0 + 5.0 + 400.0 + 3000.0 + 7.0
