"""What a checkpoint keeps of the reductions, and how they go on from it, on whatever mesh.

Top-ks and drawn tokens are joined over the data shards, which makes a checkpoint as small as the answer and
changes nothing, since a top-k of parts is that of the whole. Moments and sums by token, which are rounded,
are kept for each shard, so that a run that goes on with as many ends with the bits of one that never stopped.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
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
"""A reduction for each layer, with texts for keys. Its top-ks and drawn tokens lack the axis P."""

Summed = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""`neuron_C` and `column_N` of `token_sums.spread_over_shards` for each layer that has sums by token."""

Shards = TypeVar("Shards")

_LAST = np.iinfo(np.int32).max


def snapshot(reductions: Reductions, *, kept: Mapping[int, int], summed: Summed, mesh: Mesh) -> Snapshot:
    """What to keep of reductions, in arrays of its own, so that those may be given to the next step.

    `kept` counts the neurons of each layer; what follows them fills the mesh up, and is left out.
    """
    return {
        str(layer): _snapshot(
            reduction,
            None if layer not in summed else np.asarray(summed[layer][1], np.int32),
            kept=kept[layer],
            mesh=mesh,
        )
        for layer, reduction in sorted(reductions.items())
    }


@functools.partial(jax.jit, static_argnames=("kept", "mesh"))
def _snapshot(reduction: LayerReduction, column_N: Array | None, *, kept: int, mesh: Mesh) -> LayerReduction:
    def top(x: TopK) -> TopK:
        x = join(x, mesh)
        ranks = (y[:, :kept] for y in (x.priority_RG, x.sequence_RG, x.slot_RG))
        return TopK(*ranks, activation_FRT=x.activation_FRT[:kept])

    sums = reduction.token_sums
    kept_of_all = LayerReduction(
        tops={kind: top(x) for kind, x in reduction.tops.items()},
        draws={str(count): top(x) for count, x in reduction.draws.items()},  # type: ignore[misc]
        sample_MF=_some(merge_sample(reduction.sample_MF, mesh=mesh)[:, :kept]),
        moments=jax.tree.map(lambda x: x[:, :kept] if x.ndim > 1 else x, reduction.moments),
        token_sums=sums
        and sums._replace(
            # In the order of the chosen neurons, which is the same on any mesh.
            neuron_C=None,  # type: ignore[arg-type]
            sum_VC=sums.sum_VC[:, :, column_N],
            carry_VC=sums.carry_VC[:, :, column_N],
        ),
    )
    # What passes through unchanged would share the buffers that the next step overwrites.
    return jax.tree.map(jnp.copy, kept_of_all)


def _some(x: Any) -> Any:
    """None where an array holds nothing, which a checkpoint could not."""
    return x if x.size else None


def snapshot_form(
    empty: Reductions, *, kept: Mapping[int, int], summed: Summed, parts: int, mesh: Mesh
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
            ranks = (
                form(array, (None, "model"), (array.shape[1], min(array.shape[2], width))) for array in x[:3]
            )
            activation = form(x.activation_FRT, ("model",), (width, *x.activation_FRT.shape[2:]))
            return TopK(*ranks, activation_FRT=activation)  # type: ignore[arg-type]

        sample, sums = reduction.sample_MF, reduction.token_sums
        return LayerReduction(
            tops={kind: top(x) for kind, x in reduction.tops.items()},
            draws={str(count): top(x) for count, x in reduction.draws.items()},  # type: ignore[misc]
            sample_MF=_some(form(sample, (None, "model"), (sample.shape[1], width))),
            moments=jax.tree.map(
                lambda x: form(x, (first, "model"), (parts, width)[: len(x.shape)]), reduction.moments
            ),
            token_sums=sums
            and sums._replace(
                neuron_C=None,  # type: ignore[arg-type]
                count_V=form(sums.count_V, (first,), (parts, sums.count_V.shape[1])),  # type: ignore[arg-type]
                **{
                    name: form(x, (first,), (parts, x.shape[1], chosen))
                    for name, x in (("sum_VC", sums.sum_VC), ("carry_VC", sums.carry_VC))
                },
            ),
        )

    return {
        str(layer): layer_form(reduction, kept[layer], len(summed[layer][1]) if layer in summed else 0)
        for layer, reduction in sorted(empty.items())
    }


def reductions_from(found: Snapshot, empty: Reductions, *, summed: Summed, mesh: Mesh) -> Reductions:
    """Reductions that go on from a snapshot, which is consumed. `empty` may be shapes and dtypes alone."""
    layers = sorted(empty)
    widths = {layer: empty[layer].moments.mean_F.shape[-1] for layer in layers}
    parts = len(found[str(layers[0])].moments.token_count)
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

    sums, sample_MF = found.token_sums, found.sample_MF
    if sample_MF is None:
        stored = [*found.tops.values(), *found.draws.values()][0].activation_FRT
        sample_MF = jnp.zeros((0, len(stored)), stored.dtype)
    return LayerReduction(
        tops={kind: _spread_top(x, mesh) for kind, x in found.tops.items()},
        draws={int(count): _spread_top(x, mesh) for count, x in found.draws.items()},
        sample_MF=_spread_sample(sample_MF, mesh),
        moments=placed(regroup(found.moments, parts, add_moments)),
        token_sums=sums and placed(_spread_sums(regroup(sums, parts, add_token_sums), *summed)),
    )


def _spread_sample(sample_MF: Array, mesh: Mesh) -> Array:
    """The drawn tokens in the first shard; the others have none of them yet."""

    def spread(sample_MF: Array) -> Array:
        return jnp.where(lax.axis_index("data") == 0, sample_MF, 0)[None]

    return jax.shard_map(
        spread, mesh=mesh, in_specs=P(None, "model"), out_specs=P("data", None, "model"), check_vma=False
    )(sample_MF)


def _spread_sums(sums: TokenSums, neuron_C: Array, column_N: Array) -> TokenSums:
    """Sums of the chosen neurons in the columns where this mesh has them."""
    parts, vocabulary, _ = sums.sum_VC.shape

    def columns(x: Array) -> Array:
        return jnp.zeros((parts, vocabulary, len(neuron_C)), x.dtype).at[:, :, column_N].set(x)

    return TokenSums(
        neuron_C=jnp.broadcast_to(neuron_C, (parts, len(neuron_C))),
        count_V=sums.count_V,
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
    groups = [jax.tree.map(lambda x: jnp.zeros_like(x[0]), shards) for _ in range(parts)]
    for shard in range(before):
        here = jax.tree.map(lambda x, shard=shard: x[shard], shards)
        groups[shard * parts // before] = add(groups[shard * parts // before], here)
    return jax.tree.map(lambda *x: jnp.stack(x), *groups)
