"""Merging stores of slices of a corpus into the one that a run over all slices would have made.

A sequence that is among the K strongest of all slices is among the K strongest of its own, so the slices'
exemplars decide those of the whole. Sequences are numbered anew, slice after slice; a window that an earlier
slice has too is left out. Memory holds a few blocks of neurons at a time, each as many as one file of
activations has.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store import schema
from jaxplain.store.agreement import merged_attributes, merged_corpora, require_agreement
from jaxplain.store.blocks import Block, Slice, merge_block, merge_draws
from jaxplain.store.files import Files
from jaxplain.store.reader import Store, open_store
from jaxplain.store.repeats import repeated_rows, spans
from jaxplain.store.writer import SequenceBlock, StoreWriter, unfinished_store

BLOCKS_AT_ONCE = 3
"""While one block is computed, another is read and a third written."""

_CACHE_BYTES = 2**22  # indices of files are read again and again, and values but once
_TOKEN_BYTES_PER_READ = 2**26
_MOST_SEQUENCES = 2**31 - 1

Advance = Callable[[int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedSplit:
    """What became of a split: its sequences, and how many of the slices' were those of an earlier slice."""

    name: str
    sequences: int
    repeated: int


def merge_stores(
    out: str, paths: Sequence[str | Path], progress: Progress, *, overwrite: bool = False
) -> list[MergedSplit]:
    """Merge stores of slices into a store in the folder `out`.

    A store that is to be replaced stays until the new one is complete (on local disks), and a merge that is
    killed leaves an incomplete one, which readers refuse.

    Raises JaxplainError where `out` is empty, or holds a store and `overwrite` is not set; where a store is
    named twice, is where the result goes, cannot be read or is incomplete; and where the stores are not
    slices of one corpus, extracted alike.
    """
    if not out.strip():
        raise JaxplainError(f"OUT is {out!r}; name the folder that gets the merged store.")
    target = f"{out.rstrip('/')}/{schema.STORE_NAME}"
    stores = _open(paths, target)
    if not overwrite and not Files(target).is_empty():
        raise JaxplainError(
            f"{target} exists already; choose another folder, or replace it with --overwrite."
        )
    if not overwrite and unfinished_store(target) is not None:
        raise JaxplainError(
            f"{target} is being made by an extraction that has not finished; run that to its end, or choose "
            "another folder."
        )
    require_agreement(stores)
    files = [Files(store.zarr_path, cache_bytes=_CACHE_BYTES) for store in stores]
    splits = {name: _slices(stores, files, name) for name in stores[0].splits}

    sequences = [{name: store[name].sequence_count for name in splits} for store in stores]
    writer = StoreWriter(target, merged_attributes(stores, output=out, sequences=sequences))
    writer.write_vocabulary(stores[0].vocabulary.tokens())
    merged = []
    for name, slices in splits.items():
        with progress(total=sum(part.bytes for part in slices), desc=f"{name}: merge", unit="B") as bar:
            merged.append(_merge_split(writer, stores, slices, name, bar.update))
    writer.finish()
    return merged


def _open(paths: Sequence[str | Path], target: str) -> list[Store]:
    stores = [open_store(path) for path in paths]
    urls = [Files(store.zarr_path).url for store in stores]
    for number, (path, url) in enumerate(zip(paths, urls, strict=True)):
        if url in urls[:number]:
            raise JaxplainError(f"{path} is named twice; name every store once.")
        if url == Files(target).url:
            raise JaxplainError(f"{path} would be merged into itself; choose another folder for the result.")
    return stores


def _slices(stores: Sequence[Store], files: Sequence[Files], split: str) -> list[Slice]:
    names = [f"sequences/{name}" for name in schema.sequence_arrays(sequences=0, tokens=1)]
    names += [
        f"{kind}/{name}" for kind in stores[0][split].kinds for name in ("score", "sequence", "activation")
    ]
    names += [f"stats/{name}" for name in schema.STATISTICS]
    if stores[0][split].quantile_levels:
        for store, folder in zip(stores, files, strict=True):
            if folder.read_json(f"{split}/{schema.SAMPLE}/zarr.json") is None:
                raise JaxplainError(
                    f"{store.zarr_path} has quantiles, but not the sampled tokens from which those of merged "
                    "stores are made; extract it anew with this version of jaxplain."
                )
        names += [f"{schema.SAMPLE}/{name}" for name in ("lottery", "sequence", "activation")]
    return [
        Slice(files=folder, arrays={name: folder.open_array(f"{split}/{name}") for name in names})
        for folder in files
    ]


def _merge_split(
    writer: StoreWriter, stores: Sequence[Store], slices: Sequence[Slice], name: str, advance: Advance
) -> MergedSplit:
    tables = [part.table for part in slices]
    repeated = repeated_rows(tables, slices[0].files.read)
    counts = [table["document"].shape[0] - len(gone) for table, gone in zip(tables, repeated, strict=True)]
    if sum(counts) > _MOST_SEQUENCES:
        raise JaxplainError(
            f"split {name!r} of all stores has {sum(counts):.1e} sequences, more than the 2.1e9 that a store "
            "can number; merge fewer stores."
        )
    _, corpora = merged_corpora([store.corpora for store in stores])
    rows = writer.write_sequences(
        name, _kept_rows(slices, repeated, corpora, advance), tokens=tables[0]["token"].shape[1]
    )
    firsts = itertools.accumulate(counts[:-1], initial=0)
    renumber = [
        functools.partial(_renumbered, first=first, repeated_D=repeated_D)
        for first, repeated_D in zip(firsts, repeated, strict=True)
    ]
    slices = [dataclasses.replace(part, renumber=new) for part, new in zip(slices, renumber, strict=True)]
    _merge_neurons(writer, stores[0], slices, name, advance)
    writer.finish_split(name)
    return MergedSplit(name=name, sequences=rows, repeated=sum(map(len, repeated)))


def _kept_rows(
    slices: Sequence[Slice],
    repeated: Sequence[Int[np.ndarray, "_"]],
    corpora: Sequence[Int[np.ndarray, "_"]],
    advance: Advance,
) -> Iterator[SequenceBlock]:
    """All token tables, one after the other, without the repeated rows; `corpora` are their new numbers."""
    for part, repeated_D, corpus_C in zip(slices, repeated, corpora, strict=True):
        rows, tokens = part.table["token"].shape
        # A power of two, so that blocks and files end at the same rows where nothing is repeated.
        size = 2 ** max(0, (_TOKEN_BYTES_PER_READ // (4 * tokens)).bit_length() - 1)
        for span in spans(rows, min(size, schema.ROWS_PER_SHARD)):
            arrays = part.files.read(*(array[span] for array in part.table.values()))
            advance(sum(array.nbytes for array in arrays))
            kept_N = ~np.isin(np.arange(span.start, span.stop), repeated_D)
            values = {name: array[kept_N] for name, array in zip(part.table, arrays, strict=True)}
            yield SequenceBlock(
                token_NT=values["token"],
                corpus_N=corpus_C[values["corpus"]],
                document_N=values["document"],
                start_N=values["start"],
                length_N=values["length"],
            )


def _renumbered(
    sequence: Int[np.ndarray, "*S"], *, first: int, repeated_D: Int[np.ndarray, "D"]
) -> Int[np.ndarray, "*S"]:
    """The new numbers of a slice's sequences; -1 for those that an earlier slice has too, and for none."""
    before = np.searchsorted(repeated_D, sequence)
    kept = (sequence >= 0) & (np.searchsorted(repeated_D, sequence, side="right") == before)
    return np.where(kept, first + sequence - before, -1).astype(np.int32)


def _merge_neurons(
    writer: StoreWriter, store: Store, slices: Sequence[Slice], name: str, advance: Advance
) -> None:
    split, exemplars = store[name], store.config["exemplars"]
    sizes = {"k": exemplars["k"], "tokens": slices[0].table["token"].shape[1]}
    sizes |= {"activation_dtype": exemplars["activation_dtype"]}
    axes = (len(split.neurons),) if split.experts is None else (len(split.experts), len(split.neurons))
    draws = merge_draws(slices) if split.quantile_levels else None
    out = writer.create_split(
        name,
        layers=split.layers,
        neurons=split.neurons,
        experts=split.experts,
        shared=split.shared,
        kinds=split.kinds,
        quantiles=split.quantile_levels,
        sampled_tokens=0 if draws is None else len(draws.sequence_M),
        **sizes,
    )
    if draws is not None:
        out.write_draws(lottery_M=draws.lottery_M, sequence_M=draws.sequence_M)
    layers, neurons = len(split.layers), math.prod(axes)
    experts = None if split.experts is None else len(split.experts)
    files = schema.kind_arrays(layers=layers, neurons=axes[-1], experts=experts, **sizes)["activation"]
    parts = [spans(length, size) for length, size in zip(axes, files.shard[1:], strict=False)]
    blocks = [
        Block(layer=layer, spans=place, axes=axes)
        for layer, place in itertools.product(range(layers), itertools.product(*parts))
    ]
    merge = functools.partial(
        merge_block, slices=slices, out=out, kinds=split.kinds, levels=split.quantile_levels, draws=draws
    )
    bytes_per_neuron = sum(part.bytes - part.table_bytes for part in slices) / (layers * neurons)
    with contextlib.closing(_in_threads(merge, blocks)) as merged:
        for layer, group in itertools.groupby(merged, key=lambda found: found[0].layer):
            statistics, columns = [], []
            for block, found in group:
                statistics.append(found)
                columns.append(block.columns)
                advance(round(bytes_per_neuron * len(block.columns)))
            values = {key: np.concatenate([found[key] for found in statistics]) for key in statistics[0]}
            out.write_statistics(layer, np.concatenate(columns), **values)


def _in_threads(
    merge: Callable[[Block], Mapping[str, np.ndarray]], blocks: Sequence[Block]
) -> Generator[tuple[Block, Mapping[str, np.ndarray]], None, None]:
    """Blocks and what was found in them, in order, a few at a time."""
    with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
        try:
            yield from zip(blocks, pool.map(merge, blocks), strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
