"""Predicted memory against real arrays on a mesh, and against XLA's own account."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxplain.exemplars.reduction import empty_reduction
from jaxplain.planning.disk import state_size
from jaxplain.planning.memory import memory, state_bytes, temporary_bytes, weight_bytes
from jaxplain.planning.topologies import lower_step
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import ARCH, demand

MESHES = [(1, 1), (8, 1), (2, 4), (1, 8)]
SOME = {"neurons": {"layers": [0, 2], "indices": list(range(0, 70, 7))}}


def on_first_device(arrays):
    first = jax.devices()[0]
    shards = (shard for array in arrays for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def real_state(asked, mesh):
    exemplars = asked.config.exemplars
    return [
        empty_reduction(
            kinds=tuple(exemplars.kinds),
            neurons=asked.padded_neurons(layer, mesh.shape["model"]),
            k=exemplars.k,
            tokens=asked.tokens,
            sampled_tokens=asked.config.statistics.sampled_tokens,
            dtype=jnp.dtype(exemplars.activation_dtype),
            mesh=mesh,
        )
        for layer in asked.selection.indices
    ]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("blocks", [{}, SOME, {"exemplars": {"activation_dtype": "float32"}}])
def test_state_is_what_real_reductions_hold(shape, blocks):
    mesh, asked = make_mesh(*shape), demand(**blocks)
    arrays = jax.tree.leaves(real_state(asked, mesh))
    assert state_bytes(asked, model=shape[1], tiled=False) == on_first_device(arrays)
    assert state_size(asked, data=shape[0], model=shape[1]) == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_what_real_parameters_hold(shape, dtype):
    mesh, asked = make_mesh(*shape), demand(subject={"dtype": dtype}, neurons={"layers": [1]})
    model = Decoder(ARCH, rngs=nnx.Rngs(0), dtype=asked.dtype, depth=2)
    arrays = [
        jax.device_put(
            value := variable.get_value(), NamedSharding(mesh, partition(path[-1], value.shape, mesh))
        )
        for path, variable in nnx.to_flat_state(nnx.state(model))
    ]
    assert weight_bytes(asked, model=shape[1], tiled=False) == on_first_device(arrays)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_memory_is_what_the_compiler_counts(shape):
    batch, mesh, asked = 16, make_mesh(*shape), demand()
    analysis = lower_step(asked, mesh, batch=batch).compile().memory_analysis()
    found = memory(asked, data=shape[0], model=shape[1], batch=batch, tiled=False)
    rows = batch // shape[0] * (asked.tokens * 9 + 8)
    read = weight_bytes(asked, model=shape[1], tiled=False, unread=False)
    # Nothing reads the last layer's way down, [1024, 256] in float32.
    assert found.weights - read == 1024 * 256 * 4 // shape[1]
    assert read + found.state + rows == analysis.argument_size_in_bytes
    assert found.total == found.weights + found.state + found.temporaries
    assert 0.5 < found.temporaries / analysis.temp_size_in_bytes < 2


def test_temporaries_grow_with_the_rows_of_a_data_shard():
    asked = demand()
    one = temporary_bytes(asked, rows=1, model=2)
    assert temporary_bytes(asked, rows=7, model=2) == 7 * one
    assert memory(asked, data=4, model=2, batch=28, tiled=False).temporaries == 7 * one
    assert one < temporary_bytes(asked, rows=1, model=1)


def test_tiles_pad_the_last_two_axes():
    """Activations of 100 ranks and 96 tokens lie as if they were of 104 and 128."""
    asked = demand(
        corpus={"sequence_length": 96},
        exemplars={"k": 100, "kinds": ["max"]},
        statistics={"sampled_tokens": 1},
        neurons={"layers": [0]},
    )
    plain, tiled = (state_bytes(asked, model=1, tiled=tiled) for tiled in (False, True))
    activations = 1024 * 2 * (104 * 128 - 100 * 96)
    assert tiled - plain == pytest.approx(activations, rel=0.05)
