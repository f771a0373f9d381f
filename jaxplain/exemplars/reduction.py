"""What becomes of a layer's activations at the moment they are sown.

`LayerReduction` is the state of one layer: a top-k for every kind, another of single tokens drawn at
random (for quantiles), and moments. `Fold` pairs it with the batch in flight; the decoder's sow calls
`fold`, and only the new state leaves the layer. In a layer of experts, what is drawn at random is drawn for
every expert from the sequences and tokens that are routed to it.

State is sharded over the mesh: neurons over `model`, and one *partial* state per `data` shard in a
leading axis P, so that a step moves nothing between data shards. `merging` joins the partials.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxplain.exemplars.moments import Moments, empty_moments, update_moments
from jaxplain.exemplars.topk import TopK, empty_topk, update_topk
from jaxplain.subjects.mixture import Routed

Kind = Literal["max", "min", "random"]
KINDS: tuple[Kind, ...] = ("max", "min", "random")


class LayerReduction(NamedTuple):
    """One layer's running answer; every array has a leading axis P of data shards."""

    tops: dict[Kind, TopK]
    tokens: TopK
    moments: Moments


class Rows(NamedTuple):
    """A batch of token-table rows.

    `tokens_BT` is -1 where there is no token; a whole row of -1 pads an uneven batch.
    `counted_BT` marks the tokens that count. `lottery_B` is the priority for kind `random`,
    `token_lottery_BT` that of single tokens.
    """

    tokens_BT: Int[Array, "B T"]
    counted_BT: Bool[Array, "B T"]
    sequence_B: Int[Array, "B"]
    lottery_B: Float[Array, "B"]
    token_lottery_BT: Float[Array, "B T"]


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
        match path[-1].name:
            case "priority_RG" | "sequence_RG" | "slot_RG":
                return P("data", None, None if grouped or part.shape[-1] == 1 else "model")
            case "token_count_G":
                return P("data", None if part.shape[-1] == 1 else "model")
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
) -> LayerReduction:
    """A reduction that has seen nothing, laid out on the mesh. `neurons` divides by axis `model`.

    In a layer of `experts`, `expert_F` says which of them each neuron is of.
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
        sample = empty_topk(
            groups=experts, neurons=neurons, k=sampled_tokens, tokens=1, dtype=dtype, group_F=group_F
        )
        moments = empty_moments(neurons=neurons, groups=1 if expert_F is None else neurons)
        shard = LayerReduction(tops=tops, tokens=sample, moments=moments)
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
    counted = _counted(rows, routed_BTE, reduction.tokens.group_F)
    update = functools.partial(
        update_topk,
        sequence_B=rows.sequence_B,
        acts_BTF=acts_BTF,
        counted_BTF=counted.neuron_BTG,
    )
    tops: dict[Kind, TopK] = {
        kind: update(top, _priority_BG(kind, rows, counted, acts_BTF)) for kind, top in reduction.tops.items()
    }
    sample = _update_sample(reduction.tokens, rows, counted, acts_BTF)
    moments = update_moments(reduction.moments, acts_BTF, counted.neuron_BTG, active_above=active_above)
    return jax.tree.map(lambda x: x[None], LayerReduction(tops=tops, tokens=sample, moments=moments))


def _counted(rows: Rows, routed_BTE: Array | None, expert_F: Array | None) -> _Counted:
    counted_BT1 = rows.counted_BT[:, :, None]
    if routed_BTE is None:
        return _Counted(counted_BT1, counted_BT1)
    counted_BTE = counted_BT1 & routed_BTE
    return _Counted(counted_BTE, lax.optimization_barrier(counted_BTE[:, :, expert_F]))


def _update_sample(sample: TopK, rows: Rows, counted: _Counted, acts_BTF: Array) -> TopK:
    """The tokens of the batch as sequences of one token, which all neurons of an expert draw together."""
    tokens = acts_BTF.shape[0] * acts_BTF.shape[1]
    priority_BTE = jnp.where(counted.expert_BTE, rows.token_lottery_BT[:, :, None], -jnp.inf)
    return update_topk(
        sample,
        priority_BTE.reshape((tokens, -1)),
        sequence_B=jnp.repeat(rows.sequence_B, acts_BTF.shape[1]),
        acts_BTF=acts_BTF.reshape((tokens, 1, -1)),
        counted_BTF=counted.neuron_BTG.reshape((tokens, 1, -1)),
    )


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
