"""Exemplars by strata: against brute force over the draws, on every mesh, and the split's quantiles."""

import numpy as np
import pytest

from jaxplain.exemplars.extraction import _sequences
from jaxplain.exemplars.merging import merge_top
from jaxplain.exemplars.strata import RankedSequences, choose, kept_of_draws, plan_strata
from tests.exemplars.test_reduction import MESHES, draw, drawn_from, make_mesh, reduced

LEVELS = (0.25, 0.5, 0.75, 0.9, 0.99)


def in_strata(highest_NF, turn_N, strata, wanted):
    """Sequence and stratum of each neuron's exemplars, strongest first, one draw and stratum at a time."""
    found, kept = [], kept_of_draws(strata)
    for highest_N in highest_NF.T:
        edges = []
        for low, _, drawn in strata:
            scores = sorted((highest_N[n] for n in np.flatnonzero(turn_N < drawn)), reverse=True)
            above = [score for rank, score in enumerate(scores) if 1 - (rank + 0.5) / drawn >= low]
            edges.append(max([*edges, above[-1] if above else np.inf]))
        chosen = []
        for number, stratum in enumerate(strata):
            high = [*edges, np.inf][number + 1]
            drawn = sorted(np.flatnonzero(turn_N < stratum.drawn), key=lambda n: (-highest_N[n], n))
            inside = [n for n in drawn[: kept[stratum.drawn]] if edges[number] <= highest_N[n] < high]
            chosen += [(-number, -highest_N[n], n) for n in sorted(inside, key=lambda n: turn_N[n])[:wanted]]
        found.append([(int(n), -number) for number, _, n in sorted(chosen)])
    return found


def ranked_of(highest_NF, turn_N, strata):
    """The sequences of each draw as the reduction would keep them, with activations that tell them apart."""
    ranked = {}
    for drawn, kept in kept_of_draws(strata).items():
        ids = np.flatnonzero(turn_N < drawn)
        order_FR = ids[np.argsort(-highest_NF[ids], axis=0, kind="stable")].T[:, :kept]
        missing = ((0, 0), (0, kept - order_FR.shape[1]))
        score_FR = np.pad(np.take_along_axis(highest_NF.T, order_FR, 1), missing, constant_values=np.nan)
        ranked[drawn] = RankedSequences(
            score_FR.astype(np.float32),
            np.pad(order_FR, missing, constant_values=-1).astype(np.int32),
            np.repeat(score_FR[:, :, None], 2, axis=2).astype(np.float32),
        )
    return ranked


def chosen_of(highest_NF, turn_N, strata, wanted):
    return choose(strata, ranked_of(highest_NF, turn_N, strata), lambda n: turn_N[n], wanted=wanted)


@pytest.mark.parametrize("rows", [1, 3, 30, 100, 1000])
@pytest.mark.parametrize("levels", [LEVELS, (), (0.1, 0.15, 0.9)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_brute_force(rows, levels, ties):
    rng = np.random.default_rng(rows)
    highest_NF = rng.integers(-3, 4, (rows, 5)) if ties else rng.standard_normal((rows, 5))
    highest_NF = highest_NF.astype(np.float32)
    turn_N = rng.permutation(rows)
    strata = plan_strata(levels, wanted=3, rows=rows)
    stratum_FR, found = chosen_of(highest_NF, turn_N, strata, 3)
    assert stratum_FR.shape == (5, 3 * (len(levels) + 1))
    for f, expected in enumerate(in_strata(highest_NF, turn_N, strata, 3)):
        filled = len(expected)
        got = [*zip(found.sequence_NR[f, :filled].tolist(), stratum_FR[f, :filled].tolist(), strict=True)]
        assert got == expected if not ties else sorted(got) == sorted(expected)
        np.testing.assert_array_equal(found.score_NR[f, :filled], highest_NF[[n for n, _ in expected], f])
        np.testing.assert_array_equal(found.activation_NRT[f, :filled, 1], found.score_NR[f, :filled])
        assert (found.sequence_NR[f, filled:] == -1).all()
        assert (stratum_FR[f, filled:] == -1).all()
        assert np.isnan(found.score_NR[f, filled:]).all()
        assert np.isnan(found.activation_NRT[f, filled:]).all()


def test_nothing_to_draw_from():
    strata = plan_strata(LEVELS, wanted=2, rows=0)
    empty = RankedSequences(
        np.full((3, 1), np.nan, np.float32), np.full((3, 1), -1), np.full((3, 1, 4), np.nan, np.float16)
    )
    assert kept_of_draws(strata) == {0: 1}
    stratum_FR, found = choose(strata, {0: empty}, lambda n: n, wanted=2)
    assert (stratum_FR == -1).all()
    assert found.activation_NRT.shape == (3, 12, 4)
    assert found.activation_NRT.dtype == np.float16


def test_where_all_are_drawn_strata_are_those_of_the_split():
    rng = np.random.default_rng(1)
    highest_NF = rng.standard_t(2, (1000, 4)).astype(np.float32)
    strata = plan_strata((0.5, 0.8), wanted=200, rows=1000)
    assert {stratum.drawn for stratum in strata} == {1000}
    stratum_FR, found = chosen_of(highest_NF, rng.permutation(1000), strata, 200)
    rank_NF = highest_NF.argsort(0).argsort(0)
    for f in range(4):
        for number, (low, high) in enumerate(((0, 500), (500, 800), (800, 1000))):
            ranks = rank_NF[found.sequence_NR[f][stratum_FR[f] == number], f]
            assert len(ranks) == 200
            assert low <= ranks.min() <= ranks.max() < high


def test_edges_are_off_by_as_much_as_is_said():
    """With n = 5, by a quarter of the stratum's width at most (one standard error)."""
    rng = np.random.default_rng(2)
    rows, wanted = 20_000, 5
    highest_NF = rng.standard_t(2, (rows, 1)).astype(np.float32)
    order = np.sort(highest_NF[:, 0])
    strata = plan_strata(LEVELS, wanted=wanted, rows=rows)
    off = []
    for _ in range(150):
        turn_N = rng.permutation(rows)
        ranked = ranked_of(highest_NF, turn_N, strata)
        edges = [ranked[stratum.drawn].score_NR[0, stratum.above - 1] for stratum in strata[1:]]
        shares = np.searchsorted(order, edges) / rows
        off.append([(q - s.low) / (s.high - s.low) for q, s in zip(shares, strata[1:], strict=True)])
    deviation = np.sqrt(np.mean(np.square(off), axis=0))
    assert (deviation < 0.27).all()
    assert (deviation > 0.12).all(), "the bound is not an idle one"


def test_every_stratum_is_full_where_there_are_sequences_enough():
    rng = np.random.default_rng(3)
    highest_NF = rng.standard_normal((5000, 200)).astype(np.float32)
    strata = plan_strata(LEVELS, wanted=5, rows=5000)
    stratum_FR, found = chosen_of(highest_NF, rng.permutation(5000), strata, 5)
    assert (stratum_FR == np.repeat(np.arange(6)[::-1], 5)).all()
    assert (np.diff(found.score_NR, axis=1) <= 0).all(), "strongest first, in all strata together"


def test_a_stratum_s_sequences_are_a_fair_sample_of_it():
    """Every sequence of a stratum has the same chance, whatever its maximum."""
    rows, wanted = 60, 4
    highest_NF = np.arange(rows, dtype=np.float32)[:, None]
    strata = plan_strata((0.5,), wanted=wanted, rows=rows)
    rng = np.random.default_rng(4)
    times = np.zeros(rows)
    for _ in range(1500):
        _, found = chosen_of(highest_NF, rng.permutation(rows), strata, wanted)
        np.add.at(times, found.sequence_NR[0], 1)
    # Away from the edges, where the draw's own quantile is now on this side, now on that.
    inner = np.r_[0:20, 40:60]
    assert times.sum() == 1500 * 2 * wanted
    # Poisson's 4 standard deviations about the mean.
    assert np.abs(times[inner] - times[inner].mean()).max() < 4 * np.sqrt(times[inner].mean())


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("levels", [None, 6])
def test_the_reduction_keeps_the_strongest_of_every_draw(shape, levels):
    acts_NTF, counted_NT, lottery_N = draw(1, 91, 5, 16, levels=levels, share_counted=0.4)
    strata = plan_strata((0.5, 0.9), wanted=2, rows=int(counted_NT.any(1).sum()))
    kept = kept_of_draws(strata)
    assert len(kept) == 3
    mesh = make_mesh(*shape)
    reduction = reduced(acts_NTF, counted_NT, lottery_N, 2, 16, mesh, draws=kept)
    turn_N = drawn_from(counted_NT, 0, max(kept)).turns(np.arange(91))
    highest_NF = np.where(counted_NT[:, :, None], acts_NTF, -np.inf).max(1)
    for drawn, top in reduction.draws.items():
        found = _sequences(merge_top(top, mesh=mesh), slice(16))
        ids = np.flatnonzero(turn_N < drawn)
        assert len(ids) == drawn
        for f in range(16):
            expected = ids[np.argsort(-highest_NF[ids, f], kind="stable")][: kept[drawn]]
            np.testing.assert_array_equal(found.sequence_NR[f], expected)
            np.testing.assert_array_equal(found.score_NR[f], highest_NF[expected, f])
            np.testing.assert_array_equal(
                found.activation_NRT[f],
                np.where(counted_NT[expected], acts_NTF[expected, :, f], np.nan).astype(np.float16),
            )
