"""What an extraction leaves on disk, from the shapes of the store's arrays."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxplain.exemplars.snapshots import snapshot_form
from jaxplain.exemplars.states import sampled_tokens
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
        statistics: Of every neuron, with the tokens sampled for quantiles and tables of mean activations.
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
    vocabulary = demand.arch.vocabulary
    found = Disk(
        sequences=0,
        exemplars=0,
        statistics=0,
        vocabulary=_bytes(
            schema.vocabulary_arrays(tokens=vocabulary, characters=_BYTES_PER_TOKEN_TEXT * vocabulary)
        ),
    )
    for rows in demand.sequences.values():
        groups = split_arrays(demand, rows)
        size = {group: _bytes(arrays, _asked_for(demand, group)) for group, arrays in groups.items()}
        statistics = sum(size.pop(group, 0) for group in ("stats", schema.SAMPLE, schema.TOKEN_TABLE))
        found = dataclasses.replace(
            found,
            sequences=found.sequences + size.pop("sequences"),
            statistics=found.statistics + statistics,
            exemplars=found.exemplars + sum(size.values()),
        )
    return found


def split_arrays(demand: Demand, rows: int) -> Mapping[str, Mapping[str, schema.ArraySpec]]:
    """The arrays of a split with so many sequences, by group and name."""
    config, selection = demand.config, demand.selection
    exemplars = config.exemplars
    sizes: dict[str, int] = {"layers": len(selection.layers), "neurons": len(selection.neurons)}
    if selection.experts is not None:
        sizes["experts"] = len(selection.experts)
    groups = {
        "sequences": schema.sequence_arrays(sequences=rows, tokens=demand.tokens),
        "stats": schema.statistics_arrays(**sizes, quantiles=len(config.statistics.quantiles)),
    }
    for kind in exemplars.kinds:
        strata = len(exemplars.strata) + 1 if kind == "quantile" else 0
        groups[schema.group_of(kind)] = schema.kind_arrays(
            **sizes,
            k=strata * exemplars.samples_per_quantile or exemplars.k,
            tokens=demand.tokens,
            activation_dtype=exemplars.activation_dtype,
            strata=strata,
        )
    if config.statistics.quantiles:
        groups[schema.SAMPLE] = schema.sample_arrays(
            **sizes,
            tokens=sampled_tokens(config.statistics, selection),
            activation_dtype=exemplars.activation_dtype,
        )
    if chosen := sum(map(len, demand.tabled.values())):
        groups[schema.TOKEN_TABLE] = schema.token_table_arrays(
            neurons=chosen,
            tokens=config.statistics.tokens.count,
            has_experts=selection.experts is not None,
        )
    return groups


def _asked_for(demand: Demand, group: str) -> float:
    """The share of a group's arrays that is written."""
    if group in ("sequences", schema.TOKEN_TABLE):
        return 1.0
    selection = demand.selection
    experts = 1 if selection.experts is None else len(selection.experts)
    return demand.neurons / (len(selection.layers) * experts * len(selection.neurons))


def checkpoint_size(demand: Demand, *, data: int) -> int:
    """Bytes of a checkpoint of one split on a mesh with so many data shards."""
    form = snapshot_form(
        demand.state(parts=1, model=1),
        kept={layer: len(indices) for layer, indices in demand.selection.indices.items()},
        summed={layer: (numbers, numbers) for layer, numbers in demand.tabled.items()},
        parts=data,
        mesh=AbstractMesh((1, 1), ("data", "model")),
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(form))


def _bytes(arrays: Mapping[str, schema.ArraySpec], share: float = 1.0) -> int:
    """Of arrays of which a share is written, with the places of all their chunks."""
    total = 0.0
    for spec in arrays.values():
        sizes = zip(spec.shape, spec.chunk, strict=True)
        chunks = math.prod(math.ceil(size / chunk) for size, chunk in sizes)
        total += share * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        total += _INDEX_BYTES_PER_CHUNK * chunks
    return int(total)
