"""What goes through a checkpoint to another mesh is the reduction of all that was read, ties and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.exemplars.merging import merge_partials, merge_top
from jaxplain.exemplars.moments import add_moments, merge_moments
from jaxplain.exemplars.reduction import KINDS, Fold, Rows, empty_reduction
from jaxplain.exemplars.snapshots import reductions_from, regroup, snapshot, snapshot_form
from jaxplain.exemplars.token_sample import merge_sample
from jaxplain.exemplars.token_sums import merge_token_sums, spread_over_shards
from jaxplain.exemplars.topk import EMPTY
from tests.exemplars import test_experts as experts
from tests.exemplars.test_reduction import (
    MESHES,
    assert_equals_oracle,
    assert_statistics_equal_oracle,
    draw,
    drawn_from,
    fold_batch,
    make_mesh,
)

TOKENS, NEURONS, K, BATCH, SAMPLED, VOCABULARY = 7, 16, 6, 8, 40, 13
DRAWS = {20: 5}
CHOSEN = np.array([0, 1, 9])
"""The neurons that get sums by token."""


def summed(mesh, neurons=NEURONS, chosen=CHOSEN):
    return spread_over_shards(chosen, neurons=neurons, shards=mesh.shape["model"])


def empty(mesh, neurons=NEURONS, chosen=CHOSEN, sampled=SAMPLED):
    return empty_reduction(
        kinds=KINDS,
        neurons=neurons,
        k=K,
        tokens=TOKENS,
        sampled_tokens=sampled,
        dtype=jnp.dtype("float16"),
        mesh=mesh,
        draws=DRAWS,
        summed=summed(mesh, neurons, chosen)[0],
        vocabulary=VOCABULARY,
    )


def fold(reduction, acts, mesh, start, stop, sampled=SAMPLED):
    """The reduction with sequences `start` to `stop`, which are whole batches, folded in."""
    acts_NTF, counted_NT, lottery_N = acts
    drawn = drawn_from(counted_NT, sampled, max(DRAWS))
    tokens_NT = np.random.default_rng(8).integers(0, VOCABULARY, counted_NT.shape, np.int32)
    for first in range(start, stop, BATCH):
        batch = slice(first, first + BATCH)
        places = drawn.tokens_of(first, batch=BATCH, shards=mesh.shape["data"])
        rows = Rows(
            tokens_BT=jnp.asarray(tokens_NT[batch]),
            counted_BT=jnp.asarray(counted_NT[batch]),
            sequence_B=jnp.arange(first, first + BATCH, dtype=jnp.int32),
            lottery_B=jnp.asarray(lottery_N[batch]),
            turn_B=jnp.asarray(drawn.turns(np.arange(first, first + BATCH))),
            **dict(zip(("drawn_PW", "slot_PW"), map(jnp.asarray, places), strict=True)),
        )
        passing = Fold(reduction=reduction, rows=rows, neurons=None, active_above=0.0, mesh=mesh)
        reduction = fold_batch(passing, jnp.asarray(acts_NTF[batch]))
    return reduction


def moved(reduction, before, after, *, kept=NEURONS, neurons=NEURONS, chosen=CHOSEN, sampled=SAMPLED):
    """The reduction as it goes on after a checkpoint; arrays are put where a checkpoint would put them."""
    size = reduction.moments.mean_F.shape[1]
    found = snapshot({3: reduction}, kept={3: kept}, summed={3: summed(before, size, chosen)}, mesh=before)
    like = {3: jax.eval_shape(functools.partial(empty, after, neurons, chosen, sampled))}
    there = {3: summed(after, neurons, chosen)}
    form = snapshot_form(like, kept={3: kept}, summed=there, parts=before.shape["data"], mesh=after)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (found, form)]
    assert shapes[0] == shapes[1]
    placed = jax.tree.map(lambda x, wanted: jax.device_put(np.asarray(x), wanted.sharding), found, form)
    return reductions_from(placed, like, summed=there, mesh=after)[3]


def answers(reduction, mesh, chosen=CHOSEN):
    """All that the store is made of."""
    neurons = reduction.moments.mean_F.shape[1]
    return {
        "ranked": merge_partials(reduction, mesh),
        "draws": {count: merge_top(top, mesh=mesh) for count, top in reduction.draws.items()},
        "sample": merge_sample(reduction.sample_MF, mesh=mesh),
        "tokens": merge_token_sums(reduction.token_sums, summed(mesh, neurons, chosen)[1]),
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1), (8, 1)),
        ((8, 1), (1, 1)),
        ((8, 1), (2, 4)),
        ((2, 4), (4, 2)),
        ((4, 2), (2, 4)),
        ((1, 8), (8, 1)),
        ((4, 2), (1, 8)),
    ],
)
def test_any_mesh_goes_on_from_any_other(before, after):
    before, after = make_mesh(*before), make_mesh(*after)
    # With two levels nearly every priority is a tie, which the lower sequence id must win.
    for seed, levels in ((0, None), (1, 2)):
        acts = draw(seed, 48, TOKENS, NEURONS, levels=levels)
        reduction = moved(fold(empty(before), acts, before, 0, 24), before, after)
        reduction = fold(reduction, acts, after, 24, 48)
        result = merge_partials(reduction, after), merge_moments(reduction.moments)
        assert_equals_oracle(result, *acts, K)
        mesh = make_mesh(1, 1)
        found, whole = (
            answers(*side) for side in ((reduction, after), (fold(empty(mesh), acts, mesh, 0, 48), mesh))
        )
        for name in ("draws", "sample"):
            jax.tree.map(np.testing.assert_array_equal, found[name], whole[name])
        np.testing.assert_array_equal(found["tokens"].count_NV, whole["tokens"].count_NV)
        np.testing.assert_allclose(found["tokens"].mean_NV, whole["tokens"].mean_NV, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", MESHES)
def test_the_same_mesh_goes_on_with_the_same_bits(shape):
    mesh = make_mesh(*shape)
    acts = draw(2, 48, TOKENS, NEURONS)
    whole = fold(empty(mesh), acts, mesh, 0, 48)
    reduction = fold(moved(fold(empty(mesh), acts, mesh, 0, 16), mesh, mesh), acts, mesh, 16, 48)
    for one, other in zip(
        jax.tree.leaves((answers(reduction, mesh), reduction.moments)),
        jax.tree.leaves((answers(whole, mesh), whole.moments)),
        strict=True,
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_fewer_sequences_than_ranks():
    acts_NTF, counted_NT, lottery_N = draw(3, 8, TOKENS, NEURONS)
    counted_NT[4:] = False
    acts = acts_NTF, counted_NT, lottery_N
    before, after = make_mesh(2, 4), make_mesh(4, 2)
    reduction = moved(fold(empty(before), acts, before, 0, 8), before, after)
    result = merge_partials(reduction, after), merge_moments(reduction.moments)
    assert_equals_oracle(result, *acts, K)


def test_shards_that_go_on_empty_take_nothing_that_is_too_weak():
    """Otherwise each of them would copy the activations of its next sequences for nothing."""
    acts = draw(4, 48, TOKENS, NEURONS)
    before, after = make_mesh(1, 1), make_mesh(4, 1)
    reduction = moved(fold(empty(before), acts, before, 0, 24), before, after)
    weakest = np.asarray(reduction.tops["max"].priority_RG)
    np.testing.assert_array_equal(weakest[1:].min(axis=(0, 1)), weakest[0, -1])
    acts_NTF, counted_NT, lottery_N = acts
    dull = (np.clip(acts_NTF, -0.01, 0.01), counted_NT, lottery_N)
    later = fold(reduction, dull, after, 24, 48)
    taken = np.asarray(later.tops["max"].sequence_RG)
    assert not ((taken >= 24) & (taken < 48)).any()
    assert (taken[1:] != EMPTY).all()


@pytest.mark.parametrize(("before", "after"), [((2, 4), (4, 2)), ((8, 1), (1, 8)), ((1, 8), (2, 4))])
@pytest.mark.parametrize("kept", [1, 3, 7])
def test_neurons_that_fill_the_mesh_up_are_left_out(before, after, kept):
    before, after = make_mesh(*before), make_mesh(*after)

    def padded(mesh):
        size = mesh.shape["model"]
        return np.pad(np.arange(kept), (0, -kept % size), mode="edge")

    acts_NTF, counted_NT, lottery_N = draw(5, 48, TOKENS, NEURONS)
    sides = [(acts_NTF[:, :, padded(mesh)], counted_NT, lottery_N) for mesh in (before, after)]
    chosen = np.array([kept - 1])
    reduction = fold(empty(before, len(padded(before)), chosen), sides[0], before, 0, 24)
    reduction = moved(reduction, before, after, kept=kept, neurons=len(padded(after)), chosen=chosen)
    reduction = fold(reduction, sides[1], after, 24, 48)
    result = merge_partials(reduction, after), merge_moments(reduction.moments)
    assert_equals_oracle(result, *sides[1], K)
    alone = make_mesh(1, 1)
    whole = answers(
        fold(empty(alone, NEURONS, chosen), (acts_NTF, *sides[0][1:]), alone, 0, 48), alone, chosen
    )
    found = answers(reduction, after, chosen)["tokens"].mean_NV
    np.testing.assert_allclose(found, whole["tokens"].mean_NV, rtol=1e-6, atol=1e-7)


def test_nothing_drawn_is_nothing_kept():
    before, after = make_mesh(2, 4), make_mesh(4, 2)
    acts = draw(8, 48, TOKENS, NEURONS)
    reduction = fold(empty(before, sampled=0), acts, before, 0, 24, sampled=0)
    reduction = moved(reduction, before, after, sampled=0)
    assert reduction.sample_MF.shape == (4, 0, NEURONS)
    reduction = fold(reduction, acts, after, 24, 48, sampled=0)
    assert_equals_oracle((merge_partials(reduction, after), merge_moments(reduction.moments)), *acts, K)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 3), (3, 8), (4, 2), (2, 2)])
def test_moments_of_another_number_of_shards(before, after):
    mesh = make_mesh(before, 1) if before in (1, 2, 4, 8) else None
    acts = draw(6, 48, TOKENS, NEURONS)
    acts[0][...] += 100  # a mean far from 0, beside which a careless sum of squares would be lost
    if mesh is None:
        eight = fold(empty(make_mesh(8, 1)), acts, make_mesh(8, 1), 0, 48).moments
        moments = regroup(eight, before, add_moments)
    else:
        moments = fold(empty(mesh), acts, mesh, 0, 48).moments
    found = regroup(moments, after, add_moments)
    assert found.mean_F.shape == (after, NEURONS)
    assert found.token_count_G.dtype == jnp.uint32
    assert_statistics_equal_oracle(merge_moments(found), acts[0], acts[1])
    if before == after:
        assert found is moments


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_snapshot_outlives_the_state_that_it_was_taken_of(shape):
    """Steps overwrite the state's own buffers, while the snapshot is still being written."""
    mesh = make_mesh(*shape)
    reduction = fold(empty(mesh), draw(9, 16, TOKENS, NEURONS), mesh, 0, 16)
    found = snapshot({0: reduction}, kept={0: NEURONS}, summed={0: summed(mesh)}, mesh=mesh)
    before = [np.array(array) for array in jax.tree.leaves(found)]
    for array in jax.tree.leaves(reduction):
        array.delete()
    for array, values in zip(jax.tree.leaves(found), before, strict=True):
        np.testing.assert_array_equal(np.asarray(array), values)


CHOSEN_OF_EXPERTS = np.array([0, 5, 6, 20])
KEPT_OF_EXPERTS = np.array([1, 6, 7, 20])
"""As many as there are experts, so that neurons cannot be taken for experts."""


def padded_to(mesh, indices):
    return np.pad(indices, (0, -len(indices) % mesh.shape["model"]), mode="edge")


def of_experts(data, mesh, indices, chosen, **options):
    """The reduction of a layer of experts: `indices` are kept, and of these `chosen` summed by token."""
    padded = padded_to(mesh, indices)
    tokens_NT = np.random.default_rng(1).integers(0, experts.VOCABULARY, data[1].shape).astype(np.int32)
    where = summed(mesh, len(padded), chosen)[0]
    return experts.reduced(
        data, mesh, indices=padded, draws=DRAWS, summed=where, tokens_NT=tokens_NT, **options
    )


def moved_experts(reduction, before, after, indices, chosen):
    sizes = [len(padded_to(mesh, indices)) for mesh in (before, after)]
    there = [{3: summed(mesh, size, chosen)} for mesh, size in zip((before, after), sizes, strict=True)]
    kept = {3: len(indices)}
    found = snapshot({3: reduction}, kept=kept, summed=there[0], mesh=before)
    empty_there = functools.partial(
        experts.empty, after, indices=padded_to(after, indices), draws=DRAWS, summed=there[1][3][0]
    )
    like = {3: jax.eval_shape(empty_there)}
    form = snapshot_form(like, kept=kept, summed=there[1], parts=before.shape["data"], mesh=after)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (found, form)]
    assert shapes[0] == shapes[1]
    placed = jax.tree.map(lambda x, wanted: jax.device_put(np.asarray(x), wanted.sharding), found, form)
    return reductions_from(placed, like, summed=there[1], mesh=after)[3]


def answers_of_experts(reduction, mesh, indices, chosen):
    column_N = summed(mesh, len(padded_to(mesh, indices)), chosen)[1]
    kept = slice(len(indices))
    ranked = {name: merge_top(top, mesh=mesh) for name, top in (reduction.tops | reduction.draws).items()}
    return {
        "ranked": {str(name): [np.asarray(x)[kept] for x in tops] for name, tops in ranked.items()},
        "read": {count: np.asarray(x).sum(0)[kept] for count, x in reduction.read.items()},
        "sample": np.asarray(merge_sample(reduction.sample_MF, mesh=mesh))[:, kept],
        "counts": merge_token_sums(reduction.token_sums, column_N).count_NV,
        "means": merge_token_sums(reduction.token_sums, column_N).mean_NV,
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (8, 1)), ((8, 1), (2, 4)), ((2, 4), (4, 2)), ((1, 8), (8, 1)), ((4, 2), (4, 2))],
)
@pytest.mark.parametrize(
    ("indices", "chosen"), [(np.arange(24), CHOSEN_OF_EXPERTS), (KEPT_OF_EXPERTS, np.array([3]))]
)
def test_experts_go_on_from_any_mesh_on_any_other(before, after, indices, chosen):
    before, after, alone = make_mesh(*before), make_mesh(*after), make_mesh(1, 1)
    for seed, levels in ((0, None), (1, 2)):
        data = experts.draw(seed, levels=levels, share_routed=0.2)
        reduction = of_experts(data, before, indices, chosen, last=24)
        reduction = moved_experts(reduction, before, after, indices, chosen)
        assert np.asarray(reduction.expert_F).shape == (after.shape["data"], len(padded_to(after, indices)))
        np.testing.assert_array_equal(reduction.expert_F[0], experts.EXPERT_F[padded_to(after, indices)])
        np.testing.assert_array_equal(reduction.tops["random"].group_F, reduction.expert_F)
        reduction = of_experts(data, after, indices, chosen, reduction=reduction, first=24)
        experts.assert_equals_oracle(reduction, data, after, indices=indices)
        found = answers_of_experts(reduction, after, indices, chosen)
        whole = answers_of_experts(of_experts(data, alone, indices, chosen), alone, indices, chosen)
        means = found.pop("means"), whole.pop("means")
        jax.tree.map(np.testing.assert_array_equal, found, whole)
        np.testing.assert_allclose(*means, rtol=1e-6, atol=1e-7)
        assert len(np.unique(found["read"][20])) > 1, "experts read different numbers of what is drawn"


def test_experts_go_on_with_the_same_bits_on_the_same_mesh():
    mesh, indices = make_mesh(2, 4), np.arange(24)
    data = experts.draw(2)
    whole = of_experts(data, mesh, indices, CHOSEN_OF_EXPERTS)
    part = of_experts(data, mesh, indices, CHOSEN_OF_EXPERTS, last=24)
    part = moved_experts(part, mesh, mesh, indices, CHOSEN_OF_EXPERTS)
    part = of_experts(data, mesh, indices, CHOSEN_OF_EXPERTS, reduction=part, first=24)
    one, other = (
        (answers_of_experts(reduction, mesh, indices, CHOSEN_OF_EXPERTS), reduction.moments)
        for reduction in (part, whole)
    )
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
