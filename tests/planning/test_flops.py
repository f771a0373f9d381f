"""Counted operations against those that XLA counts in the compiled step."""

import dataclasses

import pytest

from jaxplain.planning.flops import flops_per_sequence, parameters, total_flops
from jaxplain.planning.topologies import lower_step
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import ARCH, demand

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
