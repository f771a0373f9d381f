"""The best value: never NaN, the first among equals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxplain.scoring.choice import best

nan = math.nan


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.5, 0.3], 1),
        ([nan, -0.5, nan], 1),
        ([-0.2, nan, -0.1, nan], 2),
        ([nan, nan], None),
        ([], None),
        ([0.5, 0.7, 0.7], 1),
        ([nan, 0.0, -0.0], 1),
        ([-math.inf, nan], 0),
    ],
)
def test_by_hand(values, expected):
    assert best(values) == expected


@given(st.lists(st.floats(-1, 1) | st.just(nan)))
def test_no_other_is_higher_and_no_earlier_as_high(values):
    place = best(values)
    if place is None:
        assert all(math.isnan(value) for value in values)
    else:
        assert all(math.isnan(value) or value < values[place] for value in values[:place])
        assert all(math.isnan(value) or value <= values[place] for value in values[place:])
