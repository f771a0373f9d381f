"""Quantiles against numpy's over all tokens: exact in the tails, within the stated error between them."""

import numpy as np
import pytest

from jaxplain.configs.extraction import QUANTILES
from jaxplain.store.quantiles import lower_tail, quantiles, upper_tail

LEVELS = np.array(QUANTILES)


def kept(acts_NTF, k, *, lowest=False):
    """Scores and activations of the k sequences with the highest (or lowest) activations, in float32."""
    sign = -1 if lowest else 1
    order_FN = np.argsort(-(sign * acts_NTF).max(1).T, axis=1, kind="stable")[:, :k]
    acts_FRT = np.stack([acts_NTF[order, :, f] for f, order in enumerate(order_FN)])
    score_FR = sign * (sign * acts_FRT).max(2)
    missing = k - score_FR.shape[1]
    widths = ((0, 0), (0, missing))
    return (
        np.pad(score_FR, widths, constant_values=np.nan),
        np.pad(acts_FRT, (*widths, (0, 0)), constant_values=np.nan),
    )


def estimated(acts_NTF, *, k, sampled, levels=LEVELS, upper=True, lower=True, seed=0):
    flat = acts_NTF.reshape((-1, acts_NTF.shape[2]))
    drawn = np.random.default_rng(seed).permutation(len(flat))[:sampled]
    return quantiles(
        levels,
        len(flat),
        flat[drawn].T,
        upper=upper_tail(*kept(acts_NTF, k)) if upper else None,
        lower=lower_tail(*kept(acts_NTF, k, lowest=True)) if lower else None,
    )


def exact(acts_NTF, levels=LEVELS):
    return np.quantile(acts_NTF.reshape((-1, acts_NTF.shape[2])).astype(np.float64), levels, axis=0).T


def heavy(sequences, tokens, neurons, seed=0):
    """Student's t with two degrees of freedom, whose variance is infinite, skewed by its exponent."""
    values = np.random.default_rng(seed).standard_t(2, (sequences, tokens, neurons))
    return np.where(values > 0, np.abs(values) ** 1.5, values).astype(np.float32)


def test_ten_million_heavy_tailed_draws():
    acts_NTF = heavy(100_000, 100, 1)
    found, expected = estimated(acts_NTF, k=100, sampled=2048)[0], exact(acts_NTF)[0]
    tail = (LEVELS <= 1e-6) | (LEVELS >= 1 - 1e-6)
    np.testing.assert_allclose(found[tail], expected[tail], rtol=1e-6)
    # Elsewhere the share of tokens below what was found is near the level.
    shares = np.searchsorted(np.sort(acts_NTF.ravel()), found) / acts_NTF.size
    assert np.abs(shares - LEVELS).max() < 0.03
    assert (np.diff(found) >= 0).all()


def test_the_error_bound_holds_as_often_as_it_says():
    """Over many samples, more than 0.03 off for about one in twenty at most."""
    acts_NTF = heavy(20_000, 5, 1)
    ordered = np.sort(acts_NTF.ravel())
    levels = np.linspace(0.01, 0.99, 99)
    rng = np.random.default_rng(0)
    off = []
    for _ in range(200):
        sample_FM = rng.choice(acts_NTF.ravel(), (1, 2048), replace=False)
        found = quantiles(levels, acts_NTF.size, sample_FM, upper=None, lower=None)[0]
        off.append(np.abs(np.searchsorted(ordered, found) / len(ordered) - levels).max())
    assert 0.01 < np.mean(np.array(off) > 0.03) < 0.07


def test_the_tails_are_exact_wherever_the_kept_sequences_reach():
    acts_NTF = heavy(500, 10, 6)
    levels = np.linspace(0, 1, 5001)
    found, expected = estimated(acts_NTF, k=50, sampled=300, levels=levels), exact(acts_NTF, levels)
    highest_F, lowest_F = kept(acts_NTF, 50)[0][:, -1], kept(acts_NTF, 50, lowest=True)[0][:, -1]
    for inside in (expected > highest_F[:, None], expected < lowest_F[:, None]):
        for f in range(6):
            # The innermost may lie between a token of the tail and one of the body.
            place = np.flatnonzero(inside[f])[1:-1]
            assert len(place) > 20
            np.testing.assert_allclose(found[f, place], expected[f, place], rtol=1e-6)


def test_tails_and_body_join_without_a_jump():
    """No step between neighbouring levels is much larger than those of the tokens themselves."""
    acts_NTF = np.random.default_rng(0).uniform(-1, 1, (2000, 10, 3)).astype(np.float32)
    levels = np.linspace(0, 1, 2001)
    found = estimated(acts_NTF, k=60, sampled=4096, levels=levels)
    assert (np.diff(found, axis=1) >= 0).all()
    assert np.diff(found, axis=1).max() < 0.012


def test_ranks_are_counted_through_from_tail_to_body():
    """Tails of a tenth of all tokens each, which the body must neither count again nor forget."""
    acts_NTF = np.random.default_rng(0).uniform(-1, 1, (2000, 10, 3)).astype(np.float32)
    tail = upper_tail(*kept(acts_NTF, 1300))
    assert (tail.count_F > 0.08 * 20_000).all()
    levels = np.linspace(0, 1, 101)
    found = estimated(acts_NTF, k=1300, sampled=8192, levels=levels)
    assert np.abs((found + 1) / 2 - levels).max() < 0.02


@pytest.mark.parametrize("sequences", [1, 7, 40])
def test_where_every_sequence_is_kept_all_are_exact(sequences):
    acts_NTF = heavy(sequences, 10, 4)
    found = estimated(acts_NTF, k=50, sampled=3)
    np.testing.assert_allclose(found, exact(acts_NTF), rtol=1e-6)


def test_tokens_that_do_not_count_are_nowhere():
    acts_NTF = heavy(200, 10, 2)
    masked = acts_NTF.copy()
    masked[:, :3] = np.nan
    upper, lower = (np.nan_to_num(masked, nan=value) for value in (-np.inf, np.inf))
    tails = []
    for array, lowest in ((upper, False), (lower, True)):
        score, acts = kept(array, 20, lowest=lowest)
        tails.append((score, np.where(np.isinf(acts), np.nan, acts)))
    counted = acts_NTF[:, 3:]
    found = quantiles(
        LEVELS,
        counted.size // 2,
        np.full((2, 5), np.nan),
        upper=upper_tail(*tails[0]),
        lower=lower_tail(*tails[1]),
    )
    expected = exact(counted)
    edge = (LEVELS < 1e-3) | (LEVELS > 1 - 1e-3)
    np.testing.assert_allclose(found[:, edge], expected[:, edge], rtol=1e-6)


@pytest.mark.parametrize(("upper", "lower"), [(False, False), (True, False), (False, True)])
def test_without_a_kind_its_tail_is_the_sample_s(upper, lower):
    acts_NTF = heavy(3000, 10, 2)
    levels = np.array([0.0, *LEVELS, 1.0])
    found = estimated(acts_NTF, k=20, sampled=2048, levels=levels, upper=upper, lower=lower)
    ordered = np.sort(acts_NTF.reshape((-1, 2)), axis=0)
    for f in range(2):
        assert np.abs(np.searchsorted(ordered[:, f], found[f]) / len(ordered) - levels).max() < 0.03
    assert (found[:, -1] == ordered[-1]).all() == upper
    assert (found[:, 0] == ordered[0]).all() == lower


def test_a_constant_neuron_has_one_value():
    acts_NTF = np.full((300, 4, 2), -0.25, np.float32)
    assert (estimated(acts_NTF, k=10, sampled=64) == -0.25).all()


def test_few_sampled_tokens_or_none():
    acts_NTF = heavy(300, 10, 2)
    for sampled in (0, 1, 2):
        found = estimated(acts_NTF, k=10, sampled=sampled)
        assert np.isfinite(found).all()
        assert (np.diff(found, axis=1) >= 0).all()


def test_no_tokens_at_all():
    nothing = np.full((3, 5), np.nan)
    empty = (np.full((3, 2), np.nan, np.float32), np.full((3, 2, 4), np.nan, np.float16))
    for upper, lower in ((None, None), (upper_tail(*empty), lower_tail(*empty))):
        found = quantiles(LEVELS, 0, nothing, upper=upper, lower=lower)
        assert np.isnan(found).all()
        assert found.shape == (3, len(LEVELS))


def test_activations_rounded_to_float16_keep_their_ranks():
    """A threshold between two float16 numbers leaves out no token, and takes none twice."""
    acts_NTF = heavy(1000, 10, 3)
    score, acts = kept(acts_NTF, 30)
    tail = upper_tail(score, acts.astype(np.float16))
    rounded = acts_NTF.astype(np.float16)
    for f in range(3):
        assert tail.count_F[f] == (rounded[:, :, f] > np.float16(score[f, -1])).sum() + 1
        np.testing.assert_array_equal(
            tail.value_FN[f, : tail.count_F[f]], -np.sort(-rounded[:, :, f].ravel())[: tail.count_F[f]]
        )


def test_activations_beyond_float16_are_its_largest():
    """As they are stored; their scores are not."""
    acts_NTF = heavy(200, 10, 1)
    acts_NTF[:30, 0] = 1e6
    score, acts = kept(acts_NTF, 20)
    assert (score == 1e6).all()
    tail = upper_tail(score, acts.clip(max=np.finfo(np.float16).max).astype(np.float16))
    assert tail.threshold_F.tolist() == [65504]
    assert tail.value_FN[:, : tail.count_F[0]].tolist() == [[65504]]
