"""Metrics: against scikit-learn and NumPy, worked by hand, and with weights against repeated tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import d2_absolute_error_score, r2_score

from jaxplain.scoring.metrics import (
    METRICS,
    Measured,
    correlation_per_sequence,
    is_constant,
    leave_out_missing,
    measure,
    measure_per_sequence,
)

NAMES = list(METRICS)


def uncentred(truth, predicted):
    return 1 - ((truth - predicted) ** 2).sum() / (truth**2).sum()


def about_the_mean(truth, predicted):
    return 1 - np.abs(truth - predicted).sum() / np.abs(truth - truth.mean()).sum()


REFERENCES = {
    "correlation": lambda truth, predicted: np.corrcoef(truth, predicted)[0, 1],
    "r2_centred": r2_score,
    "r2_uncentred": uncentred,
    "absolute_deviation_explained_mean": about_the_mean,
    "absolute_deviation_explained_median": d2_absolute_error_score,
}


def values(name, truth, predicted, weight=None):
    return METRICS[name](np.array(truth), np.array(predicted), weight)


def made_up(tokens, seed, dtype=np.float64, offset=0.0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(tokens) ** 3 + offset
    predicted = 0.6 * truth + 0.3 * rng.standard_normal(tokens) + 0.2
    return truth.astype(dtype), predicted.astype(dtype)


# Against others.


def test_every_metric_has_a_reference():
    assert set(REFERENCES) == set(METRICS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 3, 10, 1001])
@pytest.mark.parametrize("offset", [0.0, -3.0, 1000.0])
def test_as_the_reference(name, tokens, offset):
    truth, predicted = made_up(tokens, seed=tokens, offset=offset)
    expected = REFERENCES[name](truth, predicted)
    np.testing.assert_allclose(values(name, truth, predicted), [expected], rtol=1e-9, atol=1e-11)
    measured = measure(name, truth, predicted)
    assert measured.value == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert measured.reason is None


@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_is_computed_in_float64(name):
    truth, predicted = made_up(500, seed=1, dtype=np.float16)
    expected = REFERENCES[name](truth.astype(np.float64), predicted.astype(np.float64))
    assert values(name, truth, predicted)[0] == pytest.approx(expected, rel=1e-12)
    assert measure(name, truth, predicted).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("r2_centred", r2_score), ("absolute_deviation_explained_median", d2_absolute_error_score)],
)
def test_fractional_weights_as_scikit_learn(name, reference):
    truth, predicted = made_up(40, seed=2)
    weight_RN = np.random.default_rng(3).random((5, 40))
    expected = [reference(truth, predicted, sample_weight=weight_N) for weight_N in weight_RN]
    np.testing.assert_allclose(values(name, truth, predicted, weight_RN), expected, rtol=1e-12)


# By hand.


def test_by_hand():
    truth, predicted = [0.0, 0.0, 1.0, 5.0], [0.0, 1.0, 1.0, 3.0]
    # Mean 1.5, median between 0 and 1; squares of the residuals sum to 5, absolute values to 3.
    assert values("r2_centred", truth, predicted)[0] == pytest.approx(1 - 5 / 17)
    assert values("r2_uncentred", truth, predicted)[0] == pytest.approx(1 - 5 / 26)
    assert values("absolute_deviation_explained_mean", truth, predicted)[0] == pytest.approx(1 - 3 / 7)
    assert values("absolute_deviation_explained_median", truth, predicted)[0] == pytest.approx(1 - 3 / 6)
    assert values("correlation", truth, predicted)[0] == pytest.approx(8.5 / np.sqrt(17 * 4.75))


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_prediction_has_1(name):
    truth, _ = made_up(30, seed=4)
    assert values(name, truth, truth)[0] == pytest.approx(1, abs=1e-15)


def test_the_simplest_predictions_have_0():
    truth = np.array([0.0, 1.0, 2.0, 9.0, 3.0])
    assert measure("r2_centred", truth, np.full(5, 3.0)).value == 0
    assert measure("r2_uncentred", truth, np.zeros(5)).value == 0
    assert measure("absolute_deviation_explained_mean", truth, np.full(5, 3.0)).value == 0
    assert measure("absolute_deviation_explained_median", truth, np.full(5, 2.0)).value == 0


def test_correlation_is_never_above_1():
    for seed in range(200):
        truth, _ = made_up(7, seed=seed)
        for slope in (0.1, 3.3, -0.7):
            assert abs(values("correlation", truth, truth * slope + 0.1)[0]) <= 1


# What cannot be computed.


def same(measured, reason):
    return np.isnan(measured.value) and measured.reason == reason


NEARLY_CONSTANT = [
    np.full(10, 0.1),
    np.full(10, 0.1, np.float32),
    np.full(10, 1e20),
    np.full(10, -7e-20),
    np.array([0.1 + 0.2, 0.3] * 5),
    np.array([1 / 3, np.nextafter(np.float32(1 / 3), np.float32(1))] * 5, np.float32),
    np.zeros(10),
]


@pytest.mark.parametrize("constant", NEARLY_CONSTANT, ids=repr)
def test_constant_truth(constant):
    predicted = np.arange(10.0)
    for name in NAMES:
        if name == "r2_uncentred":
            expected = "the truth is 0 everywhere" if not constant.any() else None
            assert measure(name, constant, predicted).reason == expected
        else:
            assert same(measure(name, constant, predicted), "the truth is constant")
            assert same(measure(name, constant, constant), "the truth is constant")


@pytest.mark.parametrize("constant", NEARLY_CONSTANT, ids=repr)
def test_constant_prediction(constant):
    truth = np.arange(10.0)
    assert same(measure("correlation", truth, constant), "the prediction is constant")
    for name in NAMES[1:]:
        measured = measure(name, truth, constant)
        assert np.isfinite(measured.value)
        assert measured.reason is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_varies_little_is_not_constant(scale):
    truth = scale * np.array([1.0, 1.0, 1.00001])
    assert not is_constant(truth)
    assert measure("correlation", truth, np.array([0.0, 0.0, 1.0])).value == pytest.approx(1)
    mostly_silent = np.where(np.arange(100_000) == 7, scale, 0.0)
    assert measure("correlation", mostly_silent, mostly_silent).value == pytest.approx(1)


def test_no_values_are_constant():
    assert is_constant(np.zeros(0))
    assert is_constant(np.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_one_token(name):
    measured = measure(name, np.array([np.nan, 2.0, 1.0]), np.array([1.0, 1.0, np.nan]))
    if name == "r2_uncentred":
        assert measured == Measured(value=0.75)
    else:
        assert same(measured, "only one token")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("truth", "predicted"), [([], []), ([np.nan, 1.0], [1.0, np.nan]), ([np.nan] * 3, [np.nan] * 3)]
)
def test_no_token_counts(name, truth, predicted):
    assert same(measure(name, np.array(truth), np.array(predicted)), "no token counts")


def test_squares_too_small_to_represent():
    tiny = np.array([0.0, 1e-200])
    for name in ("correlation", "r2_centred", "r2_uncentred"):
        measured = measure(name, tiny, tiny)
        assert np.isnan(measured.value)
        assert measured.reason is not None


def test_missing_tokens_are_left_out():
    truth = np.array([1.0, np.nan, 3.0, 4.0, np.inf, 9.0], np.float32)
    predicted = np.array([0.0, 1.0, np.nan, 2.0, 3.0, -np.inf], np.float32)
    tokens = leave_out_missing(truth, predicted)
    assert tokens.truth_N.tolist() == [1, 4]
    assert tokens.predicted_N.tolist() == [0, 2]
    assert tokens.truth_N.dtype == tokens.predicted_N.dtype == np.float64
    assert tokens.counted_M.tolist() == [True, False, False, True, False, False]
    assert tokens.left_out == 4


@pytest.mark.parametrize("name", NAMES)
def test_missing_tokens_change_nothing(name):
    truth, predicted = made_up(20, seed=5)
    expected = measure(name, truth, predicted)
    truth, predicted = np.insert(truth, [0, 7], np.nan), np.insert(predicted, [0, 7], 5.0)
    assert measure(name, truth, predicted) == expected
    assert measure(name, np.append(truth, 8.0), np.append(predicted, np.nan)) == expected


# Weights.

integers = st.integers(-3, 3).map(float)
tokens = st.lists(st.tuples(integers, integers | st.floats(-9, 9, width=32), *[st.integers(0, 3)] * 3))


@pytest.mark.parametrize("name", NAMES)
@given(tokens)
def test_weight_2_is_the_token_twice(name, tokens):
    truth, predicted, *weight_RN = np.array(tokens, np.float64).reshape(-1, 5).T
    weighted_R = values(name, truth, predicted, np.array(weight_RN))
    assert weighted_R.shape == (3,)
    for weighted, weight_N in zip(weighted_R, weight_RN, strict=True):
        times = weight_N.astype(int)
        repeated = values(name, np.repeat(truth, times), np.repeat(predicted, times))
        np.testing.assert_allclose(weighted, repeated[0], rtol=1e-9, atol=1e-9)
        assert not np.isinf(weighted)


@pytest.mark.parametrize("name", NAMES)
def test_resamples_without_a_value_leave_the_others(name):
    truth, predicted = made_up(6, seed=6)
    weight_RN = np.array([np.ones(6), np.zeros(6), np.full(6, 0.5)])
    first, second, third = values(name, truth, predicted, weight_RN)
    assert np.isnan(second)
    assert first == pytest.approx(third)
    assert first == pytest.approx(REFERENCES[name](truth, predicted))


@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:])
@pytest.mark.parametrize("other", [1000.0, -1000.0])
def test_a_resample_may_be_constant_where_the_tokens_are_not(name, other):
    truth, predicted = np.array([other, *[0.1] * 9]), np.arange(10.0)
    weight_RN = np.array([[0.0, *[3.0] * 9], np.ones(10)])
    assert np.isnan(values(name, truth, predicted, weight_RN)).tolist() == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_order_of_tokens_does_not_matter(name):
    truth, predicted = made_up(50, seed=7)
    weight_RN = np.random.default_rng(8).integers(0, 4, (3, 50)).astype(np.float64)
    order = np.random.default_rng(9).permutation(50)
    np.testing.assert_allclose(
        values(name, truth[order], predicted[order], weight_RN[:, order]),
        values(name, truth, predicted, weight_RN),
        rtol=1e-12,
    )


# Within sequences.


def test_correlation_within_sequences_by_hand():
    sequence = np.array([7, 2, 7, 2, 7, 2, 5, 5, 9])
    truth = np.array([1.0, 0.0, 2.0, 1.0, 3.0, 0.0, 4.0, 4.0, 8.0])
    predicted = np.array([1.0, 1.0, 2.0, 0.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    # 7 has correlation 1, 2 has -1, 5 is constant and 9 is but one token.
    assert correlation_per_sequence(truth, predicted, sequence).tolist() == [pytest.approx(0)]
    predicted[1] = 0.0
    expected = (1 + np.corrcoef([0, 1, 0], [0, 0, 1])[0, 1]) / 2
    assert correlation_per_sequence(truth, predicted, sequence)[0] == pytest.approx(expected)
    measured = measure_per_sequence(
        np.append([np.nan, 0.0], truth), np.append([3.0, np.nan], predicted), np.append([7, 2], sequence)
    )
    assert measured.value == pytest.approx(expected)
    assert measured.reason is None


def test_it_differs_from_the_pooled_one():
    truth, predicted = np.array([0.0, 1.0, 10.0, 11.0]), np.array([1.0, 0.0, 11.0, 10.0])
    assert measure_per_sequence(truth, predicted, np.array([0, 0, 1, 1])).value == pytest.approx(-1)
    assert measure("correlation", truth, predicted).value > 0.9


@given(
    st.lists(
        st.tuples(st.lists(st.tuples(integers, integers), max_size=5), *[st.integers(0, 3)] * 2), max_size=5
    ),
    st.randoms(),
)
def test_weight_2_is_the_sequence_twice(sequences, random):
    rows = [
        (truth, predicted, number, *weights)
        for number, (tokens, *weights) in enumerate(sequences)
        for truth, predicted in tokens
    ]
    random.shuffle(rows)
    truth, predicted, sequence, *weight_RN = np.array(rows, np.float64).reshape(-1, 5).T
    weighted_R = correlation_per_sequence(truth, predicted, sequence.astype(int), np.array(weight_RN))
    for r, weighted in enumerate(weighted_R):
        found = [
            METRICS["correlation"](*np.array(tokens, np.float64).reshape(-1, 2).T, None)[0]
            for tokens, *weights in sequences
            for _ in range(weights[r])
        ]
        computed = [value for value in found if not np.isnan(value)]
        expected = np.mean(computed) if computed else np.nan
        np.testing.assert_allclose(weighted, expected, rtol=1e-9, atol=1e-9)


def test_sequences_have_one_weight():
    weight_RN = np.array([[1.0, 1.0, 2.0], [0.0, 2.0, 2.0]])
    with pytest.raises(ValueError, match="differ in weight"):
        correlation_per_sequence(np.arange(3.0), np.arange(3.0), np.array([4, 4, 6]), weight_RN)


def test_no_sequence_has_a_correlation():
    sequence = np.array([0, 0, 1, 2, 2])
    truth, predicted = np.array([0.1, 0.1, 5.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 0.7, 0.7])
    measured = measure_per_sequence(truth, predicted, sequence)
    assert same(measured, "the truth or the prediction is constant in every sequence")
    assert same(measure_per_sequence(truth, np.full(5, np.nan), sequence), "no token counts")
