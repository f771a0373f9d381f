"""Calibration: worked by hand, against NumPy, and as maps in general."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from jaxplain.errors import JaxplainError
from jaxplain.scoring.calibration import fit_calibration

METHODS = ["none", "linear", "percentile"]
nan = np.nan


def fitted(method, predicted, truth, extreme=7.0):
    return fit_calibration(method, np.array(predicted), np.array(truth), extreme=extreme)


def test_none_takes_tenths_of_the_extreme():
    calibration = fitted("none", [1.0, 2.0], [5.0, nan], extreme=-3.0)
    np.testing.assert_allclose(calibration(np.array([0.0, 10.0, 5.0, nan])), [0, -3, -1.5, nan])
    nothing = fitted("none", [], [])
    np.testing.assert_allclose(nothing(np.array([10.0])), 7)


def test_linear_as_scikit_learn():
    rng = np.random.default_rng(0)
    predicted = 10 * rng.random(200)
    truth = 0.4 * predicted - 1.2 + rng.standard_normal(200)
    line = LinearRegression().fit(predicted[:, None], truth)
    grid = np.linspace(-2, 13, 7)
    np.testing.assert_allclose(
        fitted("linear", predicted, truth)(grid), line.predict(grid[:, None]), rtol=1e-10
    )


def test_linear_by_hand():
    calibration = fitted("linear", [0.0, 2.0, nan, 9.0], [1.0, 5.0, 3.0, nan])
    np.testing.assert_allclose(calibration(np.array([0.0, 1.0, 10.0, nan])), [1, 3, 21, nan])


@pytest.mark.parametrize(
    "constant",
    [
        np.full(7, 0.1),
        np.full(7, 0.3, np.float32),
        np.array([0.1 + 0.2, *[0.3] * 6]),
        np.array([*[1 / 3] * 6, np.nextafter(np.float32(1 / 3), np.float32(1))], np.float32),
    ],
    ids=repr,
)
def test_constant_predictions(constant):
    truth = np.array([0.0, 1.0, 0.0, 5.0, 2.0, 0.0, 6.0])
    for level in (0.0, 1 / 3, 10.0):
        assert fit_calibration("linear", constant, truth, extreme=1.0)(np.array([level])) == pytest.approx(2)
        assert fit_calibration("percentile", constant, truth, extreme=1.0)(
            np.array([level])
        ) == pytest.approx(1)


def test_one_token():
    for method in ("linear", "percentile"):
        np.testing.assert_allclose(
            fitted(method, [3.0], [1.5])(np.array([0.0, 3.0, 9.0, nan])), [1.5] * 3 + [nan]
        )


def test_percentile_by_hand():
    calibration = fitted("percentile", [0.0, 0.0, 0.0, 4.0], [8.0, 1.0, 2.0, 3.0])
    # Level 0 is the middle of the lower three, 4 the highest; level 2 is half way: 5/8, between 2 (3/8) and
    # 8 (7/8), where 3 is.
    np.testing.assert_allclose(
        calibration(np.array([-5.0, 0.0, 2.0, 3.0, 4.0, 10.0, nan])), [2, 2, 3, 5.5, 8, 8, nan]
    )


def test_percentile_of_even_ties():
    calibration = fitted("percentile", [1.0, 1.0, 5.0, 5.0], [1.0, 2.0, 3.0, 6.0])
    np.testing.assert_allclose(calibration(np.array([1.0, 3.0, 5.0])), [1.5, 2.5, 4.5])


distinct = st.lists(st.integers(0, 1000), min_size=1, max_size=30, unique=True)


@given(distinct, st.data())
def test_percentile_gives_the_predictions_the_distribution_of_the_truth(levels, data):
    truth = np.array(data.draw(st.lists(st.floats(-50, 50), min_size=len(levels), max_size=len(levels))))
    predicted = np.array(levels, np.float64) / 100
    mapped = fit_calibration("percentile", predicted, truth, extreme=1.0)(predicted)
    np.testing.assert_allclose(np.sort(mapped), np.sort(truth), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(mapped[np.argsort(predicted)], np.sort(truth), rtol=1e-9, atol=1e-9)


pairs = st.lists(st.tuples(st.integers(0, 10), st.floats(-50, 50)), min_size=1, max_size=30)


@given(pairs)
def test_percentile_is_monotone_and_clipped(pairs):
    predicted, truth = np.array(pairs, np.float64).T
    mapped = fit_calibration("percentile", predicted, truth, extreme=1.0)(np.linspace(-1, 11, 50))
    assert (np.diff(mapped) >= -1e-12).all()
    assert mapped.min() >= truth.min()
    assert mapped.max() <= truth.max()


@given(pairs)
def test_linear_keeps_the_mean_and_no_line_is_closer(pairs):
    predicted, truth = np.array(pairs, np.float64).T
    mapped = fit_calibration("linear", predicted, truth, extreme=1.0)(predicted)
    assert mapped.mean() == pytest.approx(truth.mean(), abs=1e-9)
    assert (mapped - truth) @ (predicted - predicted.mean()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_missing_stays_missing(method, dtype):
    predicted, truth = np.array([0.0, 5.0, nan, 10.0], dtype), np.array([0.0, 1.0, 2.0, nan], dtype)
    calibration = fit_calibration(method, predicted, truth, extreme=2.0)
    mapped = calibration(np.array([nan, 5.0, nan], dtype))
    assert mapped.dtype == np.float64
    np.testing.assert_allclose(mapped, [nan, 1, nan])
    assert calibration(np.zeros(0, dtype)).shape == (0,)


@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_missing_tokens_change_nothing(method):
    grid = np.linspace(0, 10, 9)
    expected = fitted(method, [0.0, 1.0, 7.0], [0.5, 0.0, 3.0])(grid)
    found = fitted(method, [nan, 0.0, 1.0, 4.0, 7.0], [99.0, 0.5, 0.0, nan, 3.0])(grid)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["linear", "percentile"])
@pytest.mark.parametrize(("predicted", "truth"), [([], []), ([nan, 1.0], [1.0, nan])])
def test_nothing_to_fit_on(method, predicted, truth):
    with pytest.raises(
        JaxplainError, match=rf"^calibration is '{method}', but at none of {len(truth)} tokens"
    ):
        fitted(method, predicted, truth)


def test_methods_differ():
    rng = np.random.default_rng(1)
    predicted, truth = 10 * rng.random(50), rng.standard_normal(50) ** 3
    found = [fitted(method, predicted, truth)(np.array([9.0]))[0] for method in METHODS]
    assert len(set(found)) == 3
