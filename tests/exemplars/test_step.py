"""What the compiled step does and does not do."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.reduction import KINDS, Rows, empty_reduction
from jaxplain.exemplars.step import make_step
from jaxplain.planning.collectives import collectives, lines_over_data
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition
from tests.exemplars.test_reduction import make_mesh

BATCH, TOKENS, K = 16, 24, 5


def architecture(layers):
    return Architecture(
        vocabulary=384,
        layers=layers,
        width=32,
        neurons=512,
        query_heads=4,
        key_value_heads=4,
        head_width=8,
        max_positions=64,
    )


def compiled_step(layers, mesh, *, reduced=None):
    """The compiled extraction step of a random model; `reduced` are the layers looked at."""
    model = Decoder(architecture(layers), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = partition(str(path[-1]), variable.get_value().shape, mesh)
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))
    step, weights = make_step(model, mesh)
    reductions = {
        layer: empty_reduction(
            kinds=KINDS,
            neurons=512,
            k=K,
            tokens=TOKENS,
            sampled_tokens=64,
            dtype=jnp.dtype("float16"),
            mesh=mesh,
            draws={4: 4, 40: 2},
            summed=np.zeros(mesh.shape["model"], np.int32),
            vocabulary=384,
        )
        for layer in (range(layers) if reduced is None else reduced)
    }
    rows = Rows(
        tokens_BT=np.zeros((BATCH, TOKENS), np.int32),
        counted_BT=np.ones((BATCH, TOKENS), bool),
        sequence_B=np.arange(BATCH, dtype=np.int32),
        lottery_B=np.ones(BATCH, np.float32),
        turn_B=np.arange(BATCH, dtype=np.int32),
        drawn_PW=np.full((mesh.shape["data"], BATCH * TOKENS // mesh.shape["data"]), -1, np.int32),
        slot_PW=np.full((mesh.shape["data"], BATCH * TOKENS // mesh.shape["data"]), -1, np.int32),
    )
    rows = jax.device_put(rows, NamedSharding(mesh, P("data")))
    return step.lower(reductions, weights, rows, {}).compile()


ACTIVATION_BYTES = BATCH * TOKENS * 512 * 4
"""Of one layer and batch."""


def test_activations_of_few_layers_are_held_at_once():
    temporary = {n: compiled_step(n, make_mesh(1, 1)).memory_analysis().temp_size_in_bytes for n in (4, 16)}
    assert temporary[16] < temporary[4] + 2 * ACTIVATION_BYTES
    assert temporary[16] < 8 * ACTIVATION_BYTES


def test_state_is_updated_in_place():
    analysis = compiled_step(4, make_mesh(1, 1)).memory_analysis()
    assert analysis.alias_size_in_bytes > 0.99 * analysis.output_size_in_bytes


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)])
def test_no_collective_over_the_data_axis(shape):
    mesh = make_mesh(*shape)
    text = compiled_step(2, mesh).as_text()
    assert lines_over_data(text, mesh) == []
    if shape[1] > 1:
        assert collectives(text, mesh)["model"], "tensor parallelism must communicate over the model axis"


def test_the_search_for_collectives_finds_them():
    mesh = make_mesh(2, 4)
    over_data = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    over_model = jax.shard_map(
        lambda x: jax.lax.psum(x, "model"), mesh=mesh, in_specs=P(None, "model"), out_specs=P()
    )
    x = jnp.ones((8, 8))
    assert lines_over_data(jax.jit(over_data).lower(x).compile().as_text(), mesh)
    assert not lines_over_data(jax.jit(over_model).lower(x).compile().as_text(), mesh)


def test_what_nobody_reads_is_not_computed():
    """The last layer's down projection feeds nothing; each of the layers below feeds the next."""
    text = compiled_step(3, make_mesh(1, 1), reduced=[0, 2]).as_text()
    dots = [line for line in text.splitlines() if " dot(" in line]
    widths = [re.search(rf"f32\[{BATCH * TOKENS},(\d+)\]", line.split(" dot(")[0]) for line in dots]
    found = collections.Counter(width[1] for width in widths if width)
    # Gate and up in three layers; four products of attention in each, and two down projections; no head.
    assert found == {"512": 6, "32": 3 * 4 + 2}


def test_layers_that_are_not_looked_at_cost_no_state():
    small = compiled_step(4, make_mesh(1, 1), reduced=[1]).memory_analysis()
    whole = compiled_step(4, make_mesh(1, 1)).memory_analysis()
    assert small.output_size_in_bytes < 0.26 * whole.output_size_in_bytes
