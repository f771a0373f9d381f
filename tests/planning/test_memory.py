"""Predicted memory against real arrays on a mesh, and against XLA's own account."""

import dataclasses

import jax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxplain.errors import JaxplainError
from jaxplain.exemplars.reduction import empty_reduction
from jaxplain.exemplars.snapshots import snapshot
from jaxplain.exemplars.states import state_options, summed_columns
from jaxplain.exemplars.strata import kept_of_draws, plan_strata
from jaxplain.planning.disk import checkpoint_size
from jaxplain.planning.memory import gathered_bytes, memory, state_bytes, temporary_bytes, weight_bytes
from jaxplain.planning.topologies import lower_step
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition, spread_over_data
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import ARCH, MIXTURE, demand

MESHES = [(1, 1), (8, 1), (2, 4), (1, 8)]
SOME = {"neurons": {"layers": [0, 2], "indices": list(range(0, 70, 7))}}
MORE = {
    "exemplars": {"kinds": ["max", "quantile"], "samples_per_quantile": 2},
    "statistics": {"sampled_tokens": 32, "tokens": {"neurons": 5, "count": 3}},
}


def on_first_device(arrays):
    first = jax.devices()[0]
    shards = (shard for array in arrays for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def real_state(asked, mesh):
    """The reductions of a run whose split has as many sequences as were asked for, all of which count."""
    rows = asked.sequences["train"]
    return {
        layer: empty_reduction(
            **state_options(
                asked.config,
                asked.selection,
                layer,
                shards=mesh.shape["model"],
                rows=rows,
                sampled=sampled_of(asked, rows),
                tabled=asked.tabled,
            ),
            mesh=mesh,
        )
        for layer in asked.selection.indices
    }


def sampled_of(asked, rows):
    """Four experts, of which a token is routed to two."""
    wanted = asked.config.statistics.sampled_tokens * (2 if asked.arch.experts else 1)
    return min(wanted, rows * asked.tokens)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("arch", [ARCH, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("blocks", [{}, SOME, MORE, {"exemplars": {"activation_dtype": "float32"}}])
def test_state_is_what_real_reductions_hold(shape, arch, blocks):
    if arch is MIXTURE and "neurons" in blocks:
        blocks = blocks | {"neurons": blocks["neurons"] | {"experts": "all"}}
    mesh, asked = make_mesh(*shape), demand(arch, **blocks)
    reductions = real_state(asked, mesh)
    arrays = jax.tree.leaves(reductions)
    assert state_bytes(asked, model=shape[1], tiled=False) == on_first_device(arrays)
    kept = snapshot(
        reductions,
        kept={layer: len(indices) for layer, indices in asked.selection.indices.items()},
        summed={
            layer: summed_columns(asked.selection, asked.tabled, layer, shape[1]) for layer in asked.tabled
        },
        mesh=mesh,
    )
    assert checkpoint_size(asked, data=shape[0]) == sum(array.nbytes for array in jax.tree.leaves(kept))


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
    assert weight_bytes(asked, data=shape[0], model=shape[1], tiled=False) == on_first_device(arrays)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_weights_may_be_spread_over_data_and_are_gathered_two_layers_at_a_time(shape):
    mesh, asked = make_mesh(*shape), demand(run={"shard_weights": True})
    sizes = {"data": shape[0], "model": shape[1], "tiled": False}
    arrays = []
    for path, variable in nnx.to_flat_state(nnx.state(Decoder(ARCH, rngs=nnx.Rngs(0)))):
        value = variable.get_value()
        spec = spread_over_data(partition(path[-1], value.shape, mesh), value.shape, mesh)
        arrays.append(jax.device_put(value, NamedSharding(mesh, spec)))
    assert weight_bytes(asked, **sizes) == on_first_device(arrays)
    matrices = 4 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024) // shape[1]
    assert gathered_bytes(asked, **sizes) == pytest.approx(2 * matrices, rel=0.3)
    assert gathered_bytes(demand(), **sizes) == 0
    whole = memory(demand(), batch=16, **sizes).temporaries
    assert memory(asked, batch=16, **sizes).temporaries == whole + gathered_bytes(asked, **sizes)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_memory_is_what_the_compiler_counts(shape):
    batch, mesh, asked = 16, make_mesh(*shape), demand()
    analysis = lower_step(asked, mesh, batch=batch).compile().memory_analysis()
    found = memory(asked, data=shape[0], model=shape[1], batch=batch, tiled=False)
    # Token, whether it counts, and the place and slot of one that is drawn; then number and lottery of each
    # sequence. Its turn is read for kind quantile alone.
    rows = batch // shape[0] * (asked.tokens * (4 + 1 + 4 + 4) + 2 * 4)
    read = weight_bytes(asked, data=shape[0], model=shape[1], tiled=False, unread=False)
    # Nothing reads the last layer's way down, [1024, 256] in float32.
    assert found.weights - read == 1024 * 256 * 4 // shape[1]
    assert read + found.state + rows == analysis.argument_size_in_bytes
    assert 0.5 < found.temporaries / analysis.temp_size_in_bytes < 2
    assert found.total == found.weights + found.state + found.temporaries


def test_a_checkpoint_takes_a_layer_twice_more_between_two_steps():
    sizes = {"data": 4, "model": 2, "batch": 4, "tiled": False}
    found = memory(demand(exemplars={"k": 300}), **sizes)
    assert found.snapshot == 2 * found.state // ARCH.layers > found.temporaries
    assert found.total == found.weights + found.state + found.snapshot
    for changes in ({"output": "gs://bucket/run"}, {"run": {"checkpoint_minutes": 0}}):
        assert memory(demand(**changes), **sizes).snapshot == 0
    kept = {"checkpoint_folder": "kept", "checkpoint_minutes": 0, "checkpoint_steps": 7}
    assert memory(demand(output="gs://bucket/run", run=kept), **sizes).snapshot > 0


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


def test_state_follows_what_is_asked_for():
    """A plain top-k is activations, priority, sequence and slot; sums by token are two words and a place."""
    arch = dataclasses.replace(ARCH, vocabulary=100)

    def state(made=arch, **blocks):
        return state_bytes(demand(made, **blocks), model=1, tiled=False)

    kinds = {"k": 100, "kinds": ["max", "random"]}
    base = state(exemplars=kinds)
    top = 3 * 1024 * 100 * (2 * 128 + 12)
    assert state(exemplars=kinds | {"kinds": ["max", "min", "random"]}) - base == top
    strata = demand(arch, exemplars=kinds | {"kinds": ["max", "random", "quantile"]})
    exemplars = strata.config.exemplars
    kept = kept_of_draws(plan_strata(exemplars.strata, wanted=exemplars.samples_per_quantile, rows=1000))
    assert state_bytes(strata, model=1, tiled=False) - base == sum(kept.values()) * top // 100
    tables = {"sampled_tokens": 32, "tokens": {"neurons": [[0, 1], [0, 2], [2, 5]]}}
    assert state(exemplars=kinds, statistics=tables) - base == 3 * (100 * 8 + 4) + 2 * 100 * 4
    few, more = (state(MIXTURE, statistics={"sampled_tokens": number}) for number in (10, 11))
    # Two tokens are drawn for one that a routed expert reads.
    assert more - few == 2 * 2 * (1024 + 2 * (4 * 256 + 512))


def test_a_run_over_some_layers_has_the_tables_of_their_neurons():
    named = {"tokens": {"neurons": [[0, 1], [2, 5]]}}
    asked = demand(statistics=named)
    assert {layer: list(numbers) for layer, numbers in asked.tabled.items()} == {0: [1], 2: [5]}
    assert {layer: list(numbers) for layer, numbers in asked.of_layers([1, 2]).tabled.items()} == {2: [5]}
    with pytest.raises(JaxplainError, match="which is not among those extracted"):
        demand(statistics={"tokens": {"neurons": [[2, 5]]}}, neurons={"layers": [0]})
