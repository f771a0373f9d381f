"""What a store looks like on disk: Zarr v3 groups and arrays, and nothing that depends on jaxplain.

    <root>                                   attributes: format, version, complete, config, subject, ...
    <root>/vocabulary/{text,end}             the bytes of every token, joined, and where each one ends
    <split>/{layer,neuron}                   coordinates: which layers and neurons the axes stand for
    <split>/sequences/token                  every sequence that was seen; its row is its id
    <split>/sequences/{corpus,document,start,length}    where each came from
    <split>/{max,min,random,quantile_sample}/{score,sequence,activation}    exemplars, strongest first
    <split>/quantile_sample/{stratum,level}  each rank's stratum; stratum s is from level s up to level s + 1
    <split>/stats/{count,mean,variance,skewness,kurtosis,fraction_active,quantile}
    <split>/quantile                         coordinate: the levels of stats/quantile
    <split>/sample/{lottery,sequence}        the tokens drawn for quantiles, in stores that have these
    <split>/sample/activation                what every neuron does at each of them
    <split>/token_table/{chosen_layer,chosen_neuron}    neurons whose mean activation is known for every token
    <split>/token_table/{max,min}/{token,mean,count}    the tokens with the highest, and with the lowest means

Where the subject is a mixture of experts, a neuron is one of an expert, and all arrays of neurons have an
axis `expert` before that of neurons:

    <split>/expert                           coordinate: which experts the axis stands for
    <split>/shared                           1 where an expert of a layer reads every token, and 0 where it
                                             reads the tokens that are routed to it, or there is none

Experts are numbered from 0; a shared expert has the number after the last one that tokens are routed to. A
layer with a plain MLP has that as its only expert, 0. The axes are as long as the most experts and the widest
expert need; neurons that do not exist are like those that were not asked for. A token that is not routed to
an expert does not count for its neurons: of the tokens drawn for stats/quantile those that are routed to it
are its sample, which is NaN at the others, sequences without one are in none of its exemplars, of any kind,
and strata are of those with one. The neurons of token_table are named by `chosen_expert` as well.

Chunks hold whole neurons, so that one neuron is one read; shards keep the number of files low.
"""

import dataclasses
import math
from typing import Any

FORMAT = "jaxplain.exemplars"
VERSION = 1
STORE_NAME = "exemplars.zarr"

STATISTICS = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
QUANTILE = "quantile"
TOKEN_TABLE = "token_table"
SAMPLE = "sample"

_ROWS_PER_CHUNK = 64
_CHUNKS_PER_SHARD = 1024
ROWS_PER_SHARD = _ROWS_PER_CHUNK * _CHUNKS_PER_SHARD
_NEURONS_PER_CHUNK = 64
_SHARD_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array. `chunk` is what is compressed and read as a whole, `shard` what is one file."""

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: int | float | str
    chunk: tuple[int, ...]
    shard: tuple[int, ...]

    def metadata(self) -> dict[str, Any]:
        """The array's zarr.json."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        plain = little if self.dtype != "uint8" else {"name": "bytes"}
        compressed = [plain, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": compressed,
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "fill_value": self.fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(self.dimensions),
            "attributes": {},
        }


def group_of(kind: str) -> str:
    """The group with the exemplars of a kind; `quantile` itself is a coordinate."""
    return "quantile_sample" if kind == "quantile" else kind


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """A group's zarr.json."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def vector(dimension: str, size: int, dtype: str) -> ArraySpec:
    """A one-dimensional array in one chunk."""
    shape = (max(size, 1),)
    return ArraySpec(dimensions=(dimension,), shape=(size,), dtype=dtype, fill=0, chunk=shape, shard=shape)


def vocabulary_arrays(*, tokens: int, characters: int) -> dict[str, ArraySpec]:
    """Token i's bytes are `text[end[i - 1] : end[i]]`."""
    return {
        "text": vector("byte", characters, "uint8"),
        "end": vector("vocabulary", tokens, "int64"),
    }


def sequence_arrays(*, sequences: int, tokens: int) -> dict[str, ArraySpec]:
    """The token table (int32, -1 where there is no token) and the provenance of its rows."""

    def spec(dtype: str, *tail: int) -> ArraySpec:
        chunk = (_ROWS_PER_CHUNK if tail else ROWS_PER_SHARD, *tail)
        return ArraySpec(
            dimensions=("sequence", "token")[: 1 + len(tail)],
            shape=(sequences, *tail),
            dtype=dtype,
            fill=-1,
            chunk=chunk,
            shard=(ROWS_PER_SHARD, *tail),
        )

    provenance = {"corpus": "int32", "document": "int64", "start": "int32", "length": "int32"}
    return {"token": spec("int32", tokens)} | {name: spec(d) for name, d in provenance.items()}


def shared_array(*, layers: int, experts: int) -> ArraySpec:
    """Which experts of which layers read every token."""
    shape = (layers, experts)
    return ArraySpec(
        dimensions=("layer", "expert"), shape=shape, dtype="uint8", fill=0, chunk=shape, shard=shape
    )


def kind_arrays(
    *,
    layers: int,
    neurons: int,
    k: int,
    tokens: int,
    activation_dtype: str,
    experts: int | None = None,
    strata: int = 0,
) -> dict[str, ArraySpec]:
    """Exemplars of one kind. Empty ranks have sequence -1 and NaN elsewhere.

    `score` is the extreme activation itself for max and min, the highest for quantile, and the drawn
    number for random, NaN where a store was imported. `activation` is NaN at tokens that do not count. Where
    there are `strata`, each rank has the number of one, and `level` is where they begin and end.
    """
    # One neuron's activations are a chunk; 64 MiB or so, and at most a layer, are a shard.
    bytes_per_neuron = k * tokens * _bytes_of(activation_dtype)
    per_shard = max(1, min(neurons, _SHARD_BYTES // bytes_per_neuron))
    axis, one, all_experts = _expert_axis(experts)
    whole_experts = (max(1, min(experts, _SHARD_BYTES // (bytes_per_neuron * neurons))),) if experts else ()

    def ranked(dtype: str, fill: int | str) -> ArraySpec:
        per_chunk = min(neurons, _NEURONS_PER_CHUNK)
        return ArraySpec(
            dimensions=("layer", *axis, "neuron", "rank"),
            shape=(layers, *all_experts, neurons, k),
            dtype=dtype,
            fill=fill,
            chunk=(1, *one, per_chunk, k),
            shard=(1, *all_experts, math.ceil(neurons / per_chunk) * per_chunk, k),
        )

    parted = (
        {"stratum": ranked("int32", -1), "level": vector("edge", strata + 1, "float64")} if strata else {}
    )
    return parted | {
        "score": ranked("float32", "NaN"),
        "sequence": ranked("int32", -1),
        "activation": ArraySpec(
            dimensions=("layer", *axis, "neuron", "rank", "token"),
            shape=(layers, *all_experts, neurons, k, tokens),
            dtype=activation_dtype,
            fill="NaN",
            chunk=(1, *one, 1, k, tokens),
            shard=(1, *whole_experts, per_shard, k, tokens),
        ),
    }


def _expert_axis(experts: int | None) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """The name of the axis, and the lengths of one expert and of all; nothing where there are none."""
    return ((), (), ()) if experts is None else (("expert",), (1,), (experts,))


def name_axes(*, has_experts: bool) -> tuple[str, ...]:
    """The axes along which a neuron is found, by which it is called."""
    return ("layer", "expert", "neuron") if has_experts else ("layer", "neuron")


def token_table_arrays(*, neurons: int, tokens: int, has_experts: bool = False) -> dict[str, ArraySpec]:
    """Vocabulary tokens by mean activation, the furthest first, over all tokens that count.

    Empty ranks have token -1, mean NaN and count 0.
    """

    def spec(dtype: str, fill: int | str) -> ArraySpec:
        chunk = (min(neurons, _NEURONS_PER_CHUNK), tokens)
        return ArraySpec(
            dimensions=("chosen", "rank"),
            shape=(neurons, tokens),
            dtype=dtype,
            fill=fill,
            chunk=chunk,
            shard=(math.ceil(neurons / chunk[0]) * chunk[0], tokens),
        )

    names = {
        f"chosen_{axis}": vector("chosen", neurons, "int32") for axis in name_axes(has_experts=has_experts)
    }
    ranked = {"token": spec("int32", -1), "mean": spec("float32", "NaN"), "count": spec("int64", 0)}
    return names | {f"{sign}/{name}": array for sign in ("max", "min") for name, array in ranked.items()}


def statistics_arrays(
    *, layers: int, neurons: int, quantiles: int, experts: int | None = None
) -> dict[str, ArraySpec]:
    """Statistics over all tokens that count; `count` is -1 where a neuron was not asked for.

    Where a store was imported, `count` is 0 and others are NaN if what it was made of does not tell them.

    `kurtosis` is not the excess: a Gaussian has 3. It and `skewness` are NaN where nothing varies.
    """
    axis, one, all_experts = _expert_axis(experts)

    def spec(dtype: str, fill: int | str) -> ArraySpec:
        shape = (layers, *all_experts, neurons)
        return ArraySpec(
            dimensions=("layer", *axis, "neuron"),
            shape=shape,
            dtype=dtype,
            fill=fill,
            chunk=(1, *one, neurons),
            # A layer is a file, since another process may write the next one.
            shard=(1, *shape[1:]),
        )

    single = {name: spec("int64", -1) if name == "count" else spec("float32", "NaN") for name in STATISTICS}
    if not quantiles:
        return single
    per_chunk = min(neurons, _NEURONS_PER_CHUNK)
    several = ArraySpec(
        dimensions=("layer", *axis, "neuron", QUANTILE),
        shape=(layers, *all_experts, neurons, quantiles),
        dtype="float32",
        fill="NaN",
        chunk=(1, *one, per_chunk, quantiles),
        shard=(1, *all_experts, math.ceil(neurons / per_chunk) * per_chunk, quantiles),
    )
    return single | {QUANTILE: several}


def sample_arrays(
    *, layers: int, neurons: int, tokens: int, activation_dtype: str, experts: int | None = None
) -> dict[str, ArraySpec]:
    """The `tokens` drawn at random for quantiles, the same for all neurons, by falling lottery number.

    `lottery` is what each was drawn by (`corpora.hashing.token_lottery`), so that samples of slices can be
    merged into one of all, and `sequence` the row that it stands in. Where fewer tokens count than were to be
    drawn, the rest has lottery and activation NaN and sequence -1. At tokens that are not routed to a
    neuron's expert its activation is NaN too.
    """

    def drawn(dtype: str, fill: int | str) -> ArraySpec:
        return dataclasses.replace(vector("draw", tokens, dtype), fill=fill)

    axis, one, all_experts = _expert_axis(experts)
    per_chunk = min(neurons, _NEURONS_PER_CHUNK)
    chunk_bytes = per_chunk * tokens * _bytes_of(activation_dtype)
    of_expert = math.ceil(neurons / per_chunk)
    chunks = max(1, min(of_expert, _SHARD_BYTES // chunk_bytes))
    whole_experts = (max(1, min(experts, _SHARD_BYTES // (chunk_bytes * of_expert))),) if experts else ()
    return {
        "lottery": drawn("float32", "NaN"),
        "sequence": drawn("int32", -1),
        "activation": ArraySpec(
            dimensions=("layer", *axis, "neuron", "draw"),
            shape=(layers, *all_experts, neurons, tokens),
            dtype=activation_dtype,
            fill="NaN",
            chunk=(1, *one, per_chunk, tokens),
            shard=(1, *whole_experts, chunks * per_chunk, tokens),
        ),
    }


def _bytes_of(activation_dtype: str) -> int:
    return 2 if activation_dtype == "float16" else 4
