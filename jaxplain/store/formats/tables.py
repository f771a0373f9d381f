"""Long tables in Parquet, for pandas, polars, DuckDB and their like.

    exemplars/<split>-<layer>.parquet     a row for every exemplar, with its tokens, texts and activations
    statistics/<split>-<layer>.parquet    a row for every neuron
    quantiles/<split>-<layer>.parquet     a row for every neuron and level, in stores with quantiles
    explanations.parquet, scores.parquet  where there are explanations

Every row says its split, layer, expert (null where the subject has none) and neuron, so that a folder's files
are one table. Activations are null at tokens that do not count.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxplain.progress import Progress
from jaxplain.store import schema
from jaxplain.store.explanations import open_explanations
from jaxplain.store.formats.explanations import write_parquet_tables
from jaxplain.store.formats.neurons import NeuronBlock, layers_of, neuron_blocks, neuron_count
from jaxplain.store.formats.output import new_folder
from jaxplain.store.reader import Store

FORMAT = "parquet"

_NEURON = {"split": pa.string(), "layer": pa.int32(), "expert": pa.int32(), "neuron": pa.int32()}
_SCHEMAS = {
    "exemplars": pa.schema(
        _NEURON
        | {
            "kind": pa.string(),
            "rank": pa.int32(),
            "score": pa.float32(),
            "stratum_from": pa.float64(),
            "stratum_to": pa.float64(),
            "sequence": pa.int32(),
            "corpus": pa.string(),
            "document": pa.int64(),
            "start": pa.int32(),
            "tokens": pa.list_(pa.int32()),
            "token_strings": pa.list_(pa.string()),
            "activations": pa.list_(pa.float32()),
        }
    ),
    "statistics": pa.schema(
        _NEURON | {name: pa.int64() if name == "count" else pa.float32() for name in schema.STATISTICS}
    ),
    "quantiles": pa.schema(_NEURON | {"level": pa.float64(), "value": pa.float32()}),
}


def export_tables(
    store: Store,
    out: Path,
    progress: Progress,
    *,
    splits: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the tables of some splits, all by default, and say how many rows each table has.

    Raises JaxplainError where `out` cannot be written or is there already.
    """
    chosen = [store[name] for name in (splits or store.splits)]
    rows = dict.fromkeys(_SCHEMAS, 0)
    database = store.explanations_path
    if database is not None and database.exists():
        with open_explanations(database, fingerprint=store.fingerprint):
            pass  # one of another store had better be known at once
    with (
        new_folder(out, sources=[store.zarr_path], overwrite=overwrite) as folder,
        progress(total=sum(neuron_count(s, layers) for s in chosen), desc=FORMAT, unit="neurons") as bar,
    ):
        for split in chosen:
            for layer in layers_of(split, layers):
                with contextlib.ExitStack() as stack:
                    writers = _writers(
                        folder, f"{split.name}-{layer:03d}", stack, bool(split.quantile_levels)
                    )
                    for block in neuron_blocks(split, kinds=split.kinds, layers=[layer], limit=limit):
                        for name, writer in writers.items():
                            table = pa.table(_COLUMNS[name](block), _SCHEMAS[name])
                            writer.write_table(table)
                            rows[name] += len(table)
                        bar.update(len(block.names))
        if database is not None and database.exists():
            rows |= write_parquet_tables(database, folder, fingerprint=store.fingerprint)
    return {name: count for name, count in rows.items() if count}


def _writers(
    folder: Path, name: str, stack: contextlib.ExitStack, has_quantiles: bool
) -> dict[str, pq.ParquetWriter]:
    writers = {}
    for table, columns in _SCHEMAS.items():
        if table == "quantiles" and not has_quantiles:
            continue
        (folder / table).mkdir(exist_ok=True)
        writer = pq.ParquetWriter(folder / table / f"{name}.parquet", columns, compression="zstd")
        writers[table] = stack.enter_context(writer)
    return writers


def _named(block: NeuronBlock, number_M: np.ndarray) -> dict[str, Any]:
    """The columns that say which neuron it is."""
    layer_N, index_N = (np.array([part(n) for n in block.names], np.int32) for part in (_layer, _index))
    expert = block.names[0].expert
    rows = len(number_M)
    return {
        "split": pa.array([block.split.name] * rows, pa.string()),
        "layer": layer_N[number_M],
        "expert": pa.array([expert] * rows, pa.int32()),
        "neuron": index_N[number_M],
    }


def _layer(name: Any) -> int:
    return name.layer


def _index(name: Any) -> int:
    return name.index


def _statistics(block: NeuronBlock) -> Mapping[str, Any]:
    values = {name: block.statistics[name] for name in schema.STATISTICS}
    return _named(block, np.arange(len(block.names))) | values


def _quantiles(block: NeuronBlock) -> Mapping[str, Any]:
    levels_Q = np.array(block.split.quantile_levels)
    number_M = np.repeat(np.arange(len(block.names)), len(levels_Q))
    return _named(block, number_M) | {
        "level": np.tile(levels_Q, len(block.names)),
        "value": block.statistics[schema.QUANTILE].reshape(-1),
    }


def _exemplars(block: NeuronBlock) -> Mapping[str, Any]:
    found = [
        (number, kind, exemplar)
        for number in range(len(block.names))
        for kind in block.kinds
        for exemplar in block.exemplars(number, kind)
    ]
    number_M = np.array([number for number, _, _ in found], np.int64)
    exemplars = [exemplar for _, _, exemplar in found]
    lengths = np.cumsum([0, *(len(exemplar.tokens) for exemplar in exemplars)]).astype(np.int32)

    def lists(values: list[np.ndarray], dtype: type[np.generic]) -> pa.ListArray:
        joined = np.concatenate([*values, np.zeros(0, dtype)]).astype(dtype)
        return pa.ListArray.from_arrays(lengths, pa.array(joined, from_pandas=True))  # NaN is null

    return _named(block, number_M) | {
        "kind": [kind for _, kind, _ in found],
        "rank": [exemplar.rank for exemplar in exemplars],
        "score": [exemplar.score for exemplar in exemplars],
        "stratum_from": [exemplar.stratum and exemplar.stratum[0] for exemplar in exemplars],
        "stratum_to": [exemplar.stratum and exemplar.stratum[1] for exemplar in exemplars],
        "sequence": [exemplar.sequence for exemplar in exemplars],
        "corpus": [exemplar.corpus for exemplar in exemplars],
        "document": [exemplar.document for exemplar in exemplars],
        "start": [exemplar.start for exemplar in exemplars],
        "tokens": lists([exemplar.tokens for exemplar in exemplars], np.int32),
        "token_strings": pa.array([block.strings(e) for e in exemplars], pa.list_(pa.string())),
        "activations": lists([exemplar.activations for exemplar in exemplars], np.float32),
    }


_COLUMNS = {"exemplars": _exemplars, "statistics": _statistics, "quantiles": _quantiles}
