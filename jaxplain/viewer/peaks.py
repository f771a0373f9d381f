"""An index of the tokens at which exemplars peak, so that a search for tokens reads no activations.

view_index/                     beside the store, or in a folder that is named
    index.json                  format, version, which store it is of, ranks
    <split>.<kind>.npy          int32 [neuron, rank]: the token at which each of the first ranks of kinds max
                                and min peaks, of all neurons that the store holds; -1 for none

It is made once, by blocks of neurons, and takes 4 bytes for every neuron, rank, kind and split.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.reader import Split, Store

FOLDER = "view_index"
RANKS = 10
KINDS = ("max", "min")
_FORMAT, _VERSION = "jaxplain.view_index", 1
_BLOCK_BYTES = 2**26


def index_folder(store: Store) -> Path | None:
    """Where the index of a store lies; None for a store that is not on a local disk."""
    beside = store.explanations_path
    return None if beside is None else beside.parent / FOLDER


def build_index(store: Store, folder: Path, progress: Progress) -> None:
    """Make the index of a store, in place of any that is there.

    Raises JaxplainError where it cannot be written, or the folder holds other things. It appears whole or not
    at all.
    """
    folder = folder.absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and _about(folder) is None):
        raise JaxplainError(
            f"{folder} holds other things than an index of tokens; name a folder of its own with "
            "--index-folder."
        )
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in store.splits:
            split = store[name]
            for kind in (kind for kind in KINDS if kind in split.kinds):
                _write_kind(split, kind, partial / f"{name}.{kind}.npy", progress)
        about = {"format": _FORMAT, "version": _VERSION, "store": _identity(store), "ranks": RANKS}
        (partial / "index.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise JaxplainError(
            f"the index of tokens could not be written to {folder}: {error.strerror}; name another folder "
            "with --index-folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_kind(split: Split, kind: str, path: Path, progress: Progress) -> None:
    counts = split.whole_array("stats/count")
    held_LF = (counts >= 0).reshape(len(split.layers), -1)
    out = np.lib.format.open_memmap(path, "w+", np.int32, (int(held_LF.sum()), RANKS))
    out[:] = -1
    done = 0
    with progress(total=len(out), desc=f"index {split.name}, {kind}", unit="neurons") as bar:
        for place, held_F in enumerate(held_LF):
            found_FR = np.concatenate(list(_layer(split, kind, place)))[held_F]
            out[done : done + len(found_FR), : found_FR.shape[1]] = found_FR
            done += len(found_FR)
            bar.update(len(found_FR))
    out.flush()


def _layer(split: Split, kind: str, place: int) -> Iterator[Int[np.ndarray, "F R"]]:
    """The peak tokens of a layer, block by block."""
    neurons = len(split.neurons)
    tokens = split.sequence_length
    block = max(1, _BLOCK_BYTES // (2 * tokens * split.rank_count(kind)))
    for expert in range(len(split.experts)) if split.experts is not None else (None,):
        for start in range(0, neurons, block):
            stop = min(start + block, neurons)
            sequence_FR, acts_FRT = split.peak_arrays(place, kind, slice(start, stop), RANKS, expert=expert)
            yield _peak_tokens(split, kind, sequence_FR, acts_FRT)


def _peak_tokens(
    split: Split, kind: str, sequence_FR: Int[np.ndarray, "F R"], acts_FRT: Float[np.ndarray, "F R T"]
) -> Int[np.ndarray, "F R"]:
    found_FR = np.full(sequence_FR.shape, -1, np.int32)
    filled_FR = sequence_FR >= 0
    if not filled_FR.any():
        return found_FR
    acts_MT = acts_FRT[filled_FR].astype(np.float32) * (1 if kind == "max" else -1)
    peak_M = np.where(np.isnan(acts_MT), -np.inf, acts_MT).argmax(axis=1)
    rows, at_M = np.unique(sequence_FR[filled_FR], return_inverse=True)
    found_FR[filled_FR] = split.tokens(rows)[at_M, peak_M]
    return found_FR


def _identity(store: Store) -> str:
    return hashlib.sha256(json.dumps(store.attributes, sort_keys=True).encode()).hexdigest()


class PeakIndex:
    """An index that is there, of which a search reads no more than one array."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def matches(self, split: str, kind: str, wanted_V: Bool[np.ndarray, "V"]) -> Int[np.ndarray, "N"]:
        """How many of the first ranks of every neuron peak at one of some tokens."""
        key = (split, kind)
        if key not in self._arrays:
            self._arrays[key] = np.load(self._folder / f"{split}.{kind}.npy", mmap_mode="r")
        token_NR = self._arrays[key]
        # Padding is -1, and what stands last is never wanted.
        wanted_V = np.append(wanted_V, False)
        return wanted_V[token_NR].sum(axis=1)


def open_index(store: Store, folder: Path | None) -> PeakIndex | None:
    """The index in a folder, if there is one of this very store."""
    if folder is None:
        return None
    about = _about(folder)
    expected = {"format": _FORMAT, "version": _VERSION, "store": _identity(store), "ranks": RANKS}
    return PeakIndex(folder) if about == expected else None


def _about(folder: Path) -> dict[str, Any] | None:
    """What an index says of itself; None where there is none."""
    try:
        about = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and about.get("format") == _FORMAT else None
