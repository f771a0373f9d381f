"""What an extraction will take, before it is run: bytes on disk and on the devices, and arithmetic.

Bytes are those of the arrays, as the store's schema and the reduction make them: exact before compression,
for as many sequences as the config asks for.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import sampled_tokens
from jaxplain.exemplars.reduction import KINDS, empty_reduction
from jaxplain.exemplars.selection import Selection, select_neurons
from jaxplain.exemplars.strata import kept_of_draws, plan_strata
from jaxplain.exemplars.token_sums import choose_neurons
from jaxplain.store import schema
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes.

    Attributes:
        store_bytes: Of the whole store, all splits, without compression.
        weight_bytes: Of the layers that run, over all devices of axis `model`.
        reduction_bytes: Of the running reductions, over all devices of axis `model`; every data shard has its
            own.
        flops: Of the forward passes over all splits. The reduction adds a tenth or so, measured on a CPU.
    """

    store_bytes: int
    weight_bytes: int
    reduction_bytes: int
    flops: float

    def hours(self, *, peak: float, utilisation: float) -> float:
        """How long devices of together `peak` FLOP/s take at a share of that."""
        return self.flops / (peak * utilisation) / 3600


def estimate(config: ExtractConfig, arch: Architecture) -> Estimate:
    """What a config takes with a subject of an architecture.

    Raises JaxplainError where the config says neither how many sequences there are nor how many to expect.
    """
    rows = config.corpus.max_sequences or config.corpus.expected_sequences
    if rows is None:
        raise JaxplainError(
            "corpus.max_sequences is 0, so how much there will be is not known; say what you expect in "
            "corpus.expected_sequences."
        )
    selection = select_neurons(config.neurons, arch)
    splits = len(config.exemplars.splits)
    tokens = config.corpus.sequence_length
    arrays = [spec for specs in _split_arrays(config, selection, rows).values() for spec in specs.values()]
    weights = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=jnp.dtype(config.subject.dtype), depth=selection.depth)
    )
    return Estimate(
        store_bytes=splits * sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in arrays),
        weight_bytes=_bytes(nnx.state(weights)),
        reduction_bytes=_reduction_bytes(config, selection, rows),
        flops=float(splits * rows * tokens) * flops_per_token(arch, selection.depth, tokens),
    )


def flops_per_token(arch: Architecture, depth: int, tokens: int) -> int:
    """Of a forward pass through `depth` layers, in sequences of `tokens`: two for every multiplication.

    Attention is counted over whole sequences, as it is computed in them; norms and activations are left out,
    and so are the head and the last layer's down projection, which are not computed. All experts of a mixture
    are computed at every token.
    """
    d = arch.width
    neurons = [sum(arch.expert_widths(layer)) for layer in range(depth)]
    routers = sum(arch.routed_experts(layer) for layer in range(depth))
    heads = arch.query_heads * arch.head_width
    projections = d * (heads + 2 * arch.key_value_heads * arch.head_width) + heads * d
    attention = projections + 2 * tokens * heads
    mlps = (3 if arch.gated else 2) * d * sum(neurons) + d * routers - d * neurons[-1]
    return 2 * (depth * attention + mlps)


def _split_arrays(
    config: ExtractConfig, selection: Selection, rows: int
) -> Mapping[str, Mapping[str, schema.ArraySpec]]:
    sizes: dict[str, int] = {"layers": len(selection.layers), "neurons": len(selection.neurons)}
    has_experts = selection.experts is not None
    if selection.experts is not None:
        sizes["experts"] = len(selection.experts)
    exemplars, tables = config.exemplars, config.statistics.tokens
    tokens = config.corpus.sequence_length
    groups = {
        "sequences": schema.sequence_arrays(sequences=rows, tokens=tokens),
        "stats": schema.statistics_arrays(**sizes, quantiles=len(config.statistics.quantiles)),
    }
    for kind in exemplars.kinds:
        strata = len(exemplars.strata) + 1 if kind == "quantile" else 0
        groups[kind] = schema.kind_arrays(
            **sizes,
            k=strata * exemplars.samples_per_quantile or exemplars.k,
            tokens=tokens,
            activation_dtype=exemplars.activation_dtype,
            strata=strata,
        )
    if chosen := sum(map(len, _tabled(config, selection).values())):
        groups[schema.TOKEN_TABLE] = schema.token_table_arrays(
            neurons=chosen, tokens=tables.count, has_experts=has_experts
        )
    return groups


def _tabled(config: ExtractConfig, selection: Selection) -> dict[int, np.ndarray]:
    return choose_neurons(config.statistics.tokens.neurons, selection, seed=config.corpus.seed)


def _reduction_bytes(config: ExtractConfig, selection: Selection, rows: int) -> int:
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )

    arch, exemplars, tabled = selection.arch, config.exemplars, _tabled(config, selection)
    tokens, strata = config.corpus.sequence_length, ()
    if "quantile" in exemplars.kinds:
        strata = plan_strata(exemplars.strata, wanted=exemplars.samples_per_quantile, rows=rows)

    def reduction(layer: int) -> object:
        return empty_reduction(
            kinds=tuple(kind for kind in KINDS if kind in exemplars.kinds),
            neurons=len(selection.indices[layer]),
            k=exemplars.k,
            tokens=tokens,
            sampled_tokens=min(sampled_tokens(config.statistics, selection), rows * tokens),
            dtype=jnp.dtype(exemplars.activation_dtype),
            mesh=mesh,
            experts=len(arch.expert_widths(layer)),
            expert_F=selection.expert_of(layer) if arch.routed_experts(layer) else None,
            draws=kept_of_draws(strata),
            summed=np.zeros(len(tabled[layer]), np.int32) if layer in tabled else None,
            vocabulary=arch.vocabulary,
        )

    shapes = (jax.eval_shape(functools.partial(reduction, layer)) for layer in selection.indices)
    return sum(map(_bytes, shapes))


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
