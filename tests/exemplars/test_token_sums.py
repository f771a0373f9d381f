"""Mean activations by vocabulary token against numpy's, over meshes, shapes, masks, and very many tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.configs.extraction import StatisticsConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import sampled_tokens
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.token_sums import (
    TokenTable,
    choose_neurons,
    empty_token_sums,
    merge_token_sums,
    spread_over_shards,
    strongest_tokens,
    update_token_sums,
)
from jaxplain.subjects.architecture import Architecture
from tests.exemplars.test_reduction import MESHES, draw, make_mesh, reduced

VOCABULARY = 23


def brute_force(tokens_NT, counted_NT, acts_NTF):
    """Mean of each neuron and token, and count of each token."""
    tokens = tokens_NT[counted_NT]
    count_V = np.bincount(tokens, minlength=VOCABULARY)
    sums_VF = np.zeros((VOCABULARY, acts_NTF.shape[2]))
    np.add.at(sums_VF, tokens, acts_NTF[counted_NT].astype(np.float64))
    with np.errstate(invalid="ignore"):
        return (sums_VF / count_V[:, None]).T, count_V


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("chosen", [[3], [0, 1, 2, 3, 4, 15], list(range(16))])
def test_equals_brute_force_on_every_mesh(shape, chosen):
    acts_NTF, counted_NT, lottery_N = draw(0, 51, 7, 16)
    tokens_NT = np.random.default_rng(1).integers(0, VOCABULARY - 1, (51, 7)).astype(np.int32)
    tokens_NT[~counted_NT & (tokens_NT % 2 == 0)] = -1  # what does not count may be padding, or not
    mesh = make_mesh(*shape)
    summed, column_N = spread_over_shards(np.array(chosen), neurons=16, shards=shape[1])
    reduction = reduced(
        *(acts_NTF, counted_NT, lottery_N, 3, 8, mesh),
        summed=summed,
        tokens_NT=tokens_NT,
        vocabulary=VOCABULARY,
    )
    mean_NV, count_NV = merge_token_sums(reduction.token_sums, column_N)
    expected_FV, expected_V = brute_force(tokens_NT, counted_NT, acts_NTF)
    assert expected_V[-1] == 0
    np.testing.assert_array_equal(count_NV, [expected_V] * len(chosen))
    np.testing.assert_allclose(mean_NV, expected_FV[chosen], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("neurons", "shards"), [(16, 1), (16, 2), (16, 8)])
def test_every_chosen_neuron_is_summed_up_where_it_is(neurons, shards):
    each = neurons // shards
    for seed in range(20):
        rng = np.random.default_rng(seed)
        place_N = np.sort(rng.choice(neurons, rng.integers(1, neurons + 1), replace=False))
        neuron_C, column_N = spread_over_shards(place_N, neurons=neurons, shards=shards)
        assert len(neuron_C) % shards == 0
        shard_C = np.repeat(np.arange(shards), len(neuron_C) // shards)
        np.testing.assert_array_equal(shard_C[column_N] * each + neuron_C[column_N], place_N)
        assert (neuron_C < each).all()


def test_as_exact_for_a_token_that_occurs_millions_of_times():
    """Single float32 words would be off by a thousandth here, and stand still in the end."""
    rng = np.random.default_rng(0)
    acts_KBTF = (1 + rng.random((50, 2, 8, 1))).astype(np.float32)
    tokens_BT = jnp.asarray([[0] * 8, [0] * 7 + [1]])
    counted_BT1 = jnp.ones((2, 8, 1), bool)
    start = empty_token_sums(np.zeros(1, np.int32), vocabulary=3)
    started = 2**24  # as many tokens of 1.5 as that came before
    start = start._replace(
        sum_VC=start.sum_VC.at[0].set(1.5 * started), count_VG=start.count_VG.at[0].set(started)
    )

    @jax.jit
    def fold(sums, acts_KBTF):
        def body(k, sums):
            return update_token_sums(sums, tokens_BT, counted_BT1, acts_KBTF[k % 50])

        return jax.lax.fori_loop(0, 20_000, body, sums)

    found = fold(start, jnp.asarray(acts_KBTF))
    mean_NV, count_NV = merge_token_sums(jax.tree.map(lambda x: x[None], found), np.array([0]))
    flat_K = acts_KBTF.astype(np.float64).reshape((50, 16))
    total = 1.5 * started + 400 * flat_K[:, :15].sum()
    assert count_NV.tolist() == [[started + 20_000 * 15, 20_000, 0]]
    np.testing.assert_allclose(mean_NV[0, 0], total / count_NV[0, 0], rtol=1e-8)
    np.testing.assert_allclose(mean_NV[0, 1], flat_K[:, 15].mean(), rtol=1e-7)
    assert np.isnan(mean_NV[0, 2])
    plain = np.float32(1.5 * started)
    for k in range(2000):
        plain += np.float32(acts_KBTF[k % 50].sum() - acts_KBTF[k % 50, 1, 7, 0])
    drift = plain - (1.5 * started + 40 * flat_K[:, :15].sum())
    assert abs(drift) > 1e-5 * 40 * flat_K[:, :15].sum(), "what the second word is there for"


def test_the_strongest_tokens():
    table = TokenTable(
        mean_NV=np.array([[1.0, 5.0, np.nan, 5.0, -2.0], [0.0, -1.0, np.nan, 3.0, 9.0]]),
        count_NV=np.array([[4, 7, 0, 3, 2], [4, 7, 0, 3, 1]]),
    )
    token, mean, count = strongest_tokens(table, kept=4, min_count=3)
    assert token.tolist() == [[1, 3, 0, -1], [3, 0, 1, -1]]
    np.testing.assert_array_equal(mean, np.array([[5, 5, 1, np.nan], [3, 0, -1, np.nan]], np.float32))
    assert count.tolist() == [[7, 3, 4, 0], [3, 4, 7, 0]]
    token, _, count = strongest_tokens(table, kept=4, min_count=2)
    assert token.tolist() == [[1, 3, 0, 4], [3, 0, 1, -1]]
    assert count.tolist() == [[7, 3, 4, 2], [3, 4, 7, 0]], "neurons count by themselves"
    token, mean, _ = strongest_tokens(table, kept=2, min_count=1, lowest=True)
    assert token.tolist() == [[4, 0], [1, 0]]
    assert mean.tolist() == [[-2, 1], [-1, 0]]
    token, _, count = strongest_tokens(table, kept=7, min_count=1)
    assert token.tolist() == [[1, 3, 0, 4, -1, -1, -1], [4, 3, 0, 1, -1, -1, -1]]
    assert count.tolist() == [[7, 3, 4, 2, 0, 0, 0], [1, 3, 4, 7, 0, 0, 0]]


ARCH = Architecture(
    vocabulary=VOCABULARY,
    layers=2,
    width=8,
    neurons=12,
    query_heads=2,
    key_value_heads=2,
    head_width=4,
    max_positions=8,
)
KEPT = Selection(indices={1: np.array([3, 5, 9]), 0: np.array([3, 4])}, arch=ARCH)
MIXTURE = dataclasses.replace(
    ARCH, experts=3, experts_per_token=2, expert_neurons=4, shared_neurons=5, dense_layers=(True, False)
)
OF_EXPERTS = Selection(indices={0: np.array([3, 11]), 1: np.array([1, 4, 7, 12, 16])}, arch=MIXTURE)


def test_neurons_by_name_and_by_number():
    by_name = choose_neurons([[1, 9], [0, 4], [1, 3], [1, 9]], KEPT, seed=0)
    assert {layer: indices.tolist() for layer, indices in by_name.items()} == {0: [4], 1: [3, 9]}
    assert list(by_name) == [0, 1]
    assert choose_neurons(0, KEPT, seed=0) == {}
    for number in (1, 3, 5, 99):
        drawn = choose_neurons(number, KEPT, seed=0)
        assert sum(map(len, drawn.values())) == min(number, 5)
        for layer, indices in drawn.items():
            assert set(indices) <= set(KEPT.indices[layer])
            assert indices.tolist() == sorted(set(indices))
    several = [str(choose_neurons(2, KEPT, seed=seed)) for seed in range(10)]
    assert len(set(several)) > 1
    assert several[0] == str(choose_neurons(2, KEPT, seed=0))


@pytest.mark.parametrize("pair", [(0, 5), (2, 3)])
def test_neurons_that_are_not_kept(pair):
    with pytest.raises(JaxplainError, match=f"names neuron {pair[1]} of layer {pair[0]}, which is not among"):
        choose_neurons([[0, 3], list(pair)], KEPT, seed=0)


def test_neurons_of_experts_by_name_and_by_number():
    by_name = choose_neurons([[1, 3, 4], [1, 1, 3], [0, 0, 11], [1, 0, 1]], OF_EXPERTS, seed=0)
    assert {layer: numbers.tolist() for layer, numbers in by_name.items()} == {0: [11], 1: [1, 7, 16]}
    assert OF_EXPERTS.names(1, by_name[1]) == [(1, 0, 1), (1, 1, 3), (1, 3, 4)]
    assert OF_EXPERTS.names(0, by_name[0]) == [(0, 0, 11)]
    everything = choose_neurons(99, OF_EXPERTS, seed=0)
    for layer, numbers in everything.items():
        np.testing.assert_array_equal(numbers, OF_EXPERTS.indices[layer])
        assert [OF_EXPERTS.number_of(name) for name in OF_EXPERTS.names(layer, numbers)] == numbers.tolist()


@pytest.mark.parametrize(
    ("selection", "name", "message"),
    [
        (OF_EXPERTS, [1, 1], r"names \[1, 1\], .* called by a layer, an expert and an index"),
        (KEPT, [1, 0, 3], r"names \[1, 0, 3\], .* called by a layer and an index\."),
        (OF_EXPERTS, [1, 0, 2], "names neuron 2 of expert 0 of layer 1, which is not among"),
        (OF_EXPERTS, [1, 0, 4], "names neuron 4 of expert 0 of layer 1, which is not among"),
        (OF_EXPERTS, [1, 4, 0], "names neuron 0 of expert 4 of layer 1, which is not among"),
        (OF_EXPERTS, [0, 1, 0], "names neuron 0 of expert 1 of layer 0, which is not among"),
    ],
)
def test_names_that_do_not_fit(selection, name, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        choose_neurons([name], selection, seed=0)
    assert "\n" not in str(caught.value)


def test_tokens_are_drawn_for_experts_in_proportion():
    def factor(**indices):
        chosen = {int(layer[1:]): np.array(numbers) for layer, numbers in indices.items()}
        return Selection(indices=chosen, arch=MIXTURE).tokens_per_read

    assert factor(l0=[3], l1=[12, 16]) == 1, "a plain layer's and the shared expert's neurons read all tokens"
    assert factor(l0=[3], l1=[11, 16]) == 2
    assert KEPT.tokens_per_read == 1
    of_many = Selection(indices={1: np.array([0])}, arch=dataclasses.replace(MIXTURE, experts=128))
    config = StatisticsConfig(sampled_tokens=10)
    assert sampled_tokens(config, of_many) == 640
    assert sampled_tokens(config, KEPT) == 10
    assert sampled_tokens(StatisticsConfig(quantiles=[]), KEPT) == 0
