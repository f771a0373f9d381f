"""What a checkpoint keeps of the reductions, and how they go on from it, on whatever mesh.

Top-ks, drawn tokens and counts of what was drawn are joined over the data shards, which makes a checkpoint
as small as the answer and changes nothing, since a top-k of parts is that of the whole. Moments and sums by
token, which are rounded, are kept for each shard, so that a run that goes on with as many ends with the bits
of one that never stopped. Which expert a neuron is of is the same in all shards, and is kept once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxplain.exemplars.merging import join
from jaxplain.exemplars.moments import add_moments
from jaxplain.exemplars.reduction import LayerReduction, partition_specs
from jaxplain.exemplars.step import Reductions
from jaxplain.exemplars.token_sample import merge_sample
from jaxplain.exemplars.token_sums import TokenSums, add_token_sums
from jaxplain.exemplars.topk import EMPTY, TopK

Snapshot = dict[str, LayerReduction]
"""A reduction for each layer, with texts for keys. All but its moments and sums by token lack the axis P."""

Summed = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""`neuron_C` and `column_N` of `token_sums.spread_over_shards` for each layer that has sums by token."""

Shards = TypeVar("Shards")

_LAST = np.iinfo(np.int32).max


def snapshot(reductions: Reductions, *, kept: Mapping[int, int], summed: Summed, mesh: Mesh) -> Snapshot:
    """What to keep of reductions, in the host's memory, so that those may be given to the next step.

    `kept` counts the neurons of each layer; what follows them fills the mesh up, and is left out.
    """
    found = {}
    for layer, reduction in sorted(reductions.items()):
        columns = None if layer not in summed else np.asarray(summed[layer][1], np.int32)
        # One after another, since joining a layer takes memory on the devices.
        found[str(layer)] = jax.block_until_ready(_snapshot(reduction, columns, kept=kept[layer], mesh=mesh))
    return found


@functools.partial(jax.jit, static_argnames=("kept", "mesh"))
def _snapshot(reduction: LayerReduction, column_N: Array | None, *, kept: int, mesh: Mesh) -> LayerReduction:
    def top(x: TopK) -> TopK:
        x = join(x, mesh)
        if x.group_F is None:
            ranks = (y[:, :kept] for y in (x.priority_RG, x.sequence_RG, x.slot_RG))
            return TopK(*ranks, activation_FRT=x.activation_FRT[:kept])
        return x._replace(activation_FRT=x.activation_FRT[:kept], group_F=x.group_F[:kept])

    sums, expert_F = reduction.token_sums, reduction.expert_F
    kept_of_all = LayerReduction(
        tops={kind: top(x) for kind, x in reduction.tops.items()},
        draws={str(count): top(x) for count, x in reduction.draws.items()},  # type: ignore[misc]
        read={
            str(count): read_PF.sum(axis=0, dtype=read_PF.dtype)[:kept]
            for count, read_PF in reduction.read.items()
        },  # type: ignore[misc]
        sample_MF=_some(merge_sample(reduction.sample_MF, mesh=mesh)[:, :kept]),
        moments=jax.tree.map(lambda x: x[:, :kept], reduction.moments),
        token_sums=sums
        and sums._replace(
            # In the order of the chosen neurons, which is the same on any mesh.
            neuron_C=None,  # type: ignore[arg-type]
            count_VG=sums.count_VG if expert_F is None else sums.count_VG[:, :, column_N],
            sum_VC=sums.sum_VC[:, :, column_N],
            carry_VC=sums.carry_VC[:, :, column_N],
        ),
        expert_F=None if expert_F is None else expert_F[0, :kept],
    )
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), kept_of_all)


def _some(x: Any) -> Any:
    """None where an array holds nothing, which a checkpoint could not."""
    return x if x.size else None


def snapshot_form(
    empty: Reductions, *, kept: Mapping[int, int], summed: Summed, parts: int, mesh: Mesh | AbstractMesh
) -> Snapshot:
    """Shapes, dtypes and shardings of a snapshot of reductions like these, taken with `parts` data shards.

    `empty` may be shapes and dtypes alone.
    """
    first = "data" if parts == mesh.shape["data"] else None

    def form(array: Any, axes: tuple[Any, ...], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        dividing = (
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=False)
        )
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, P(*dividing)))

    def layer_form(reduction: LayerReduction, width: int, chosen: int) -> LayerReduction:
        def top(x: TopK) -> TopK:
            groups = x.priority_RG.shape[2]
            groups = min(groups, width) if x.group_F is None else groups
            ranks = (form(array, (None, "model"), (array.shape[1], groups)) for array in x[:3])
            activation = form(x.activation_FRT, ("model",), (width, *x.activation_FRT.shape[2:]))
            return TopK(*ranks, activation_FRT=activation, group_F=of_neurons(x.group_F))  # type: ignore[arg-type]

        def of_neurons(array: Any) -> Any:
            return None if array is None else form(array, ("model",), (width,))

        sample, sums = reduction.sample_MF, reduction.token_sums
        return LayerReduction(
            tops={kind: top(x) for kind, x in reduction.tops.items()},
            draws={str(count): top(x) for count, x in reduction.draws.items()},  # type: ignore[misc]
            read={str(count): of_neurons(x) for count, x in reduction.read.items()},  # type: ignore[misc]
            sample_MF=_some(form(sample, (None, "model"), (sample.shape[1], width))),
            moments=jax.tree.map(
                lambda x: form(x, (first, "model"), (parts, min(x.shape[1], width))), reduction.moments
            ),
            token_sums=sums
            and sums._replace(
                neuron_C=None,  # type: ignore[arg-type]
                **{
                    name: form(x, (first,), (parts, x.shape[1], columns))
                    for name, x, columns in (
                        ("count_VG", sums.count_VG, 1 if reduction.expert_F is None else chosen),
                        ("sum_VC", sums.sum_VC, chosen),
                        ("carry_VC", sums.carry_VC, chosen),
                    )
                },
            ),
            expert_F=of_neurons(reduction.expert_F),
        )

    return {
        str(layer): layer_form(reduction, kept[layer], len(summed[layer][1]) if layer in summed else 0)
        for layer, reduction in sorted(empty.items())
    }


def reductions_from(found: Snapshot, empty: Reductions, *, summed: Summed, mesh: Mesh) -> Reductions:
    """Reductions that go on from a snapshot, which is consumed. `empty` may be shapes and dtypes alone."""
    layers = sorted(empty)
    widths = {layer: empty[layer].moments.mean_F.shape[-1] for layer in layers}
    parts = len(found[str(layers[0])].moments.token_count_G)
    whole = snapshot_form(empty, kept=widths, summed=summed, parts=parts, mesh=mesh)
    return {
        layer: _spread(
            jax.tree.map(_filled_up, found.pop(str(layer)), whole[str(layer)]),
            tuple(np.asarray(x, np.int32) for x in summed.get(layer, ())),
            mesh=mesh,
        )
        for layer in layers
    }


def _filled_up(x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    missing = [(0, wanted - present) for wanted, present in zip(whole.shape, x.shape, strict=True)]
    return jnp.pad(x, missing, mode="edge") if x.shape != whole.shape else x


@functools.partial(jax.jit, static_argnames="mesh")
def _spread(found: LayerReduction, summed: tuple[Array, ...], *, mesh: Mesh) -> LayerReduction:
    parts = mesh.shape["data"]

    def placed(tree: Any) -> Any:
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree))
        return lax.with_sharding_constraint(tree, shardings)

    sums, sample_MF, expert_F = found.token_sums, found.sample_MF, found.expert_F
    if sample_MF is None:
        stored = [*found.tops.values(), *found.draws.values()][0].activation_FRT
        sample_MF = jnp.zeros((0, len(stored)), stored.dtype)
    return LayerReduction(
        tops={kind: _spread_top(x, mesh) for kind, x in found.tops.items()},
        draws={int(count): _spread_top(x, mesh) for count, x in found.draws.items()},
        read={int(count): _in_first_shard(read_F, P("model"), mesh) for count, read_F in found.read.items()},
        sample_MF=_in_first_shard(sample_MF, P(None, "model"), mesh),
        moments=placed(regroup(found.moments, parts, add_moments)),
        token_sums=sums
        and placed(_spread_sums(regroup(sums, parts, add_token_sums), *summed, alike=expert_F is None)),
        expert_F=None if expert_F is None else _in_every_shard(expert_F, mesh),
    )


def _in_first_shard(found: Array, spec: P, mesh: Mesh) -> Array:
    """What adds up over the shards in the first of them; the others have none of it yet."""

    def spread(found: Array) -> Array:
        return jnp.where(lax.axis_index("data") == 0, found, jnp.zeros_like(found))[None]

    return jax.shard_map(spread, mesh=mesh, in_specs=spec, out_specs=P("data", *spec), check_vma=False)(found)


def _in_every_shard(found_F: Array, mesh: Mesh) -> Array:
    return jax.shard_map(
        lambda found_F: found_F[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("data", "model"),
        check_vma=False,
    )(found_F)


def _spread_sums(sums: TokenSums, neuron_C: Array, column_N: Array, *, alike: bool) -> TokenSums:
    """Sums of the chosen neurons in the columns where this mesh has them.

    `alike` where the same tokens count for all neurons, which then share one column of counts.
    """
    parts, vocabulary, _ = sums.sum_VC.shape

    def columns(x: Array) -> Array:
        return jnp.zeros((parts, vocabulary, len(neuron_C)), x.dtype).at[:, :, column_N].set(x)

    return TokenSums(
        neuron_C=jnp.broadcast_to(neuron_C, (parts, len(neuron_C))),
        count_VG=sums.count_VG if alike else columns(sums.count_VG),
        sum_VC=columns(sums.sum_VC),
        carry_VC=columns(sums.carry_VC),
    )


def _spread_top(top: TopK, mesh: Mesh) -> TopK:
    """The joined top-k in the first shard; the others hold nothing, and take nothing that is too weak.

    What does not rank above the last of the joined ranks can never be in the answer. So the others' ranks
    all have its priority, with a sequence id after every other, and fall out when the shards are joined.
    """

    def spread(top: TopK) -> TopK:
        first = lax.axis_index("data") == 0
        lowest_1G = top.priority_RG[-1:]
        sequence_1G = jnp.where(lowest_1G > -jnp.inf, jnp.int32(_LAST), jnp.int32(EMPTY))
        shard = TopK(
            priority_RG=jnp.where(first, top.priority_RG, lowest_1G),
            sequence_RG=jnp.where(first, top.sequence_RG, sequence_1G),
            slot_RG=top.slot_RG,
            activation_FRT=jnp.where(first, top.activation_FRT, jnp.nan),
            group_F=top.group_F,
        )
        return jax.tree.map(lambda x: x[None], shard)

    specs = partition_specs(jax.tree.map(lambda x: x[None], top))
    joined = jax.tree.map(lambda spec: P(*tuple(spec)[1:]), specs)
    return jax.shard_map(spread, mesh=mesh, in_specs=(joined,), out_specs=specs, check_vma=False)(top)


def regroup(shards: Shards, parts: int, add: Callable[[Shards, Shards], Shards]) -> Shards:
    """What shards have as another number of them, each with what neighbouring ones had; zeros are nothing."""
    before = len(jax.tree.leaves(shards)[0])
    if before == parts:
        return shards
    groups: list[Shards | None] = [None] * parts
    for shard in range(before):
        here = jax.tree.map(lambda x, shard=shard: x[shard], shards)
        there = groups[shard * parts // before]
        groups[shard * parts // before] = here if there is None else add(there, here)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[0]), shards)
    return jax.tree.map(lambda *x: jnp.stack(x), *(nothing if x is None else x for x in groups))
