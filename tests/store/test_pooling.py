"""Pooled statistics against those of all tokens at once."""

import numpy as np
import pytest

from jaxplain.store.pooling import pooled_statistics
from jaxplain.store.schema import STATISTICS
from tests import oracle

NAMES = STATISTICS


def stored(acts_NF, dtype=np.float32):
    """Statistics of single tokens as a store keeps them."""
    found = oracle.statistics(acts_NF[:, None], np.ones((len(acts_NF), 1), bool))
    return {
        name: np.asarray(values, np.int64 if name == "count" else dtype)
        for name, values in zip(NAMES, found, strict=True)
    }


def draw(tokens, seed, shift=0.0):
    """Skewed activations, some with a mean that is many times their deviation."""
    rng = np.random.default_rng(seed)
    return rng.gumbel(size=(tokens, 4)) * np.array([1, 0.1, 3, 1e-3]) + np.array([0, 20, -1, 0.5]) + shift


@pytest.mark.parametrize("sizes", [(100, 100), (1, 1000), (17, 400, 3), (50,)])
def test_equal_those_of_all_tokens(sizes):
    parts = [draw(size, seed, shift=0.1 * seed) for seed, size in enumerate(sizes)]
    expected = stored(np.concatenate(parts), np.float64)
    exact = pooled_statistics([stored(part, np.float64) for part in parts])
    found = pooled_statistics([stored(part) for part in parts])
    assert found["count"].dtype == np.int64
    for name in NAMES:
        np.testing.assert_allclose(exact[name], expected[name], rtol=1e-8, atol=1e-9, err_msg=name)
        # A mean of 20 with a deviation of 0.1 costs two of float32's seven digits.
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=2e-7)


def test_the_number_of_active_tokens_is_exact():
    """Three million of seven, which float32 shares give back to the token."""
    rng = np.random.default_rng(0)
    counts, active = rng.integers(1, 7_000_000, 50), []
    parts = []
    for count in counts:
        active.append(rng.integers(0, count + 1, 4))
        zeros = np.zeros(4, np.float32)
        parts.append(dict.fromkeys(NAMES, zeros) | {"count": np.full(4, count)})
        parts[-1]["fraction_active"] = (active[-1] / count).astype(np.float32)
    found = pooled_statistics(parts)["fraction_active"]
    np.testing.assert_array_equal(found, np.sum(active, axis=0) / counts.sum())


def test_what_does_not_vary_has_no_variance_by_rounding():
    parts = [stored(np.full((count, 2), 0.1)) for count in (3, 7, 11)]
    for part in parts:
        part["count"] = part["count"] * 1_000_000_007  # so many that their sums are rounded in float64
        part["variance"][:] = 0
        part["skewness"][:] = part["kurtosis"][:] = np.nan
    found = pooled_statistics(parts)
    assert (found["variance"] == 0).all()
    assert np.isnan(found["skewness"]).all()
    assert np.isnan(found["kurtosis"]).all()
    assert (found["mean"].astype(np.float32) == np.float32(0.1)).all()
    # Two constants that differ do vary.
    other = pooled_statistics([parts[0], parts[1] | {"mean": np.full(2, 0.3, np.float32)}])
    np.testing.assert_allclose(other["variance"], 0.04 * 0.21, rtol=1e-5)
    np.testing.assert_allclose(other["skewness"], -0.4 / 0.21**0.5, rtol=1e-5)


def test_parts_without_tokens_and_neurons_that_were_not_asked_for():
    some = stored(draw(100, 0))
    none = {name: np.full(4, np.nan, np.float32) for name in NAMES} | {"count": np.zeros(4, np.int64)}
    found = pooled_statistics([none, some, none])
    for name in NAMES:
        np.testing.assert_array_equal(found[name].astype(some[name].dtype), some[name], name)
    assert pooled_statistics([none, none])["count"].tolist() == [0] * 4
    assert np.isnan(pooled_statistics([none, none])["mean"]).all()
    absent = {name: values.copy() for name, values in some.items()}
    absent["count"][1] = -1
    found = pooled_statistics([absent, absent])
    assert found["count"].tolist() == [200, -1, 200, 200]
    assert np.isnan(found["mean"]).tolist() == [False, True, False, False]
