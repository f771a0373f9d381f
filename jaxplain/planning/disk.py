"""What an extraction leaves on disk, from the shapes of the store's arrays."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxplain.planning.demand import Demand
from jaxplain.store import schema

_INDEX_BYTES_PER_CHUNK = 16
_BYTES_PER_TOKEN_TEXT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on disk, before compression, which takes little from activations.

    Attributes:
        sequences: The token tables.
        exemplars: Scores, sequence numbers and activations.
        statistics: Of every neuron.
        vocabulary: The bytes of every token; an estimate, as no tokenizer is read.
    """

    sequences: int
    exemplars: int
    statistics: int
    vocabulary: int

    @property
    def total(self) -> int:
        """Of the whole store."""
        return self.sequences + self.exemplars + self.statistics + self.vocabulary


def store_size(demand: Demand) -> Disk:
    """The store's size. Neurons that are not asked for take no place in it."""
    config, exemplars = demand.config, demand.config.exemplars
    size = {"layers": len(demand.selection.layers), "neurons": len(demand.selection.neurons)}
    kind = schema.kind_arrays(
        **size, k=exemplars.k, tokens=demand.tokens, activation_dtype=exemplars.activation_dtype
    )
    statistics = schema.statistics_arrays(**size, quantiles=len(config.statistics.quantiles))
    asked_for = demand.neurons / math.prod(size.values())
    splits, tokens = len(demand.sequences), demand.arch.vocabulary
    return Disk(
        sequences=sum(
            _bytes(schema.sequence_arrays(sequences=rows, tokens=demand.tokens))
            for rows in demand.sequences.values()
        ),
        exemplars=splits * len(exemplars.kinds) * _bytes(kind, asked_for),
        statistics=splits * _bytes(statistics, asked_for),
        vocabulary=_bytes(schema.vocabulary_arrays(tokens=tokens, characters=_BYTES_PER_TOKEN_TEXT * tokens)),
    )


def state_size(demand: Demand, *, data: int, model: int) -> int:
    """Bytes of the reductions of one split over all devices, which is what a checkpoint holds."""
    leaves = jax.tree.leaves(demand.state(parts=data, model=model))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _bytes(arrays: Mapping[str, schema.ArraySpec], share: float = 1.0) -> int:
    """Of arrays of which a share is written, with the places of all their chunks."""
    total = 0.0
    for spec in arrays.values():
        sizes = zip(spec.shape, spec.chunk, strict=True)
        chunks = math.prod(math.ceil(size / chunk) for size, chunk in sizes)
        total += share * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        total += _INDEX_BYTES_PER_CHUNK * chunks
    return int(total)
