"""The bootstrap: weights that depend on nothing but their document, and intervals that cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxplain.corpora.hashing import lottery
from jaxplain.scoring.bootstrap import document_weights, interval, mean_interval
from jaxplain.scoring.metrics import METRICS

# Weights.


def test_weights_are_poisson():
    weight_RN = document_weights(np.arange(2000) * 7919, 500, 0)
    assert weight_RN.shape == (500, 2000)
    assert weight_RN.dtype == np.float64
    expected = [math.exp(-1) / math.factorial(count) for count in range(6)]
    found = [(weight_RN == count).mean() for count in range(6)]
    np.testing.assert_allclose(found, expected, atol=2.5e-3)  # five standard errors
    assert weight_RN.mean() == pytest.approx(1, abs=5e-3)
    assert weight_RN.var() == pytest.approx(1, abs=1e-2)
    assert weight_RN.max() >= 7
    np.testing.assert_allclose(weight_RN.mean(0), 1, atol=5 / np.sqrt(500))
    np.testing.assert_allclose(weight_RN.mean(1), 1, atol=5 / np.sqrt(2000))


def test_weights_of_documents_and_resamples_are_independent():
    weight_RN = document_weights(np.arange(300), 400, 3)
    for correlations in (np.corrcoef(weight_RN), np.corrcoef(weight_RN.T)):
        others = correlations[~np.eye(len(correlations), dtype=bool)]
        assert np.abs(others).max() < 0.35
        assert np.abs(others.mean()) < 0.005


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(0, 30), st.randoms())
def test_weights_depend_on_the_document_alone(documents, cut, random):
    weight_RN = document_weights(np.array(documents, np.int64), 5, 1)
    order = list(range(len(documents)))
    random.shuffle(order)
    shuffled = document_weights(np.array(documents, np.int64)[order], 5, 1)
    np.testing.assert_array_equal(shuffled, weight_RN[:, order])
    parts = [document_weights(np.array(part, np.int64), 5, 1) for part in (documents[:cut], documents[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), weight_RN)
    np.testing.assert_array_equal(document_weights(np.array(documents * 2, np.int64), 3, 1)[:, : len(order)],
                                  weight_RN[:3])  # fmt: skip


def test_tokens_of_one_document_share_its_weights():
    weight_RN = document_weights(np.array([5, 9, 5, 5, 9]), 50, 0)
    np.testing.assert_array_equal(weight_RN[:, [0, 1, 0, 0, 1]], weight_RN)
    assert (weight_RN[:, 0] != weight_RN[:, 1]).any()


def test_seeds_differ():
    documents = np.arange(100)
    assert (document_weights(documents, 4, 0) != document_weights(documents, 4, 1)).mean() > 0.5


def test_weights_never_change():
    """Scores of different runs are compared resample by resample; change these numbers only knowingly."""
    found = document_weights(np.array([0, 1, 2**62, -3]), 3, 0)
    assert found.tolist() == [[0, 1, 2, 2], [0, 0, 2, 1], [0, 1, 1, 0]]


def test_weights_are_independent_of_the_lottery():
    """The exemplars that are drawn at random must not be those that weigh the most."""
    documents = np.arange(5000)
    for seed in (0, 17):
        weight_N = document_weights(documents, 1, seed)[0]
        drawn_N = lottery(seed, documents, np.zeros(5000, np.int64))
        assert abs(np.corrcoef(weight_N, drawn_N)[0, 1]) < 0.05


# Intervals.


def test_interval_of_percentiles():
    values = np.random.default_rng(0).permutation(101).astype(np.float64)
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values, 0.8) == pytest.approx((10, 90))
    assert interval(np.array([4.0])) == (4, 4)


def test_resamples_without_a_value_are_ignored_up_to_half():
    values = np.array([1.0, np.nan, 3.0, np.nan])
    assert interval(values, 1.0) == (1, 3)
    assert np.isnan(interval(np.array([1.0, np.nan, np.nan]))).all()
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()
    assert np.isnan(interval(np.zeros(0))).all()


def test_interval_covers_a_known_mean():
    """Of 95 % intervals of a mean over 100 documents of 3 tokens each, about 95 % hold it."""
    rng = np.random.default_rng(1)
    covered, naively = 0, 0
    document_N = np.repeat(np.arange(100), 3)
    for trial in range(400):
        value_N = 2.0 + np.repeat(rng.standard_normal(100), 3) + 0.1 * rng.standard_normal(300)
        for place, ids in enumerate((document_N, np.arange(300))):
            weight_RN = document_weights(ids + 1000 * trial, 300, 0)
            low, high = interval(weight_RN @ value_N / weight_RN.sum(1))
            covered, naively = (
                covered + (place == 0) * (low < 2 < high),
                naively + (place == 1) * (low < 2 < high),
            )
    assert 0.915 < covered / 400 < 0.975
    assert naively / 400 < 0.85, "tokens of one document are not independent"


def test_interval_of_a_correlation():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        truth = rng.standard_normal(150)
        predicted = 0.6 * truth + 0.8 * rng.standard_normal(150)
        weight_RN = document_weights(np.arange(150) + 1000 * trial, 300, 0)
        low, high = interval(METRICS["correlation"](truth, predicted, weight_RN))
        covered += low < 0.6 < high
    assert 0.9 < covered / 200 < 0.985


# Means over neurons.


def test_mean_interval_of_equal_neurons():
    values_FR = np.broadcast_to(np.arange(101.0), (4, 101))
    assert mean_interval(values_FR, seed=0) == pytest.approx((2.5, 97.5))
    assert mean_interval(values_FR, seed=0, level=0.8) == pytest.approx((10, 90))
    assert mean_interval(values_FR.astype(np.float32), seed=0) == pytest.approx((2.5, 97.5))


def test_mean_interval_covers_what_neurons_stand_for():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        values_F = 1.0 + rng.standard_normal(60)
        low, high = mean_interval(np.repeat(values_F[:, None], 400, axis=1), seed=trial)
        covered += low < 1 < high
        assert high - low == pytest.approx(2 * 1.96 * values_F.std() / np.sqrt(60), rel=0.25)
    assert 0.91 < covered / 300 < 0.975


def test_what_all_neurons_share_does_not_average_out():
    """Neurons are scored on the same documents: chance in those stays, however many neurons there are."""
    rng = np.random.default_rng(4)
    values_FR = rng.standard_normal((500, 1)) * 0.01 + rng.standard_normal((1, 1000))
    low, high = mean_interval(values_FR, seed=0)
    assert high - low == pytest.approx(2 * 1.96, rel=0.1)


def test_mean_interval_depends_on_its_seed():
    values_FR = np.random.default_rng(5).standard_normal((10, 50))
    assert mean_interval(values_FR, seed=0) == mean_interval(values_FR, seed=0)
    assert mean_interval(values_FR, seed=0) != mean_interval(values_FR, seed=1)


def test_neurons_without_a_value_are_left_out():
    values_FR = np.random.default_rng(6).standard_normal((10, 60))
    nothing = np.full((1, 60), np.nan)
    expected = mean_interval(values_FR, seed=0)
    assert mean_interval(np.concatenate([nothing, values_FR[:4], nothing, values_FR[4:]]), seed=0) == expected
    assert np.isnan(mean_interval(nothing, seed=0)).all()
    assert np.isnan(mean_interval(np.zeros((0, 60)), seed=0)).all()


def test_a_missing_resample_of_one_neuron_is_left_out():
    values_FR = np.full((3, 20), 2.0)
    values_FR[0, 3:8] = np.nan
    values_FR[:, 10] = np.nan
    assert mean_interval(values_FR, seed=0) == pytest.approx((2, 2))
    values_FR[:, :12] = np.nan
    assert np.isnan(mean_interval(values_FR, seed=0)).all()
