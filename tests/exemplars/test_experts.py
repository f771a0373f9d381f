"""Reductions of a layer of experts against brute force: what an expert does not read does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.merging import merge_partials, merge_sample
from jaxplain.exemplars.moments import merge_moments
from jaxplain.exemplars.reduction import KINDS, Fold, Rows, empty_reduction
from jaxplain.exemplars.step import make_step
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition
from jaxplain.subjects.mixture import Routed
from tests import oracle
from tests.exemplars.test_reduction import MESHES, fold_batch, make_mesh, token_lottery
from tests.exemplars.test_step import COLLECTIVE, groups_over_data

WIDTHS = (5, 5, 5, 9)
"""Three experts that tokens are routed to, and a shared one: 24 neurons."""
EXPERT_F = np.repeat(np.arange(4), WIDTHS)


def draw(seed, sequences=51, tokens=7, *, levels=None, share_routed=0.4):
    rng = np.random.default_rng(seed)
    shape = (sequences, tokens, len(EXPERT_F))
    if levels is None:
        acts_NTF = rng.standard_normal(shape).astype(np.float32)
    else:
        acts_NTF = rng.integers(-levels, levels + 1, shape).astype(np.float32)
    counted_NT = rng.random((sequences, tokens)) < 0.8
    routed_NTE = rng.random((sequences, tokens, 4)) < share_routed
    routed_NTE[..., 3] = True
    lottery_N = rng.permutation(sequences).astype(np.float32) + 1
    return acts_NTF, counted_NT, routed_NTE, lottery_N


def reduced(data, mesh, *, k=6, batch=8, indices=None, sampled=30, active_above=0.0):
    """All batches through the real reduction, the last one padded."""
    acts_NTF, counted_NT, routed_NTE, lottery_N = data
    sequences, tokens, _ = acts_NTF.shape
    kept = EXPERT_F if indices is None else EXPERT_F[indices]
    reduction = empty_reduction(
        kinds=KINDS,
        neurons=len(kept),
        k=k,
        tokens=tokens,
        sampled_tokens=sampled,
        dtype=jnp.dtype("float16"),
        mesh=mesh,
        experts=4,
        expert_F=kept,
    )
    drawn_NT = token_lottery(counted_NT)
    # What is not routed is 0 in the decoder; here it is large, so that nothing relies on that.
    junk_NTF = np.where(routed_NTE[..., EXPERT_F], acts_NTF, 1e4).astype(np.float32)
    for start in range(0, sequences, batch):
        stop = min(start + batch, sequences)

        def part(array, start=start, stop=stop, fill=0):
            gaps = [(0, batch - (stop - start)), *[(0, 0)] * (array.ndim - 1)]
            return jnp.asarray(np.pad(array[start:stop], gaps, constant_values=fill))

        rows = Rows(
            tokens_BT=jnp.zeros((batch, tokens), jnp.int32),
            counted_BT=part(counted_NT),
            sequence_B=jnp.arange(start, start + batch, dtype=jnp.int32),
            lottery_B=part(lottery_N),
            token_lottery_BT=part(drawn_NT),
        )
        neurons = None if indices is None else jnp.asarray(indices, jnp.int32)
        fold = Fold(reduction=reduction, rows=rows, neurons=neurons, active_above=active_above, mesh=mesh)
        reduction = fold_batch(fold, Routed(part(junk_NTF, fill=1e4), part(routed_NTE, fill=True)))
    return reduction


def assert_equals_oracle(reduction, data, mesh, k=6, indices=None):
    acts_NTF, counted_NT, routed_NTE, lottery_N = data
    indices = np.arange(len(EXPERT_F)) if indices is None else indices
    ranked, statistics = merge_partials(reduction, mesh), merge_moments(reduction.moments)
    for place, f in enumerate(indices):
        counted_of_f_NT = counted_NT & routed_NTE[..., EXPERT_F[f]]
        for kind in KINDS:
            score, sequence, activation = oracle.exemplars(
                acts_NTF[..., [f]], counted_of_f_NT, kind, k, lottery_N
            )
            priority_R = np.asarray(ranked[kind].priority_FR)[place]
            found_R = np.where(np.isfinite(priority_R), -priority_R if kind == "min" else priority_R, np.nan)
            np.testing.assert_array_equal(np.asarray(ranked[kind].sequence_FR)[place], sequence[0], kind)
            np.testing.assert_array_equal(found_R, score[0], kind)
            np.testing.assert_array_equal(np.asarray(ranked[kind].activation_FRT)[place], activation[0], kind)
        expected = oracle.statistics(acts_NTF[..., [f]], counted_of_f_NT)
        names = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
        assert statistics.count_F[place] == expected[0][0]
        for name, (value,) in zip(names[1:], expected[1:], strict=True):
            found = getattr(statistics, f"{name}_F")[place]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=f"{name} of {f}")


@pytest.mark.parametrize("shape", MESHES)
def test_equals_oracle_on_every_mesh(shape):
    data, mesh = draw(0), make_mesh(*shape)
    assert_equals_oracle(reduced(data, mesh), data, mesh)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_ties_go_to_the_lower_sequence(shape):
    data, mesh = draw(1, 91, 3, levels=4), make_mesh(*shape)
    assert_equals_oracle(reduced(data, mesh, k=5, batch=16), data, mesh, k=5)


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4)])
def test_chosen_neurons_of_some_experts(shape):
    """As many as there are experts, so that neurons cannot be taken for experts."""
    data, mesh, indices = draw(2), make_mesh(*shape), np.array([1, 6, 7, 20])
    assert_equals_oracle(reduced(data, mesh, indices=indices), data, mesh, indices=indices)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_an_expert_that_reads_little_has_empty_ranks_and_one_that_reads_nothing_no_statistics(shape):
    data, mesh = draw(3, share_routed=0.01), make_mesh(*shape)
    data[2][..., 1] = False
    reduction = reduced(data, mesh)
    assert_equals_oracle(reduction, data, mesh)
    ranked = merge_partials(reduction, mesh)
    assert all((np.asarray(ranked[kind].sequence_FR)[5:10] == -1).all() for kind in KINDS)
    assert (merge_moments(reduction.moments).count_F[5:10] == 0).all()
    assert (np.asarray(ranked["random"].sequence_FR)[0] == -1).any()


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("sampled", [1, 30, 1000])
def test_tokens_are_sampled_for_each_expert(shape, sampled):
    """Those with the highest draw of the tokens that are routed to it."""
    acts_NTF, counted_NT, routed_NTE, _ = data = draw(0)
    mesh = make_mesh(*shape)
    found_FM = np.asarray(merge_sample(reduced(data, mesh, sampled=sampled), mesh))
    for f, expert in enumerate(EXPERT_F):
        there_NT = counted_NT & routed_NTE[..., expert]
        order = np.argsort(np.where(there_NT, -token_lottery(counted_NT), np.inf).ravel(), kind="stable")
        kept = order[: min(sampled, there_NT.sum())]
        expected = acts_NTF[..., f].ravel()[kept].astype(np.float16)
        np.testing.assert_array_equal(found_FM[f, : len(kept)], expected)
        assert np.isnan(found_FM[f, len(kept) :]).all()


def test_random_sequences_are_the_same_for_the_neurons_of_an_expert_alone():
    data, mesh = draw(4, share_routed=0.05), make_mesh(2, 2)
    sequence_FR = np.asarray(merge_partials(reduced(data, mesh), mesh)["random"].sequence_FR)
    by_expert = [np.unique(sequence_FR[expert == EXPERT_F], axis=0) for expert in range(4)]
    assert [len(rows) for rows in by_expert] == [1] * 4
    assert len(np.unique(np.concatenate(by_expert), axis=0)) == 4


def compiled_step(mesh, experts):
    """The compiled extraction step of a random mixture with a plain first layer."""
    arch = Architecture(
        vocabulary=384,
        layers=3,
        width=32,
        neurons=64,
        experts=experts,
        experts_per_token=2,
        expert_neurons=16,
        shared_neurons=32,
        dense_layers=(True, False, False),
        query_heads=4,
        key_value_heads=4,
        head_width=8,
        max_positions=64,
    )
    model = Decoder(arch, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = partition(str(path[-1]), variable.get_value().shape, mesh)
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))
    step, weights = make_step(model, mesh)
    options = {"kinds": KINDS, "k": 5, "tokens": 24, "sampled_tokens": 64, "mesh": mesh}
    expert_F = np.repeat(np.arange(experts + 1), [16] * experts + [32])
    reductions = {
        0: empty_reduction(neurons=64, dtype=jnp.dtype("float16"), **options),
        **{
            layer: empty_reduction(
                neurons=len(expert_F),
                dtype=jnp.dtype("float16"),
                experts=experts + 1,
                expert_F=expert_F,
                **options,
            )
            for layer in (1, 2)
        },
    }
    rows = Rows(
        tokens_BT=np.zeros((16, 24), np.int32),
        counted_BT=np.ones((16, 24), bool),
        sequence_B=np.arange(16, dtype=np.int32),
        lottery_B=np.ones(16, np.float32),
        token_lottery_BT=-np.ones((16, 24), np.float32),
    )
    rows = jax.device_put(rows, NamedSharding(mesh, P("data")))
    return step.lower(reductions, weights, rows, {}).compile()


@pytest.mark.parametrize("experts", [4, 6])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)])
def test_no_collective_over_the_data_axis(shape, experts):
    mesh = make_mesh(*shape)
    text = compiled_step(mesh, experts).as_text()
    assert groups_over_data(text, mesh) == []
    if shape[1] > 1:
        assert COLLECTIVE.search(text), "tensor parallelism must communicate over the model axis"


def test_state_is_updated_in_place():
    analysis = compiled_step(make_mesh(1, 1), 4).memory_analysis()
    assert analysis.alias_size_in_bytes > 0.99 * analysis.output_size_in_bytes
