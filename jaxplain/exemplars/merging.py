"""From partial top-k states, one per data shard, to the one answer that the store keeps."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxplain.exemplars.reduction import LayerReduction, partition_specs
from jaxplain.exemplars.topk import TopK


class Ranked(NamedTuple):
    """A layer's exemplars of one kind, strongest first, ties by sequence id.

    Empty ranks have priority -inf and sequence -1; tokens that do not count are NaN.
    """

    priority_FR: Float[Array, "F R"]
    sequence_FR: Int[Array, "F R"]
    activation_FRT: Float[Array, "F R T"]


def merge_partials(reduction: LayerReduction, mesh: Mesh) -> dict[str, Ranked]:
    """Merge a layer's data shards. Only ranks travel in full; of activations just the winners."""
    return {kind: merge_top(top, mesh=mesh) for kind, top in reduction.tops.items()}


@functools.partial(jax.jit, static_argnames="mesh")
def merge_top(top: TopK, mesh: Mesh) -> Ranked:
    """Merge one top-k's data shards."""
    joined = join(top, mesh)
    return Ranked(
        priority_FR=_of_neurons(joined.priority_RG, joined),
        sequence_FR=_of_neurons(joined.sequence_RG, joined),
        activation_FRT=joined.activation_FRT,
    )


def _of_neurons(ranked_RG: Array, top: TopK) -> Array:
    """What each neuron's group has, [F, R]. A group is sorted once, and spread over its neurons only then."""
    neurons, k, _ = top.activation_FRT.shape
    if top.group_F is not None:
        return ranked_RG[:, top.group_F].T
    return jnp.broadcast_to(ranked_RG, (k, neurons)).T


def join(top: TopK, mesh: Mesh) -> TopK:
    """One top-k, without the axis P, from those of all data shards; rank r lies in slot r."""
    specs = jax.tree.map(lambda spec: P(*tuple(spec)[1:]), partition_specs(top))
    return jax.shard_map(
        _join_shard, mesh=mesh, in_specs=(partition_specs(top),), out_specs=specs, check_vma=False
    )(top)


def _join_shard(top: TopK) -> TopK:
    top = jax.tree.map(lambda x: x[0], top)
    k = len(top.priority_RG)
    part = lax.axis_index("data")

    def gathered(x_RG: Array) -> Array:
        """All parts' ranks side by side, [R * parts, G]."""
        return lax.all_gather(x_RG, "data", axis=0, tiled=True)

    priority, sequence, owner, slot = lax.sort(
        (
            -gathered(top.priority_RG),
            gathered(top.sequence_RG),
            gathered(jnp.full_like(top.slot_RG, part)),
            gathered(top.slot_RG),
        ),
        dimension=0,
        num_keys=2,
    )
    owner_FR, slot_FR = (_of_neurons(x_RG[:k], top) for x_RG in (owner, slot))
    mine_FRT = jnp.take_along_axis(top.activation_FRT, slot_FR[:, :, None], axis=1)
    # Every winner has one owner, so adding zeros from the others moves it unchanged.
    found_FRT = lax.psum(jnp.where((owner_FR == part)[:, :, None], mine_FRT, 0), "data")
    return TopK(
        priority_RG=-priority[:k],
        sequence_RG=sequence[:k],
        slot_RG=jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[:, None], priority[:k].shape),
        # A sum may give any NaN; all of a store's are the same one.
        activation_FRT=jnp.where(jnp.isnan(found_FRT), jnp.nan, found_FRT),
        group_F=top.group_F,
    )
