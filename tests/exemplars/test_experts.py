"""Reductions of a layer of experts against brute force: what an expert does not read does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.extraction import _sequences
from jaxplain.exemplars.merging import merge_partials, merge_top
from jaxplain.exemplars.moments import merge_moments
from jaxplain.exemplars.reduction import KINDS, Fold, Rows, empty_reduction
from jaxplain.exemplars.step import make_step
from jaxplain.exemplars.strata import choose, kept_of_draws, plan_strata
from jaxplain.exemplars.token_sample import merge_sample
from jaxplain.exemplars.token_sums import merge_token_sums, spread_over_shards
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition
from jaxplain.subjects.mixture import Routed
from tests import oracle
from tests.exemplars.test_reduction import MESHES, drawn_from, fold_batch, make_mesh
from tests.exemplars.test_step import COLLECTIVE, groups_over_data

WIDTHS = (5, 5, 5, 9)
"""Three experts that tokens are routed to, and a shared one: 24 neurons."""
EXPERT_F = np.repeat(np.arange(4), WIDTHS)
VOCABULARY = 13


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


def reduced(
    data,
    mesh,
    *,
    k=6,
    batch=8,
    indices=None,
    sampled=30,
    active_above=0.0,
    draws=None,
    summed=None,
    tokens_NT=None,
):
    """All batches through the real reduction, the last one padded."""
    acts_NTF, counted_NT, routed_NTE, lottery_N = data
    sequences, tokens, _ = acts_NTF.shape
    kept = EXPERT_F if indices is None else EXPERT_F[indices]
    drawn = drawn_from(counted_NT, sampled, max(draws or [0]))
    tokens_NT = np.zeros((sequences, tokens), np.int32) if tokens_NT is None else tokens_NT
    reduction = empty_reduction(
        kinds=KINDS,
        neurons=len(kept),
        k=k,
        tokens=tokens,
        sampled_tokens=len(drawn.token_M),
        dtype=jnp.dtype("float16"),
        mesh=mesh,
        experts=4,
        expert_F=kept,
        draws=draws,
        summed=summed,
        vocabulary=VOCABULARY,
    )
    # What is not routed is 0 in the decoder; here it is large, so that nothing relies on that.
    junk_NTF = np.where(routed_NTE[..., EXPERT_F], acts_NTF, 1e4).astype(np.float32)
    for start in range(0, sequences, batch):
        stop = min(start + batch, sequences)

        def part(array, start=start, stop=stop, fill=0):
            gaps = [(0, batch - (stop - start)), *[(0, 0)] * (array.ndim - 1)]
            return jnp.asarray(np.pad(array[start:stop], gaps, constant_values=fill))

        places = drawn.tokens_of(start, batch=batch, shards=mesh.shape["data"])
        rows = Rows(
            tokens_BT=part(tokens_NT, fill=-1),
            counted_BT=part(counted_NT),
            sequence_B=jnp.arange(start, start + batch, dtype=jnp.int32),
            lottery_B=part(lottery_N),
            turn_B=jnp.asarray(drawn.turns(np.arange(start, start + batch))),
            **dict(zip(("drawn_PW", "slot_PW"), map(jnp.asarray, places), strict=True)),
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
def test_an_expert_s_sample_is_its_share_of_the_drawn_tokens(shape, sampled):
    """The same tokens are drawn for all; what an expert does not read is NaN in its neurons' sample."""
    acts_NTF, counted_NT, routed_NTE, _ = data = draw(0)
    mesh = make_mesh(*shape)
    found_MF = np.asarray(merge_sample(reduced(data, mesh, sampled=sampled).sample_MF, mesh=mesh))
    drawn_M = drawn_from(counted_NT, sampled).token_M
    expected_NTF = np.where(routed_NTE[..., EXPERT_F], acts_NTF, np.nan).astype(np.float16)
    np.testing.assert_array_equal(found_MF, expected_NTF.reshape((-1, len(EXPERT_F)))[drawn_M])
    if sampled > 1:
        assert np.isnan(found_MF[:, 0]).any()
        assert not np.isnan(found_MF[:, -1]).any(), "the shared expert reads them all"


@pytest.mark.parametrize("shape", MESHES)
def test_draws_of_sequences_are_of_those_that_an_expert_reads(shape):
    """The strongest of each draw; in the split's strata where all sequences are drawn."""
    acts_NTF, counted_NT, routed_NTE, _ = data = draw(5, 91, 5, share_routed=0.1)
    mesh = make_mesh(*shape)
    strata = plan_strata((0.5, 0.9), wanted=2, rows=int(counted_NT.any(1).sum()))
    kept = kept_of_draws(strata)
    assert len(kept) == 3
    reduction = reduced(data, mesh, batch=16, draws=kept)
    drawn = drawn_from(counted_NT, 0, max(kept))
    turn_N = drawn.turns(np.arange(91))
    there_NTF = counted_NT[..., None] & routed_NTE[..., EXPERT_F]
    highest_NF = np.where(there_NTF, acts_NTF, -np.inf).max(1)
    ranked, read = {}, {}
    for count, top in reduction.draws.items():
        ranked[count] = found = _sequences(merge_top(top, mesh=mesh), slice(len(EXPERT_F)))
        read[count] = np.asarray(reduction.read[count]).sum(axis=0, dtype=np.int64)
        drawn_NF = (turn_N < count)[:, None] & there_NTF.any(1)
        np.testing.assert_array_equal(read[count], drawn_NF.sum(0))
        assert len(np.unique(read[count])) > 1
        for f in range(len(EXPERT_F)):
            ids = np.flatnonzero(drawn_NF[:, f])
            expected = ids[np.argsort(-highest_NF[ids, f], kind="stable")][: kept[count]]
            filled = len(expected)
            np.testing.assert_array_equal(found.sequence_NR[f, :filled], expected)
            np.testing.assert_array_equal(found.score_NR[f, :filled], highest_NF[expected, f])
            stored = np.where(there_NTF[expected, :, f], acts_NTF[expected, :, f], np.nan)
            np.testing.assert_array_equal(found.activation_NRT[f, :filled], stored.astype(np.float16))
            assert (found.sequence_NR[f, filled:] == -1).all()
    assert_in_strata(*choose(strata, ranked, drawn.turns, wanted=2, read=read), strata, turn_N, highest_NF)


def assert_in_strata(stratum_FR, found, strata, turn_N, highest_NF):
    """Each neuron's exemplars lie between edges that are ranks among the drawn sequences it has tokens of."""
    for f in range(len(EXPERT_F)):
        edges = []
        for stratum in strata:
            drawn_N = np.flatnonzero((turn_N < stratum.drawn) & np.isfinite(highest_NF[:, f]))
            score_R = np.sort(highest_NF[drawn_N, f])[::-1]
            above = int((1 - (np.arange(len(score_R)) + 0.5) / max(len(score_R), 1) >= stratum.low).sum())
            edges.append(max([*edges, score_R[above - 1] if above else np.inf]))
        for number, (stratum, high) in enumerate(zip(strata, [*edges[1:], np.inf], strict=True)):
            inside_N = (highest_NF[:, f] >= edges[number]) & (highest_NF[:, f] < high)
            drawn_N = np.flatnonzero(inside_N & (turn_N < stratum.drawn))
            expected = sorted(drawn_N[np.argsort(turn_N[drawn_N])][:2])
            assert sorted(found.sequence_NR[f][stratum_FR[f] == number]) == expected


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("chosen", [[7], [0, 5, 6, 14, 20], list(range(24))])
def test_token_sums_are_over_what_an_expert_reads(shape, chosen):
    acts_NTF, counted_NT, routed_NTE, _ = data = draw(6)
    tokens_NT = np.random.default_rng(1).integers(0, VOCABULARY, counted_NT.shape).astype(np.int32)
    mesh = make_mesh(*shape)
    summed, column_N = spread_over_shards(np.array(chosen), neurons=len(EXPERT_F), shards=shape[1])
    reduction = reduced(data, mesh, summed=summed, tokens_NT=tokens_NT)
    mean_NV, count_NV = merge_token_sums(reduction.token_sums, column_N)
    for place, f in enumerate(chosen):
        there_NT = counted_NT & routed_NTE[..., EXPERT_F[f]]
        for token in range(VOCABULARY):
            acts_M = acts_NTF[there_NT & (tokens_NT == token), f]
            assert count_NV[place, token] == len(acts_M)
            expected = acts_M.mean(dtype=np.float64) if len(acts_M) else np.nan
            np.testing.assert_allclose(mean_NV[place, token], expected, rtol=1e-5, atol=1e-6)


def test_moments_of_an_expert_that_is_read_late_are_about_its_own_mean():
    """Its first tokens come after those of others, far from 0, where sums about another centre cancel."""
    acts_NTF, counted_NT, routed_NTE, lottery_N = draw(7, 200)
    routed_NTE[:150, :, 1] = False
    acts_NTF = (3000 + acts_NTF).astype(np.float32)
    statistics = merge_moments(
        reduced((acts_NTF, counted_NT, routed_NTE, lottery_N), make_mesh(1, 1)).moments
    )
    for f in (0, 5, 23):
        there_NT = counted_NT & routed_NTE[..., EXPERT_F[f]]
        expected = acts_NTF[there_NT][:, f].astype(np.float64)
        np.testing.assert_allclose(statistics.variance_F[f], expected.var(), rtol=1e-4)
        np.testing.assert_allclose(statistics.mean_F[f], expected.mean(), rtol=1e-6)


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
    parts, shards = mesh.shape["data"], mesh.shape["model"]
    options = {"kinds": KINDS, "k": 5, "tokens": 24, "sampled_tokens": 64, "mesh": mesh, "draws": {8: 4}}
    expert_F = np.repeat(np.arange(experts + 1), [16] * experts + [32])
    summed, _ = spread_over_shards(np.arange(0, 64, 5), neurons=len(expert_F), shards=shards)
    options |= {"summed": summed, "vocabulary": 384}
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
        turn_B=np.arange(16, dtype=np.int32),
        drawn_PW=np.full((parts, 16 // parts * 24), -1, np.int32),
        slot_PW=np.full((parts, 16 // parts * 24), -1, np.int32),
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
