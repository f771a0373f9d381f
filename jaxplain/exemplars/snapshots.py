"""What a checkpoint keeps of the reductions, and how they go on from it, on whatever mesh.

Top-ks are joined over the data shards, which makes a checkpoint as small as the answer itself and changes
nothing, since a top-k of parts is that of the whole. Moments, which are small and are rounded, are kept for
each shard, so that a run that goes on with as many shards ends with the bits of one that never stopped.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxplain.exemplars.merging import join
from jaxplain.exemplars.moments import Moments, add_moments, empty_moments
from jaxplain.exemplars.reduction import LayerReduction, partition_specs
from jaxplain.exemplars.step import Reductions
from jaxplain.exemplars.topk import EMPTY, TopK

Snapshot = dict[str, LayerReduction]
"""A reduction for each layer, whose top-ks lack the axis P. Keys are texts, as in a checkpoint."""

_LAST = np.iinfo(np.int32).max


def snapshot(reductions: Reductions, *, kept: Mapping[int, int], mesh: Mesh) -> Snapshot:
    """What to keep of reductions, in arrays of its own, so that those may be given to the next step.

    `kept` counts the neurons of each layer; what follows them fills the mesh up, and is left out.
    """
    return {
        str(layer): _snapshot(reduction, kept=kept[layer], mesh=mesh)
        for layer, reduction in sorted(reductions.items())
    }


@functools.partial(jax.jit, static_argnames=("kept", "mesh"))
def _snapshot(reduction: LayerReduction, *, kept: int, mesh: Mesh) -> LayerReduction:
    def top(x: TopK) -> TopK:
        x = join(x, mesh)
        ranks = (y[:, :kept] for y in (x.priority_RG, x.sequence_RG, x.slot_RG))
        return TopK(*ranks, activation_FRT=x.activation_FRT[:kept])

    return _each(
        reduction,
        top=top,
        moments=lambda x: jax.tree.map(lambda y: y[:, :kept] if y.ndim > 1 else y, x),
    )


def snapshot_form(empty: Reductions, *, kept: Mapping[int, int], parts: int, mesh: Mesh) -> Snapshot:
    """Shapes, dtypes and shardings of a snapshot of reductions like these, taken with `parts` data shards.

    `empty` may be shapes and dtypes alone.
    """

    def form(array: Any, spec: tuple[Any, ...], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        axes = (
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        )
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, P(*axes)))

    def top(x: TopK, width: int) -> TopK:
        specs = partition_specs(x)
        ranks = (
            form(array, tuple(spec)[1:], (array.shape[1], min(array.shape[2], width)))
            for array, spec in zip(x[:3], specs[:3], strict=True)
        )
        activation = form(
            x.activation_FRT, tuple(specs.activation_FRT)[1:], (width, *x.activation_FRT.shape[2:])
        )
        return TopK(*ranks, activation_FRT=activation)  # type: ignore[arg-type]

    def moments(x: Moments, width: int) -> Moments:
        first = "data" if parts == mesh.shape["data"] else None
        return jax.tree.map(
            lambda array, spec: form(array, (first, *tuple(spec)[1:]), (parts, width)[: len(array.shape)]),
            x,
            partition_specs(x),
        )

    return {
        str(layer): _each(
            reduction,
            top=functools.partial(top, width=kept[layer]),
            moments=functools.partial(moments, width=kept[layer]),
        )
        for layer, reduction in sorted(empty.items())
    }


def reductions_from(found: Snapshot, empty: Reductions, mesh: Mesh) -> Reductions:
    """Reductions that go on from a snapshot, which is consumed. `empty` may be shapes and dtypes alone."""
    layers = sorted(empty)
    widths = {layer: empty[layer].moments.mean_F.shape[-1] for layer in layers}
    parts = len(found[str(layers[0])].moments.token_count)
    whole = snapshot_form(empty, kept=widths, parts=parts, mesh=mesh)
    return {
        layer: _spread(jax.tree.map(_filled_up, found.pop(str(layer)), whole[str(layer)]), mesh=mesh)
        for layer in layers
    }


def _filled_up(x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    missing = [(0, wanted - present) for wanted, present in zip(whole.shape, x.shape, strict=True)]
    return jnp.pad(x, missing, mode="edge") if x.shape != whole.shape else x


@functools.partial(jax.jit, static_argnames="mesh")
def _spread(found: LayerReduction, *, mesh: Mesh) -> LayerReduction:
    def moments(x: Moments) -> Moments:
        x = regroup(x, mesh.shape["data"])
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(x))
        return lax.with_sharding_constraint(x, shardings)

    return _each(found, top=lambda x: _spread_top(x, mesh), moments=moments)


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


def regroup(moments: Moments, parts: int) -> Moments:
    """Moments of shards as those of another number of them, each of what neighbouring ones had."""
    before = len(moments.token_count)
    if before == parts:
        return moments
    groups = [empty_moments(neurons=moments.mean_F.shape[1]) for _ in range(parts)]
    for shard in range(before):
        here = jax.tree.map(lambda x, shard=shard: x[shard], moments)
        groups[shard * parts // before] = add_moments(groups[shard * parts // before], here)
    return jax.tree.map(lambda *x: jnp.stack(x), *groups)


def _each(
    reduction: LayerReduction, *, top: Callable[[TopK], Any], moments: Callable[[Moments], Any]
) -> LayerReduction:
    """A reduction with its parts replaced by what functions make of them."""

    def replaced(part: Any) -> Any:
        if isinstance(part, TopK):
            return top(part)
        if isinstance(part, Moments):
            return moments(part)
        raise TypeError(f"a checkpoint would lose {type(part).__name__} of a reduction")

    return jax.tree.map(replaced, reduction, is_leaf=lambda part: isinstance(part, (TopK, Moments)))
