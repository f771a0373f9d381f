"""Writing a store. What is written last is the root's `complete`, so a torn store is never taken for one."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int

from jaxplain.store import schema
from jaxplain.store.files import Files, partial_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBlock:
    """Consecutive rows of a token table; see `schema.sequence_arrays`."""

    token_NT: Int[np.ndarray, "N T"]
    corpus_N: Int[np.ndarray, "N"]
    document_N: Int[np.ndarray, "N"]
    start_N: Int[np.ndarray, "N"]
    length_N: Int[np.ndarray, "N"]


class StoreWriter:
    """A store in the making. `finish` makes it readable, in place of any store of that name.

    On a local disk it grows under a name of its own, so that a run that fails costs no store that
    was there before. Elsewhere, where files cannot be renamed together, it replaces it at once.
    """

    def __init__(self, path: str | Path, attributes: dict[str, Any]):
        self._final = Files(path)
        self._files = Files(partial_name(path)) if self._final.is_local else self._final
        self._files.delete_all()
        self._attributes = {"format": schema.FORMAT, "version": schema.VERSION} | attributes
        self._write_root(complete=False)

    def write_vocabulary(self, tokens: Sequence[bytes]) -> None:
        """The bytes of every token id, so that readers need no tokenizer."""
        text = np.frombuffer(b"".join(tokens), np.uint8)
        end = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        specs = schema.vocabulary_arrays(tokens=len(tokens), characters=len(text))
        self._write_group("vocabulary")
        for name, values in (("text", text), ("end", end)):
            self._files.write((self._files.create_array(f"vocabulary/{name}", specs[name]), values))

    def write_sequences(self, split: str, blocks: Iterable[SequenceBlock], *, tokens: int) -> int:
        """Write a split's token table block by block; the number of its rows."""
        self._write_group(split)
        self._write_group(f"{split}/sequences")
        specs = schema.sequence_arrays(sequences=0, tokens=tokens)
        arrays = {
            name: self._files.create_array(f"{split}/sequences/{name}", spec) for name, spec in specs.items()
        }
        rows = 0
        for block in blocks:
            stop = rows + len(block.corpus_N)
            for name, array in arrays.items():
                values = getattr(block, "token_NT" if name == "token" else f"{name}_N")
                arrays[name] = self._files.resize_array(array, stop)
                self._files.write((arrays[name][rows:stop], values))
            rows = stop
        return rows

    def read_sequences(self, split: str) -> dict[str, ts.TensorStore]:
        """The arrays of a split's token table, for reading by row."""
        names = schema.sequence_arrays(sequences=0, tokens=1)
        return {name: self._files.open_array(f"{split}/sequences/{name}") for name in names}

    def create_split(
        self,
        split: str,
        *,
        layers: Int[np.ndarray, "L"],
        neurons: Int[np.ndarray, "F"],
        kinds: Sequence[str],
        k: int,
        tokens: int,
        activation_dtype: str,
        quantiles: Sequence[float] = (),
        sampled_tokens: int = 0,
    ) -> "SplitWriter":
        """Make the split's empty arrays for exemplars, statistics and, if any are sampled, tokens."""
        axes = {"layer": np.asarray(layers, np.int32), "neuron": np.asarray(neurons, np.int32)}
        if len(quantiles):
            axes[schema.QUANTILE] = np.asarray(quantiles, np.float64)
        for name, values in axes.items():
            spec = schema.vector(name, len(values), str(values.dtype))
            self._files.write((self._files.create_array(f"{split}/{name}", spec), values))
        sizes = {"layers": len(layers), "neurons": len(neurons)}
        groups = {"stats": schema.statistics_arrays(**sizes, quantiles=len(quantiles))}
        for kind in kinds:
            groups[kind] = schema.kind_arrays(**sizes, k=k, tokens=tokens, activation_dtype=activation_dtype)
        if sampled_tokens:
            groups[schema.SAMPLE] = schema.sample_arrays(
                **sizes, tokens=sampled_tokens, activation_dtype=activation_dtype
            )
        arrays = {}
        for group, specs in groups.items():
            self._write_group(f"{split}/{group}")
            for name, spec in specs.items():
                arrays[f"{group}/{name}"] = self._files.create_array(f"{split}/{group}/{name}", spec)
        return SplitWriter(self._files, arrays)

    def finish(self) -> None:
        """Mark the store complete, and give it its name."""
        self._write_root(complete=True)
        if self._files is not self._final:
            self._files.rename_to(self._final)

    def _write_root(self, *, complete: bool) -> None:
        metadata = schema.group_metadata(self._attributes | {"complete": complete})
        self._files.write_json("zarr.json", metadata)

    def _write_group(self, name: str) -> None:
        self._files.write_json(f"{name}/zarr.json", schema.group_metadata({}))


class SplitWriter:
    """The exemplars and statistics of one split, written layer by layer."""

    def __init__(self, files: Files, arrays: dict[str, ts.TensorStore]):
        self._files, self._arrays = files, arrays

    def write_exemplars(
        self,
        kind: str,
        layer: int,
        columns: Int[np.ndarray, "N"],
        *,
        score_NR: Float[np.ndarray, "N R"],
        sequence_NR: Int[np.ndarray, "N R"],
        activation_NRT: Float[np.ndarray, "N R T"],
    ) -> None:
        """Write one layer's exemplars of one kind; `layer` and `columns` are places on the axes."""
        values = {"score": score_NR, "sequence": sequence_NR, "activation": activation_NRT}
        place = _span(columns)
        self._files.write(
            *((self._arrays[f"{kind}/{name}"][layer, place], array) for name, array in values.items())
        )

    def write_statistics(self, layer: int, columns: Int[np.ndarray, "N"], **values_N: np.ndarray) -> None:
        """Write one layer's statistics, by the names in `schema.STATISTICS` and `schema.QUANTILE`."""
        arrays = {name: self._arrays[f"stats/{name}"] for name in values_N if f"stats/{name}" in self._arrays}
        self._files.write(
            *(
                (array[layer, columns], values_N[name].astype(array.dtype.numpy_dtype))
                for name, array in arrays.items()
            )
        )

    def write_draws(self, *, lottery_M: Float[np.ndarray, "M"], sequence_M: Int[np.ndarray, "M"]) -> None:
        """Write which tokens were drawn for quantiles, all or fewer; see `schema.sample_arrays`."""
        values = {"lottery": lottery_M, "sequence": sequence_M}
        self._files.write(
            *((self._arrays[f"{schema.SAMPLE}/{n}"][: len(array)], array) for n, array in values.items())
        )

    def write_sample(
        self, layer: int, columns: Int[np.ndarray, "N"], activation_NM: Float[np.ndarray, "N M"]
    ) -> None:
        """Write one layer's activations at the drawn tokens."""
        drawn = slice(activation_NM.shape[1])
        array = self._arrays[f"{schema.SAMPLE}/activation"][layer, _span(columns), drawn]
        self._files.write((array, activation_NM))


def blocks_of(rows: Iterable[SequenceBlock], size: int) -> Iterator[SequenceBlock]:
    """Join single rows into blocks of up to `size`."""
    held: list[SequenceBlock] = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield _join(held)
            held = []
    if held:
        yield _join(held)


def _span(columns: Int[np.ndarray, "N"]) -> np.ndarray | slice:
    """Neighbouring columns as a slice, which is written many times as fast as single places."""
    if len(columns) and np.array_equal(columns, np.arange(columns[0], columns[0] + len(columns))):
        return slice(int(columns[0]), int(columns[0]) + len(columns))
    return columns


def _join(blocks: Sequence[SequenceBlock]) -> SequenceBlock:
    fields = [field.name for field in dataclasses.fields(SequenceBlock)]
    return SequenceBlock(
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in fields}
    )
