"""The sharded reduction against brute force, over shapes, meshes, batch sizes, masks and ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxplain.exemplars.draws import Draws
from jaxplain.exemplars.extraction import counted_tokens
from jaxplain.exemplars.merging import merge_partials
from jaxplain.exemplars.moments import Moments, PowerSums, _recentred, merge_moments
from jaxplain.exemplars.reduction import KINDS, Fold, Rows, empty_reduction
from jaxplain.exemplars.token_sample import merge_sample
from tests import oracle

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]


def make_mesh(data, model):
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * model],
    )


@jax.jit
def fold_batch(fold, acts_BTF):
    return fold.fold(acts_BTF).reduction


def drawn_from(counted_NT, tokens, sequences=0):
    """A draw of that many tokens and sequences."""
    rng = np.random.default_rng(9)
    turn_D = rng.permutation(np.flatnonzero(counted_NT.any(1)))[:sequences]
    token_M = np.sort(rng.permutation(np.flatnonzero(counted_NT))[:tokens])
    return Draws(
        rows=int(counted_NT.any(1).sum()),
        tokens=counted_NT.shape[1],
        sequence_D=np.sort(turn_D),
        turn_D=np.argsort(turn_D).astype(np.int32),
        token_M=token_M,
        lottery_M=-np.arange(1, len(token_M) + 1, dtype=np.float32),
    )


def reduce(acts_NTF, counted_NT, lottery_N, *, k, batch, mesh, indices=None, sampled=5):
    """All batches through the real reduction, the last one padded; then the merged answer."""
    reduction = reduced(acts_NTF, counted_NT, lottery_N, k, batch, mesh, indices, sampled)
    return merge_partials(reduction, mesh), merge_moments(reduction.moments)


def reduced(
    acts_NTF,
    counted_NT,
    lottery_N,
    k,
    batch,
    mesh,
    indices=None,
    sampled=5,
    active_above=0.0,
    draws=None,
    summed=None,
    tokens_NT=None,
    vocabulary=0,
):
    """The reduction after all batches; `draws` are the sequences kept of each draw."""
    sequences, tokens, neurons = acts_NTF.shape
    kept = neurons if indices is None else len(indices)
    drawn = drawn_from(counted_NT, sampled, max(draws or [0]))
    tokens_NT = np.zeros((sequences, tokens), np.int32) if tokens_NT is None else tokens_NT
    reduction = empty_reduction(
        kinds=KINDS,
        neurons=kept,
        k=k,
        tokens=tokens,
        sampled_tokens=len(drawn.token_M),
        dtype=jnp.dtype("float16"),
        mesh=mesh,
        draws=draws,
        summed=summed,
        vocabulary=vocabulary,
    )
    for start in range(0, sequences, batch):
        stop = min(start + batch, sequences)
        pad = batch - (stop - start)
        places = drawn.tokens_of(start, batch=batch, shards=mesh.shape["data"])
        rows = Rows(
            tokens_BT=jnp.asarray(np.pad(tokens_NT[start:stop], [(0, pad), (0, 0)], constant_values=-1)),
            counted_BT=jnp.asarray(np.pad(counted_NT[start:stop], [(0, pad), (0, 0)])),
            sequence_B=jnp.arange(start, start + batch, dtype=jnp.int32),
            lottery_B=jnp.asarray(np.pad(lottery_N[start:stop], (0, pad))),
            turn_B=jnp.asarray(drawn.turns(np.arange(start, start + batch))),
            **dict(zip(("drawn_PW", "slot_PW"), map(jnp.asarray, places), strict=True)),
        )
        # Padding rows are full of huge activations, which must not count.
        acts_BTF = np.pad(acts_NTF[start:stop], [(0, pad), (0, 0), (0, 0)], constant_values=1e4)
        fold = Fold(reduction=reduction, rows=rows, neurons=indices, active_above=active_above, mesh=mesh)
        reduction = fold_batch(fold, jnp.asarray(acts_BTF))
    return reduction


def assert_equals_oracle(result, acts_NTF, counted_NT, lottery_N, k):
    ranked, statistics = result
    for kind in KINDS:
        score, sequence, activation = oracle.exemplars(acts_NTF, counted_NT, kind, k, lottery_N)
        found = np.asarray(ranked[kind].priority_FR)
        found = np.where(np.isfinite(found), -found if kind == "min" else found, np.nan)
        np.testing.assert_array_equal(np.asarray(ranked[kind].sequence_FR), sequence, kind)
        np.testing.assert_array_equal(found, score, kind)
        np.testing.assert_array_equal(np.asarray(ranked[kind].activation_FRT), activation, kind)
    assert_statistics_equal_oracle(statistics, acts_NTF, counted_NT)


def assert_statistics_equal_oracle(statistics, acts_NTF, counted_NT):
    count, mean, variance, skewness, kurtosis, active = oracle.statistics(acts_NTF, counted_NT)
    np.testing.assert_array_equal(statistics.count_F, count)
    np.testing.assert_allclose(statistics.mean_F, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.variance_F, variance, rtol=1e-4)
    # A skewness near 0 is a difference of what is much larger.
    np.testing.assert_allclose(statistics.skewness_F, skewness, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.kurtosis_F, kurtosis, rtol=1e-4)
    np.testing.assert_allclose(statistics.fraction_active_F, active, rtol=1e-6)


def draw(seed, sequences, tokens, neurons, *, levels=None, share_counted=0.8):
    """Random activations; with few `levels`, most priorities are ties."""
    rng = np.random.default_rng(seed)
    if levels is None:
        acts_NTF = rng.standard_normal((sequences, tokens, neurons)).astype(np.float32)
    else:
        acts_NTF = rng.integers(-levels, levels + 1, (sequences, tokens, neurons)).astype(np.float32)
    counted_NT = rng.random((sequences, tokens)) < share_counted
    lottery_N = rng.permutation(sequences).astype(np.float32) + 1
    return acts_NTF, counted_NT, lottery_N


@pytest.mark.parametrize("shape", MESHES)
def test_equals_oracle_on_every_mesh(shape):
    acts = draw(0, 51, 7, 16)
    result = reduce(*acts, k=6, batch=8, mesh=make_mesh(*shape))
    assert_equals_oracle(result, *acts, 6)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("sampled", [1, 30, 1000])
def test_the_drawn_tokens_go_to_their_slots(shape, sampled):
    """The same tokens for all neurons, whatever the mesh; all of them where there are fewer."""
    acts_NTF, counted_NT, lottery_N = draw(0, 51, 7, 16)
    acts_NTF[3] = 1e6
    mesh = make_mesh(*shape)
    reduction = reduced(acts_NTF, counted_NT, lottery_N, 6, 8, mesh, sampled=sampled)
    drawn = drawn_from(counted_NT, sampled).token_M
    assert len(drawn) == min(sampled, counted_NT.sum())
    limit = np.finfo(np.float16).max
    expected_MF = acts_NTF.reshape((-1, 16))[drawn].clip(-limit, limit).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(merge_sample(reduction.sample_MF, mesh=mesh)), expected_MF)


def test_active_is_above_the_threshold():
    acts_NTF, counted_NT, lottery_N = draw(0, 20, 7, 4)
    mesh = make_mesh(2, 2)
    reduction = reduced(acts_NTF, counted_NT, lottery_N, 3, 8, mesh, active_above=0.5)
    expected = (acts_NTF[counted_NT] > 0.5).mean(0)
    np.testing.assert_allclose(merge_moments(reduction.moments).fraction_active_F, expected)


@pytest.mark.parametrize("shape", MESHES)
def test_ties_go_to_the_lower_sequence_on_every_mesh(shape):
    """Few levels, so that equals stand at the edge of the top k, and are pushed out by stronger ones."""
    acts = draw(1, 91, 2, 8, levels=8)
    result = reduce(*acts, k=5, batch=16, mesh=make_mesh(*shape))
    assert_equals_oracle(result, *acts, 5)


def test_all_equal_activations_keep_the_first_sequences():
    acts_NTF = np.full((20, 3, 4), 0.5, np.float32)
    acts = (acts_NTF, np.ones((20, 3), bool), np.ones(20, np.float32))
    ranked, _ = result = reduce(*acts, k=4, batch=8, mesh=make_mesh(2, 2))
    assert_equals_oracle(result, *acts, 4)
    assert np.asarray(ranked["max"].sequence_FR).tolist() == [[0, 1, 2, 3]] * 4


def test_fewer_sequences_than_k_leaves_empty_ranks():
    acts = draw(2, 3, 4, 8)
    ranked, _ = result = reduce(*acts, k=10, batch=8, mesh=make_mesh(8, 1))
    assert_equals_oracle(result, *acts, 10)
    assert (np.asarray(ranked["random"].sequence_FR)[:, 3:] == -1).all()


def test_every_token_masked_keeps_nothing():
    acts_NTF, counted_NT, lottery_N = draw(3, 9, 4, 8, share_counted=0.0)
    ranked, statistics = reduce(acts_NTF, counted_NT, lottery_N, k=3, batch=4, mesh=make_mesh(2, 4))
    assert all((np.asarray(r.sequence_FR) == -1).all() for r in ranked.values())
    assert (statistics.count_F == 0).all()
    for nothing_F in (statistics.mean_F, statistics.variance_F, statistics.skewness_F, statistics.kurtosis_F):
        assert np.isnan(nothing_F).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_chosen_neurons_only(shape):
    acts_NTF, counted_NT, lottery_N = draw(4, 21, 5, 16)
    indices = jnp.asarray([2, 3, 5, 11], jnp.int32)
    result = reduce(acts_NTF, counted_NT, lottery_N, k=4, batch=8, mesh=make_mesh(*shape), indices=indices)
    assert_equals_oracle(result, acts_NTF[:, :, np.asarray(indices)], counted_NT, lottery_N, 4)


def test_more_neurons_than_one_copy_block():
    acts = draw(5, 12, 3, 300)
    assert_equals_oracle(reduce(*acts, k=3, batch=4, mesh=make_mesh(1, 1)), *acts, 3)


def test_float16_saturates_and_score_stays_exact():
    acts_NTF = np.full((1, 2, 1), 1e6, np.float32)
    mesh = make_mesh(1, 1)
    ranked, _ = reduce(acts_NTF, np.ones((1, 2), bool), np.ones(1, np.float32), k=1, batch=1, mesh=mesh)
    assert float(ranked["max"].priority_FR[0, 0]) == 1e6
    assert float(ranked["max"].activation_FRT[0, 0, 0]) == np.finfo(np.float16).max


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sequences=st.integers(1, 24),
    tokens=st.integers(1, 6),
    neurons=st.integers(1, 5),
    k=st.integers(1, 9),
    batch=st.integers(1, 9),
    levels=st.sampled_from([None, 0, 1, 3]),
    share_counted=st.sampled_from([0.2, 0.7, 1.0]),
)
def test_any_shape_equals_oracle(seed, sequences, tokens, neurons, k, batch, levels, share_counted):
    acts = draw(seed, sequences, tokens, neurons, levels=levels, share_counted=share_counted)
    assert_equals_oracle(reduce(*acts, k=k, batch=batch, mesh=make_mesh(1, 1)), *acts, k)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("data", ["large mean", "heavy tails", "drifting", "first batches masked"])
def test_shape_of_hard_distributions_on_every_mesh(data, shape):
    rng = np.random.default_rng(7)
    acts_NTF = (50 + rng.standard_normal((203, 7, 8))).astype(np.float32)
    counted_NT = rng.random((203, 7)) < 0.7
    match data:
        case "large mean":  # of some neurons skewed to one side
            acts_NTF[:, :, 4:] = 50 + rng.exponential(size=(203, 7, 4))
        case "heavy tails":
            acts_NTF = rng.standard_t(2, (203, 7, 8)).astype(np.float32) ** 3
        case "drifting":
            acts_NTF *= 1 + 3 * (np.arange(203) > 150)[:, None, None] + np.arange(7)[:, None]
        case "first batches masked":
            counted_NT[:40] = False
    # Batches of 24 are a different number of sequences, and of slices, on every mesh; the last is uneven.
    lottery_N = np.ones(203, np.float32)
    _, statistics = reduce(acts_NTF, counted_NT, lottery_N, k=1, batch=24, mesh=make_mesh(*shape))
    assert_statistics_equal_oracle(statistics, acts_NTF, counted_NT)


def test_moments_of_known_distributions():
    """Kurtosis is not the excess, and both are of the population."""
    acts_NTF = np.repeat([[[0.0, -1.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[0.0, -1.0]]], 4, axis=1)
    acts_NTF = acts_NTF.astype(np.float32)
    mesh = make_mesh(1, 1)
    _, statistics = reduce(acts_NTF, np.ones((4, 4), bool), np.ones(4, np.float32), k=1, batch=2, mesh=mesh)
    # A Bernoulli variable of p = 1/4 has (1 - 2p) / sqrt(p(1-p)) and 3 + (1 - 6p(1-p)) / (p(1-p)).
    np.testing.assert_allclose(statistics.skewness_F, [2 / np.sqrt(3), 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics.kurtosis_F, [7 / 3, 1], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_what_does_not_vary_has_no_shape(value):
    """Not even the one that the rounding of a mean would give it."""
    acts_NTF = np.full((37, 5, 4), value, np.float32)
    counted_NT = np.random.default_rng(8).random((37, 5)) < 0.8
    _, statistics = reduce(acts_NTF, counted_NT, np.ones(37, np.float32), k=1, batch=4, mesh=make_mesh(2, 2))
    assert np.isnan(statistics.skewness_F).all()
    assert np.isnan(statistics.kurtosis_F).all()
    np.testing.assert_allclose(statistics.mean_F, acts_NTF[0, 0], rtol=1e-6)


def test_rounding_beside_a_variance_of_zero_is_no_shape():
    sums = PowerSums(*(np.full((1, 2), [0, x], np.float32) for x in (0, -1e-30, 1e-20, 1e-10)))
    parts = Moments(
        token_count_G=np.array([[9]]),
        mean_F=np.ones((1, 2)),
        sums=sums,
        lost=jax.tree.map(np.zeros_like, sums),
        active_F=np.ones((1, 2)),
    )
    statistics = merge_moments(parts)
    assert statistics.variance_F.tolist() == [0, 0]
    assert np.isnan([statistics.skewness_F, statistics.kurtosis_F]).all()


@pytest.mark.parametrize("by", [0.0, -0.3, 2.5])
def test_sums_about_another_centre(by):
    x_NF = np.random.default_rng(9).exponential(size=(11, 3))
    found = _recentred(PowerSums(*((x_NF**power).sum(0) for power in (1, 2, 3, 4))), 11, by_F=by)
    np.testing.assert_allclose(found, [((x_NF - by) ** power).sum(0) for power in (1, 2, 3, 4)], rtol=1e-12)
    none = _recentred(PowerSums(*np.zeros((4, 3), np.float32)), 0, by_F=np.float32(1e38))
    assert not np.any(none)


def test_statistics_survive_a_large_mean():
    rng = np.random.default_rng(6)
    acts_NTF = (1000 + rng.standard_normal((64, 8, 2))).astype(np.float32)
    counted_NT = np.ones((64, 8), bool)
    _, statistics = reduce(acts_NTF, counted_NT, np.ones(64, np.float32), k=1, batch=4, mesh=make_mesh(1, 1))
    _, mean, variance, skewness, kurtosis, _ = oracle.statistics(acts_NTF, counted_NT)
    np.testing.assert_allclose(statistics.mean_F, mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.variance_F, variance, rtol=1e-5)
    np.testing.assert_allclose(statistics.skewness_F, skewness, atol=1e-5)
    np.testing.assert_allclose(statistics.kurtosis_F, kurtosis, rtol=1e-5)


def test_tokens_that_count():
    tokens_BT = np.array([[7, 3, 9, 3], [5, 5, -1, -1]])
    counted_BT = counted_tokens(tokens_BT, excluded=frozenset([3]), first=1)
    assert counted_BT.tolist() == [[False, False, True, False], [False, True, False, False]]
    everything = counted_tokens(tokens_BT, excluded=frozenset(), first=0)
    assert everything.tolist() == [[True] * 4, [True, True, False, False]]
