"""Writing a store. What is written last is the root's `complete`, so a torn store is never taken for one."""

import dataclasses
import functools
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Int

from jaxplain.errors import JaxplainError
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

    def __len__(self) -> int:
        return len(self.corpus_N)

    def __getitem__(self, rows: slice | Int[np.ndarray, "M"]) -> "SequenceBlock":
        return SequenceBlock(**{name: getattr(self, name)[rows] for name in _FIELDS})


class StoreWriter:
    """A store in the making. `finish` makes it readable, in place of any store of that name.

    On a local disk it grows under a name of its own, so that a run that fails costs no store that
    was there before. Elsewhere, where files cannot be renamed together, it replaces it at once.

    A store that was begun is gone on with where `begun` names it, and otherwise begun anew under a new name.
    Of the processes of a run the one that `leads` makes what there is one of.
    """

    def __init__(
        self,
        path: str | Path,
        attributes: dict[str, Any],
        *,
        begun: str | None = None,
        leads: bool = True,
    ):
        self._final, self._leads = Files(path), leads
        self._files = _growing(path)
        self._attributes = {"format": schema.FORMAT, "version": schema.VERSION} | attributes
        if not leads:
            begun_there = begun_at(path)
            if begun_there is None:
                raise JaxplainError(
                    f"output {path} is not seen by all processes of the run; name a folder that they share."
                )
            self.begun = begun_there
            return
        self.begun = secrets.token_hex(8) if begun is None else begun
        if begun is None:
            self._files.delete_all()
        self._files.delete_locks()
        self._write_root(complete=False)

    def write_vocabulary(self, tokens: Sequence[bytes]) -> None:
        """The bytes of every token id, so that readers need no tokenizer."""
        if not self._leads:
            return
        text = np.frombuffer(b"".join(tokens), np.uint8)
        end = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        specs = schema.vocabulary_arrays(tokens=len(tokens), characters=len(text))
        self._write_group("vocabulary")
        for name, values in (("text", text), ("end", end)):
            self._files.write((self._files.create_array(f"vocabulary/{name}", specs[name]), values))

    def write_sequences(self, split: str, blocks: Iterable[SequenceBlock], *, tokens: int) -> int:
        """Write a split's token table block by block; the number of its rows."""
        self._files.delete_all(split)
        self._write_group(split)
        self._write_group(f"{split}/sequences")
        specs = schema.sequence_arrays(sequences=0, tokens=tokens)
        arrays = {
            name: self._files.create_array(f"{split}/sequences/{name}", spec) for name, spec in specs.items()
        }
        rows = 0
        for block in blocks:
            stop = rows + len(block)
            for name, array in arrays.items():
                values = getattr(block, "token_NT" if name == "token" else f"{name}_N")
                arrays[name] = self._files.resize_array(array, stop)
                self._files.write((arrays[name][rows:stop], values))
            rows = stop
        self._write_group(f"{split}/sequences", complete=rows > 0)
        return rows

    def has_sequences(self, split: str) -> bool:
        """Whether a split's token table is complete."""
        return self._is_complete(f"{split}/sequences")

    def has_split(self, split: str) -> bool:
        """Whether `finish_split` was called of a split."""
        return self._is_complete(split)

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
        experts: Int[np.ndarray, "E"] | None = None,
        shared: Bool[np.ndarray, "L E"] | None = None,
        sampled_tokens: int = 0,
        strata: Sequence[float] = (),
        samples_per_quantile: int = 0,
        chosen: Int[np.ndarray, "C _"] | None = None,
        chosen_tokens: int = 0,
    ) -> "SplitWriter":
        """Make the split's empty arrays for exemplars and statistics, before any process writes to them.

        `experts` and `shared` are of a mixture of experts, see `schema`. `sampled_tokens` are drawn for
        quantiles. `strata` are the levels that part the strata of kind quantile. `chosen` are the neurons, by
        layer (and expert) and index, that get a table of `chosen_tokens` vocabulary tokens.
        """
        axes: dict[str, np.ndarray] = {
            "layer": np.asarray(layers, np.int32),
            "neuron": np.asarray(neurons, np.int32),
        }
        if len(quantiles):
            axes[schema.QUANTILE] = np.asarray(quantiles, np.float64)
        sizes = {"layers": len(layers), "neurons": len(neurons)}
        if experts is not None:
            sizes["experts"] = len(experts)
            axes["expert"] = np.asarray(experts, np.int32)
        groups = {"stats": schema.statistics_arrays(**sizes, quantiles=len(quantiles))}
        for kind in kinds:
            parts = len(strata) + 1 if kind == "quantile" else 0
            groups[schema.group_of(kind)] = schema.kind_arrays(
                **sizes,
                k=parts * samples_per_quantile or k,
                tokens=tokens,
                activation_dtype=activation_dtype,
                strata=parts,
            )
        if sampled_tokens:
            groups[schema.SAMPLE] = schema.sample_arrays(
                **sizes, tokens=sampled_tokens, activation_dtype=activation_dtype
            )
        if chosen is not None:
            groups[schema.TOKEN_TABLE] = schema.token_table_arrays(
                neurons=len(chosen), tokens=chosen_tokens, has_experts=experts is not None
            )
        names = [f"{group}/{name}" for group, specs in groups.items() for name in specs]
        out = SplitWriter(self._files, split, names)
        if not self._leads:
            return out
        coordinates = {name: (schema.vector(name, len(x), str(x.dtype)), x) for name, x in axes.items()}
        if shared is not None:
            spec = schema.shared_array(layers=shared.shape[0], experts=shared.shape[1])
            coordinates["shared"] = (spec, shared.astype(np.uint8))
        for name, (spec, values) in coordinates.items():
            self._files.write((self._files.create_array(f"{split}/{name}", spec), values))
        for group, specs in groups.items():
            self._files.delete_all(f"{split}/{group}")
            for part in dict.fromkeys(["", *(name.rpartition("/")[0] for name in specs)]):
                self._write_group(f"{split}/{group}/{part}".rstrip("/"))
            for name, spec in specs.items():
                self._files.create_array(f"{split}/{group}/{name}", spec)
        if "quantile" in kinds:
            out._write_vector(f"{schema.group_of('quantile')}/level", np.array([0.0, *strata, 1.0]))
        if chosen is not None:
            for axis, values in zip(schema.name_axes(has_experts=experts is not None), chosen.T, strict=True):
                out._write_vector(f"{schema.TOKEN_TABLE}/chosen_{axis}", values)
        return out

    def finish_split(self, split: str) -> None:
        """Mark a split as one that is not to be extracted again."""
        if self._leads:
            self._write_group(split, complete=True)

    def finish(self, **attributes: Any) -> None:
        """Mark the store complete, with attributes that are known at the end only, and give it its name."""
        if not self._leads:
            return
        self._attributes |= attributes
        self._write_root(complete=True)
        if self._final.is_local:
            self._files.rename_to(self._final)

    def _write_root(self, *, complete: bool) -> None:
        state = {"complete": True} if complete else {"complete": False, "begun": self.begun}
        self._files.write_json("zarr.json", schema.group_metadata(self._attributes | state))

    def _write_group(self, name: str, **attributes: Any) -> None:
        self._files.write_json(f"{name}/zarr.json", schema.group_metadata(attributes))

    def _is_complete(self, group: str) -> bool:
        metadata = self._files.read_json(f"{group}/zarr.json") or {}
        return bool(metadata.get("attributes", {}).get("complete"))


def unfinished_store(path: str | Path) -> dict[str, Any] | None:
    """The attributes of a store in the making of which at least one token table is complete; else None."""
    files = _growing(path)
    attributes = (files.read_json("zarr.json") or {}).get("attributes", {})
    # One that is complete, on a local disk, has only its name to get.
    begun = "begun" in attributes or (files.is_local and attributes.get("complete"))
    # Nor does an extraction go on with what a merge began.
    if attributes.get("format") != schema.FORMAT or not begun or "merged" in attributes:
        return None
    splits = attributes["config"]["exemplars"]["splits"]
    tables = (files.read_json(f"{split}/sequences/zarr.json") or {} for split in splits)
    return attributes if any(t.get("attributes", {}).get("complete") for t in tables) else None


def finished_run(path: str | Path) -> dict[str, Any] | None:
    """The attributes of a complete store that an extraction made; None where there is none."""
    attributes = (Files(path).read_json("zarr.json") or {}).get("attributes", {})
    made_otherwise = {"merged", "imported"} & attributes.keys()
    is_store = attributes.get("format") == schema.FORMAT and attributes.get("complete")
    return attributes if is_store and not made_otherwise else None


def holds_nothing(path: str | Path) -> bool:
    """Whether a path has no store, nor a token table of one: at most a beginning that is made again soon."""
    final = Files(path)
    if final.is_empty():
        return True
    attributes = (final.read_json("zarr.json") or {}).get("attributes", {})
    in_the_making = "begun" in attributes and "merged" not in attributes and not final.is_local
    return in_the_making and unfinished_store(path) is None


def begun_at(path: str | Path) -> str | None:
    """The name of the store in the making at a path, if one is seen there."""
    attributes = (_growing(path).read_json("zarr.json") or {}).get("attributes", {})
    return str(attributes["begun"]) if "begun" in attributes else None


def _growing(path: str | Path) -> Files:
    """Where a store grows until it is complete."""
    final = Files(path)
    return Files(partial_name(path)) if final.is_local else final


class SplitWriter:
    """The exemplars and statistics of one split, written layer by layer, each layer by one process."""

    def __init__(self, files: Files, split: str, names: Sequence[str]):
        self._files, self._split, self._names = files, split, names

    @functools.cached_property
    def _arrays(self) -> dict[str, ts.TensorStore]:
        # Opened when it writes: the process that makes them may be another one.
        return {name: self._files.open_array(f"{self._split}/{name}", write=True) for name in self._names}

    def write_exemplars(
        self,
        kind: str,
        layer: int,
        columns: Int[np.ndarray, "N"],
        *,
        score_NR: Float[np.ndarray, "N R"],
        sequence_NR: Int[np.ndarray, "N R"],
        activation_NRT: Float[np.ndarray, "N R T"],
        stratum_NR: Int[np.ndarray, "N R"] | None = None,
    ) -> None:
        """Write one layer's exemplars of one kind; `layer` and `columns` are places on the axes.

        Of a mixture of experts, `columns` are places on the axes of experts and neurons, flattened.
        """
        values = {"score": score_NR, "sequence": sequence_NR, "activation": activation_NRT}
        if stratum_NR is not None:
            values["stratum"] = stratum_NR
        group = schema.group_of(kind)
        self._write_neurons({f"{group}/{name}": array for name, array in values.items()}, layer, columns)

    def _write_vector(self, name: str, values: np.ndarray) -> None:
        array = self._arrays[name]
        self._files.write((array, values.astype(array.dtype.numpy_dtype)))

    def write_token_table(
        self,
        sign: str,
        first: int,
        *,
        token_NR: Int[np.ndarray, "N R"],
        mean_NR: Float[np.ndarray, "N R"],
        count_NR: Int[np.ndarray, "N R"],
    ) -> None:
        """Write the tables of one sign for the chosen neurons from `first` on."""
        rows = slice(first, first + len(token_NR))
        values = {"token": token_NR, "mean": mean_NR, "count": count_NR}
        self._files.write(
            *((self._arrays[f"{schema.TOKEN_TABLE}/{sign}/{n}"][rows], v) for n, v in values.items())
        )

    def write_statistics(self, layer: int, columns: Int[np.ndarray, "N"], **values_N: np.ndarray) -> None:
        """Write one layer's statistics, by the names in `schema.STATISTICS` and `schema.QUANTILE`."""
        arrays = {f"stats/{name}": values for name, values in values_N.items()}
        self._write_neurons(
            {name: values for name, values in arrays.items() if name in self._arrays}, layer, columns
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
        """Write one layer's activations at the drawn tokens, all or fewer."""
        name = f"{schema.SAMPLE}/activation"
        missing = ((0, 0), (0, self._arrays[name].shape[-1] - activation_NM.shape[1]))
        padded_NM = np.pad(activation_NM, missing, constant_values=np.nan)
        self._write_neurons({name: padded_NM}, layer, columns)

    def _write_neurons(
        self, values: Mapping[str, np.ndarray], layer: int, columns: Int[np.ndarray, "N"]
    ) -> None:
        """Write values [N, ...] of some neurons of a layer to arrays, by their names."""
        numbers = np.unravel_index(columns, self._arrays["stats/count"].shape[1:])
        spans = tuple(slice(int(number.min()), int(number.max()) + 1) for number in numbers)
        fills_them = len(columns) == math.prod(span.stop - span.start for span in spans)
        # Neighbours as a block are written many times as fast as single places.
        place = spans if fills_them and (np.diff(columns) > 0).all() else numbers
        targets = [(self._arrays[name][(layer, *place)], array) for name, array in values.items()]
        self._files.write(
            *(
                (target, array.reshape(target.shape).astype(target.dtype.numpy_dtype, copy=False))
                for target, array in targets
            )
        )


def blocks_of(blocks: Iterable[SequenceBlock], size: int) -> Iterator[SequenceBlock]:
    """The rows of blocks of any size in blocks of exactly `size`, but for the last."""
    held: list[SequenceBlock] = []
    rows = 0
    for block in blocks:
        held.append(block)
        rows += len(block)
        if rows >= size:
            joined = joined_blocks(held)
            whole = rows - rows % size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, rows = [joined[whole:]], rows - whole
    if rows:
        yield joined_blocks(held)


def joined_blocks(blocks: Sequence[SequenceBlock]) -> SequenceBlock:
    """One block with the rows of all."""
    return SequenceBlock(
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in _FIELDS}
    )


_FIELDS = tuple(field.name for field in dataclasses.fields(SequenceBlock))
