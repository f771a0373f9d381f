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
from jaxplain.exemplars.reduction import empty_reduction
from jaxplain.exemplars.selection import Selection, select_neurons
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
        reduction_bytes=_reduction_bytes(config, arch, selection),
        flops=float(splits * rows * tokens) * flops_per_token(arch, selection.depth, tokens),
    )


def flops_per_token(arch: Architecture, depth: int, tokens: int) -> int:
    """Of a forward pass through `depth` layers, in sequences of `tokens`: two for every multiplication.

    Attention is counted over whole sequences, as it is computed in them; norms and activations are left out,
    and so are the head and the last layer's down projection, which are not computed.
    """
    d, f = arch.width, arch.neurons
    heads = arch.query_heads * arch.head_width
    projections = d * (heads + 2 * arch.key_value_heads * arch.head_width) + heads * d
    layer = projections + 2 * tokens * heads + (3 if arch.gated else 2) * d * f
    return 2 * (depth * layer - d * f)


def _split_arrays(
    config: ExtractConfig, selection: Selection, rows: int
) -> Mapping[str, Mapping[str, schema.ArraySpec]]:
    sizes = {"layers": len(selection.layers), "neurons": len(selection.neurons)}
    tokens = config.corpus.sequence_length
    groups = {
        "sequences": schema.sequence_arrays(sequences=rows, tokens=tokens),
        "stats": schema.statistics_arrays(**sizes, quantiles=len(config.statistics.quantiles)),
    }
    for kind in config.exemplars.kinds:
        groups[kind] = schema.kind_arrays(
            **sizes,
            k=config.exemplars.k,
            tokens=tokens,
            activation_dtype=config.exemplars.activation_dtype,
        )
    return groups


def _reduction_bytes(config: ExtractConfig, arch: Architecture, selection: Selection) -> int:
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )

    def reduction(neurons: int) -> object:
        return empty_reduction(
            kinds=tuple(config.exemplars.kinds),
            neurons=neurons,
            k=config.exemplars.k,
            tokens=config.corpus.sequence_length,
            sampled_tokens=config.statistics.sampled_tokens,
            dtype=jnp.dtype(config.exemplars.activation_dtype),
            mesh=mesh,
        )

    shapes = (
        jax.eval_shape(functools.partial(reduction, len(indices))) for indices in selection.indices.values()
    )
    return sum(map(_bytes, shapes))


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
