"""What becomes of a layer's activations at the moment they are sown.

`LayerReduction` is the state of one layer: a top-k for every kind, another for every draw of kind `quantile`,
the activations at tokens drawn at random (for quantiles), moments, and sums by token for chosen neurons.
`Fold` pairs it with the batch in flight; the decoder's sow calls `fold`, and only the new state leaves the
layer. In a layer of experts a token counts only for the experts that it is routed to, and kind `random` draws
for every expert from the sequences that have such a token.

State is sharded over the mesh: neurons over `model`, and one *partial* state per `data` shard in a
leading axis P, so that a step moves nothing between data shards. `merging` joins the partials.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxplain.exemplars.moments import Moments, empty_moments, update_moments
from jaxplain.exemplars.token_sample import update_sample
from jaxplain.exemplars.token_sums import TokenSums, empty_token_sums, update_token_sums
from jaxplain.exemplars.topk import TopK, empty_topk, update_topk
from jaxplain.subjects.mixture import Routed

Kind = Literal["max", "min", "random"]
KINDS: tuple[Kind, ...] = ("max", "min", "random")


class LayerReduction(NamedTuple):
    """One layer's running answer; every array has a leading axis P of data shards.

    `draws` has, by how many sequences are drawn, the strongest of them; see `strata`. `sample_MF` are the
    activations at drawn tokens, 0 where another shard has them. `token_sums` is None where no neuron was
    chosen.

    In a layer of experts `expert_F` says which one each neuron is of, and `read` how many of the sequences
    of each draw have a token for it; the sample is NaN at tokens that are not routed to the expert. Elsewhere
    `expert_F` is None and `read` empty, since only sequences and tokens that count are drawn.
    """

    tops: dict[Kind, TopK]
    draws: dict[int, TopK]
    read: dict[int, UInt[Array, "*P F"]]
    sample_MF: Float[Array, "*P M F"]
    moments: Moments
    token_sums: TokenSums | None
    expert_F: Int[Array, "*P F"] | None


class Rows(NamedTuple):
    """A batch of token-table rows.

    `tokens_BT` is -1 where there is no token; a whole row of -1 pads an uneven batch. `counted_BT` marks the
    tokens that count. `lottery_B` is the priority for kind `random`, `turn_B` each row's place in the draw of
    sequences. `drawn_PW` are the tokens drawn from each data shard's part of the batch, and `slot_PW` where
    their activations go; see `draws`.
    """

    tokens_BT: Int[Array, "B T"]
    counted_BT: Bool[Array, "B T"]
    sequence_B: Int[Array, "B"]
    lottery_B: Float[Array, "B"]
    turn_B: Int[Array, "B"]
    drawn_PW: Int[Array, "P W"]
    slot_PW: Int[Array, "P W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """A layer's reduction together with the batch that is passing through the model."""

    reduction: LayerReduction
    rows: Rows
    neurons: Int[Array, "N"] | None
    active_above: float = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})

    def fold(self, activations: Float[Array, "B T F"] | Routed) -> "Fold":
        """The reduction with this batch's activations folded in."""
        if isinstance(activations, Routed):
            acts_BTF, routed_BTE = activations
        else:
            acts_BTF, routed_BTE = activations, None
        if self.neurons is not None:
            acts_BTF = acts_BTF[:, :, self.neurons]
        # Written once and read by every reduction, rather than computed again in each.
        acts_BTF = lax.optimization_barrier(acts_BTF)
        specs = partition_specs(self.reduction)
        update = jax.shard_map(
            functools.partial(_update_shard, active_above=self.active_above),
            mesh=self.mesh,
            in_specs=(specs, P("data"), P("data", None, "model"), P("data")),
            out_specs=specs,
            check_vma=False,
        )
        return dataclasses.replace(self, reduction=update(self.reduction, self.rows, acts_BTF, routed_BTE))


def partition_specs(tree: Any) -> Any:
    """How the arrays of a reduction, or of a part of one, lie on the mesh, in the same structure."""

    def spec(path: tuple[Any, ...], part: Any, grouped: bool = False) -> Any:
        if isinstance(part, TopK):
            of_array = functools.partial(spec, grouped=part.group_F is not None)
            return jax.tree_util.tree_map_with_path(of_array, part)
        match getattr(path[-1], "name", None):
            case "priority_RG" | "sequence_RG" | "slot_RG":
                return P("data", None, None if grouped or part.shape[-1] == 1 else "model")
            case "token_count_G":
                return P("data", None if part.shape[-1] == 1 else "model")
            case "count_VG":
                return P("data", None, None if part.shape[-1] == 1 else "model")
            case "sample_MF" | "sum_VC" | "carry_VC":
                return P("data", None, "model")
            case _:
                return P("data", "model")

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=lambda part: isinstance(part, TopK))


def empty_reduction(
    *,
    kinds: tuple[Kind, ...],
    neurons: int,
    k: int,
    tokens: int,
    sampled_tokens: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    experts: int = 1,
    expert_F: Int[np.ndarray, "F"] | None = None,
    draws: Mapping[int, int] | None = None,
    summed: Int[np.ndarray, "C"] | None = None,
    vocabulary: int = 0,
) -> LayerReduction:
    """A reduction that has seen nothing, laid out on the mesh. `neurons` divides by axis `model`.

    In a layer of `experts`, `expert_F` says which of them each neuron is of. `draws` has, by how many
    sequences are drawn, how many to keep; `summed` the neurons that get sums by token, as
    `token_sums.spread_over_shards` gives them.
    """

    def build() -> LayerReduction:
        group_F = None if expert_F is None else jnp.asarray(expert_F, jnp.int32)
        tops: dict[Kind, TopK] = {
            kind: empty_topk(
                groups=experts if kind == "random" else neurons,
                neurons=neurons,
                k=k,
                tokens=tokens,
                dtype=dtype,
                group_F=group_F if kind == "random" else None,
            )
            for kind in kinds
        }
        drawn = {
            count: empty_topk(groups=neurons, neurons=neurons, k=kept, tokens=tokens, dtype=dtype)
            for count, kept in (draws or {}).items()
        }
        groups = 1 if group_F is None else neurons
        shard = LayerReduction(
            tops=tops,
            draws=drawn,
            read={} if group_F is None else {count: jnp.zeros(neurons, jnp.uint32) for count in drawn},
            sample_MF=jnp.zeros((sampled_tokens, neurons), dtype),
            moments=empty_moments(neurons=neurons, groups=groups),
            token_sums=None
            if summed is None
            else empty_token_sums(summed, vocabulary=vocabulary, alike=group_F is None),
            expert_F=group_F,
        )
        parts = mesh.shape["data"]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), shard)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(jax.eval_shape(build)))
    return jax.jit(build, out_shardings=shardings)()


class _Counted(NamedTuple):
    """Which tokens count for each expert, and for each neuron; one column each where all are alike."""

    expert_BTE: Bool[Array, "B T E"]
    neuron_BTG: Bool[Array, "B T G"]


def _update_shard(
    reduction: LayerReduction, rows: Rows, acts_BTF: Array, routed_BTE: Array | None, *, active_above: float
) -> LayerReduction:
    reduction = jax.tree.map(lambda x: x[0], reduction)
    counted = _counted(rows, routed_BTE, reduction.expert_F)
    update = functools.partial(
        update_topk,
        sequence_B=rows.sequence_B,
        acts_BTF=acts_BTF,
        counted_BTF=counted.neuron_BTG,
    )
    tops: dict[Kind, TopK] = {
        kind: update(top, _priority_BG(kind, rows, counted, acts_BTF)) for kind, top in reduction.tops.items()
    }
    token_BTG = counted.neuron_BTG
    highest_BF = _priority_BG("max", rows, counted, acts_BTF)  # without draws nothing of it is computed
    draws = {
        count: update(top, jnp.where((rows.turn_B < count)[:, None], highest_BF, -jnp.inf))
        for count, top in reduction.draws.items()
        if highest_BF is not None
    }
    read = {
        count: read_F + ((rows.turn_B < count)[:, None] & token_BTG.any(axis=1)).sum(axis=0, dtype=jnp.uint32)
        for count, read_F in reduction.read.items()
    }
    routed_BTG = None if routed_BTE is None else token_BTG
    sample_MF = update_sample(reduction.sample_MF, acts_BTF, rows.drawn_PW[0], rows.slot_PW[0], routed_BTG)
    sums = reduction.token_sums
    reduction = LayerReduction(
        tops=tops,
        draws=draws,
        read=read,
        sample_MF=sample_MF,
        moments=update_moments(reduction.moments, acts_BTF, token_BTG, active_above=active_above),
        token_sums=sums and update_token_sums(sums, rows.tokens_BT, token_BTG, acts_BTF),
        expert_F=reduction.expert_F,
    )
    return jax.tree.map(lambda x: x[None], reduction)


def _counted(rows: Rows, routed_BTE: Array | None, expert_F: Array | None) -> _Counted:
    counted_BT1 = rows.counted_BT[:, :, None]
    if routed_BTE is None:
        return _Counted(counted_BT1, counted_BT1)
    counted_BTE = counted_BT1 & routed_BTE
    return _Counted(counted_BTE, lax.optimization_barrier(counted_BTE[:, :, expert_F]))


def _priority_BG(kind: Kind, rows: Rows, counted: _Counted, acts_BTF: Array) -> Array:
    """How strongly each sequence of the batch claims a place, float32; -inf where nothing counts."""
    # Clamping with an infinity of the right sign masks a token, and costs less than a select.
    bound_BTG = jnp.where(counted.neuron_BTG, jnp.inf, -jnp.inf).astype(acts_BTF.dtype)
    match kind:
        case "max":
            return jnp.minimum(acts_BTF, bound_BTG).max(axis=1).astype(jnp.float32)
        case "min":
            return -jnp.maximum(acts_BTF, -bound_BTG).min(axis=1).astype(jnp.float32)
        case "random":
            return jnp.where(counted.expert_BTE.any(axis=1), rows.lottery_B[:, None], -jnp.inf)
