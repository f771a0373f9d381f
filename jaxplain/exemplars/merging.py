"""From partial top-k states, one per data shard, to the one answer that the store keeps."""

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
    return {
        kind: jax.jit(_merge, static_argnames="mesh")(top, mesh=mesh) for kind, top in reduction.tops.items()
    }


def merge_sample(reduction: LayerReduction, mesh: Mesh) -> Ranked:
    """A layer's tokens drawn for quantiles, as sequences of one token; the same ones for all neurons."""
    return jax.jit(_merge, static_argnames="mesh")(reduction.tokens, mesh=mesh)


def _merge(top: TopK, *, mesh: Mesh) -> Ranked:
    merge = jax.shard_map(
        _merge_shard,
        mesh=mesh,
        in_specs=(partition_specs(top),),
        out_specs=P("model"),
        check_vma=False,
    )
    return merge(top)


def _merge_shard(top: TopK) -> Ranked:
    top = jax.tree.map(lambda x: x[0], top)
    neurons, k, _ = top.activation_FRT.shape
    part = lax.axis_index("data")

    def gathered(x_RG: Array) -> Array:
        """All parts' ranks side by side, [R * parts, F]."""
        x_RF = jnp.broadcast_to(x_RG, (k, neurons))
        return lax.all_gather(x_RF, "data", axis=0, tiled=True)

    owner_RF = jnp.full((k, neurons), part, jnp.int32)
    priority, sequence, owner, slot = lax.sort(
        (
            -gathered(top.priority_RG),
            gathered(top.sequence_RG),
            gathered(owner_RF),
            gathered(top.slot_RG),
        ),
        dimension=0,
        num_keys=2,
    )
    priority_FR, sequence_FR, owner_FR, slot_FR = (x[:k].T for x in (-priority, sequence, owner, slot))
    mine_FRT = jnp.take_along_axis(top.activation_FRT, slot_FR[:, :, None], axis=1)
    # Every winner has one owner, so adding zeros from the others moves it unchanged.
    mine_FRT = jnp.where((owner_FR == part)[:, :, None], mine_FRT, 0)
    return Ranked(
        priority_FR=priority_FR,
        sequence_FR=sequence_FR,
        activation_FRT=lax.psum(mine_FRT, "data"),
    )
