"""What a store looks like on disk: Zarr v3 groups and arrays, and nothing that depends on jaxplain.

<root>                                   attributes: format, version, complete, config, subject, ...
<root>/vocabulary/{text,end}             the bytes of every token, joined, and where each one ends
<split>/{layer,neuron}                   coordinates: which layers and neurons the axes stand for
<split>/sequences/token                  every sequence that was seen; its row is its id
<split>/sequences/{corpus,document,start,length}    where each came from
<split>/{max,min,random}/{score,sequence,activation}    exemplars, strongest first
<split>/stats/{count,mean,variance,skewness,kurtosis,fraction_active,quantile}
<split>/quantile                         coordinate: the levels of stats/quantile
<split>/sample/{lottery,sequence}        the tokens drawn for quantiles, in stores that have these
<split>/sample/activation                what every neuron does at each of them

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


def kind_arrays(
    *, layers: int, neurons: int, k: int, tokens: int, activation_dtype: str
) -> dict[str, ArraySpec]:
    """Exemplars of one kind. Empty ranks have sequence -1 and NaN elsewhere.

    `score` is the extreme activation itself for max and min, and the drawn number for random.
    `activation` is NaN at tokens that do not count.
    """
    # One neuron's activations are a chunk; 64 MiB or so, and at most a layer, are a shard.
    bytes_per_neuron = k * tokens * _bytes_of(activation_dtype)
    per_shard = max(1, min(neurons, _SHARD_BYTES // bytes_per_neuron))

    def ranked(dtype: str, fill: int | str) -> ArraySpec:
        chunk = (1, min(neurons, _NEURONS_PER_CHUNK), k)
        shard = (1, math.ceil(neurons / chunk[1]) * chunk[1], k)
        return ArraySpec(
            dimensions=("layer", "neuron", "rank"),
            shape=(layers, neurons, k),
            dtype=dtype,
            fill=fill,
            chunk=chunk,
            shard=shard,
        )

    return {
        "score": ranked("float32", "NaN"),
        "sequence": ranked("int32", -1),
        "activation": ArraySpec(
            dimensions=("layer", "neuron", "rank", "token"),
            shape=(layers, neurons, k, tokens),
            dtype=activation_dtype,
            fill="NaN",
            chunk=(1, 1, k, tokens),
            shard=(1, per_shard, k, tokens),
        ),
    }


def statistics_arrays(*, layers: int, neurons: int, quantiles: int) -> dict[str, ArraySpec]:
    """Statistics over all tokens that count; `count` is -1 where a neuron was not asked for.

    `kurtosis` is not the excess: a Gaussian has 3. It and `skewness` are NaN where nothing varies.
    """

    def spec(dtype: str, fill: int | str) -> ArraySpec:
        shape = (layers, neurons)
        return ArraySpec(
            dimensions=("layer", "neuron"),
            shape=shape,
            dtype=dtype,
            fill=fill,
            chunk=(1, neurons),
            shard=shape,
        )

    single = {name: spec("int64", -1) if name == "count" else spec("float32", "NaN") for name in STATISTICS}
    if not quantiles:
        return single
    chunk = (1, min(neurons, _NEURONS_PER_CHUNK), quantiles)
    several = ArraySpec(
        dimensions=("layer", "neuron", QUANTILE),
        shape=(layers, neurons, quantiles),
        dtype="float32",
        fill="NaN",
        chunk=chunk,
        shard=(1, math.ceil(neurons / chunk[1]) * chunk[1], quantiles),
    )
    return single | {QUANTILE: several}


def sample_arrays(*, layers: int, neurons: int, tokens: int, activation_dtype: str) -> dict[str, ArraySpec]:
    """The `tokens` drawn at random for quantiles, the same for all neurons, by falling lottery number.

    `lottery` is what each was drawn by (`corpora.hashing.token_lottery`), so that samples of slices can be
    merged into one of all, and `sequence` the row that it stands in. Where fewer tokens count than were to be
    drawn, the rest has lottery and activation NaN and sequence -1.
    """

    def drawn(dtype: str, fill: int | str) -> ArraySpec:
        return dataclasses.replace(vector("draw", tokens, dtype), fill=fill)

    chunk = (1, min(neurons, _NEURONS_PER_CHUNK), tokens)
    chunk_bytes = chunk[1] * tokens * _bytes_of(activation_dtype)
    chunks = max(1, min(math.ceil(neurons / chunk[1]), _SHARD_BYTES // chunk_bytes))
    return {
        "lottery": drawn("float32", "NaN"),
        "sequence": drawn("int32", -1),
        "activation": ArraySpec(
            dimensions=("layer", "neuron", "draw"),
            shape=(layers, neurons, tokens),
            dtype=activation_dtype,
            fill="NaN",
            chunk=chunk,
            shard=(1, chunks * chunk[1], tokens),
        ),
    }


def _bytes_of(activation_dtype: str) -> int:
    return 2 if activation_dtype == "float16" else 4
