"""Counted operations against those that XLA counts in the compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxplain.planning.flops import flops_per_sequence, parameters, total_flops
from jaxplain.planning.topologies import lower_step
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import ARCH, MIXTURE, demand

VARIANTS = {
    "gated, grouped queries": ARCH,
    "plain, with biases": dataclasses.replace(
        ARCH,
        gated=False,
        activation="relu",
        key_value_heads=8,
        attention_bias=True,
        mlp_bias=True,
        norm="layer",
    ),
    "side by side": dataclasses.replace(ARCH, residual="parallel", head_norm="per_head"),
    "wide heads": dataclasses.replace(ARCH, head_width=64, residual="parallel_one_norm"),
}
BATCH = 4


def compiled_flops(asked):
    program = lower_step(asked, make_mesh(1, 1), batch=BATCH).compile()
    return program.cost_analysis()["flops"] / BATCH


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_operations_are_those_of_the_compiled_step(variant):
    asked = demand(VARIANTS[variant])
    assert flops_per_sequence(asked) == pytest.approx(compiled_flops(asked), rel=0.06)


def test_all_experts_are_computed_and_counted():
    asked = demand(MIXTURE)
    assert flops_per_sequence(asked) == pytest.approx(compiled_flops(asked), rel=0.1)


def test_what_an_expert_passes_on_from_the_last_layer_is_not_computed():
    arch = Architecture(
        vocabulary=100, layers=3, width=64, neurons=96, query_heads=4, key_value_heads=2, head_width=16,
        max_positions=128, experts=6, experts_per_token=2, expert_neurons=32, shared_neurons=16,
        dense_layers=(True, False, False),
    )  # fmt: skip
    of_neurons = 3 * 64 * (96 + 2 * 208) - 64 * 208 + 64 * 6 * 2
    per_token = 2 * (3 * (64 * 64 * 2 + 64 * 64 + 2 * 96 * 64) + of_neurons)
    assert flops_per_sequence(demand(arch, corpus={"sequence_length": 96})) == 96 * per_token


@pytest.mark.parametrize("gated", [True, False])
def test_counted_operations_are_those_of_a_forward_pass(gated):
    arch = Architecture(
        vocabulary=64, layers=3, width=256, neurons=1024, query_heads=8, key_value_heads=4, head_width=32,
        max_positions=128, gated=gated,
    )  # fmt: skip
    model = Decoder(arch, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)
    forward = jax.jit(lambda weights, tokens_BT: nnx.merge(graph, weights)(tokens_BT))
    counted = forward.lower(weights, jnp.zeros((1, 128), jnp.int32)).compile().cost_analysis()["flops"]
    # Here the last layer is whole.
    assert counted == pytest.approx(flops_per_sequence(demand(arch)) + 128 * 2 * 256 * 1024, rel=0.05)


def test_layers_above_the_last_one_asked_for_cost_nothing():
    asked = demand(neurons={"layers": [1], "indices": [3, 5]})
    assert flops_per_sequence(asked) == pytest.approx(compiled_flops(asked), rel=0.06)
    assert flops_per_sequence(asked) < 0.7 * flops_per_sequence(demand())


def test_attention_grows_with_the_square_of_the_length():
    one, two = (flops_per_sequence(demand(corpus={"sequence_length": tokens})) for tokens in (128, 256))
    assert two - 2 * one == 2 * 4 * 128**2 * 256 * 3


def test_every_sequence_of_every_split_counts():
    once = flops_per_sequence(demand())
    both = demand(exemplars={"splits": ["train", "test"]}, corpus={"max_sequences": 30})
    assert total_flops(both) == 60 * once
    unknown = demand(corpus={"max_sequences": 0, "expected_sequences": 70})
    assert total_flops(unknown) == 70 * once


def test_loaded_parameters():
    layer = 256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024 + 2 * 256
    assert parameters(demand().weights) == 512 * 256 + 3 * layer
    assert parameters(demand(neurons={"layers": [0]}).weights) == 512 * 256 + layer
