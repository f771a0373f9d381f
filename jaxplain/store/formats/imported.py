"""What is common to all stores that are made of other tools' data."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.store import schema
from jaxplain.store.files import Files
from jaxplain.store.writer import SplitWriter

_NEVER_KNOWN = (
    "sequences that are no exemplars, so that means by token are of exemplars alone",
    "documents: each sequence stands as one of its own",
)

NOT_STATED = 0
"""The count of tokens where a source does not tell it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of an import: neurons, distinct sequences, and what the source did not tell."""

    path: str
    neurons: int
    sequences: int
    not_known: tuple[str, ...]


def new_store(out: str, *, overwrite: bool) -> str:
    """Where the store in the folder `out` will be; the folder is made.

    Raises JaxplainError where it is not on a local disk, or there is a store that is not to be replaced.
    """
    if "://" in out:
        raise JaxplainError(f"OUT is {out}; name a folder on a local disk, and copy the store from there.")
    target = f"{out.rstrip('/')}/{schema.STORE_NAME}"
    if not overwrite and not Files(target).is_empty():
        raise JaxplainError(
            f"{target} exists already; choose another folder, or replace it with --overwrite."
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    return target


def imported_attributes(
    *,
    subject: str,
    corpora: Sequence[str],
    splits: Sequence[str],
    exemplars: Mapping[str, Any],
    tokens: int,
    sequences: str,
    form: str,
    sources: Sequence[Path],
    not_known: Sequence[str],
    tokenizer_hash: str | None = None,
) -> dict[str, Any]:
    """The root's attributes of a store that was imported; `imported` says from what, and what is missing.

    `exemplars` are the kinds, k and activation_dtype, and the strata of kind quantile; `sequences` is a hash
    of vocabulary and token table, by which two imports are told apart.
    """
    return {
        "config": {
            "subject": {"id": subject},
            "corpus": {"sources": [], "sequence_length": tokens, "sequences": sequences},
            "exemplars": {"splits": list(splits), **exemplars},
            "statistics": {"quantiles": []},
        },
        "subject": {"id": subject},
        "tokenizer_hash": tokenizer_hash,
        "corpora": list(corpora),
        "jaxplain_version": jaxplain.__version__,
        "imported": {
            "format": form,
            "sources": [str(source) for source in sources],
            "not_known": [*not_known, *_NEVER_KNOWN],
        },
    }


def write_ranked(
    writer: SplitWriter,
    kind: str,
    place: int,
    columns: Int[np.ndarray, "N"],
    *,
    score_NR: Float[np.ndarray, "N R"],
    sequence_NR: Int[np.ndarray, "N R"],
    activation_NRT: Float[np.ndarray, "N R T"],
    ranks: int,
    dtype: str,
    stratum_NR: Int[np.ndarray, "N R"] | None = None,
) -> None:
    """Write exemplars of a kind, strongest first, each sequence once, as many as there are ranks.

    Entries alike in score keep their order, and so do random ones, whose score, the number that they were
    drawn by, is NaN. Entries whose sequence is -1 are none.
    """
    by = {"max": -score_NR, "min": score_NR, "quantile": -score_NR}.get(kind, np.zeros_like(score_NR))
    none_NR = (sequence_NR < 0) | _again(sequence_NR)
    order_NR = np.lexsort((by, none_NR), axis=-1)[:, :ranks]
    none_NR = np.take_along_axis(none_NR, order_NR, 1)

    def ranked(values: np.ndarray, empty: int | float) -> np.ndarray:
        index = order_NR.reshape((*order_NR.shape, *(1,) * (values.ndim - 2)))
        taken = np.take_along_axis(values, index, 1)
        taken[none_NR] = empty
        missing = ranks - taken.shape[1]
        return np.pad(taken, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)], constant_values=empty)

    # What is beyond float16 is stored as its largest.
    largest = np.finfo(dtype).max
    activation = ranked(np.clip(activation_NRT, -largest, largest), np.nan).astype(dtype)
    writer.write_exemplars(
        kind,
        place,
        columns,
        score_NR=ranked(score_NR.astype(np.float32), np.nan),
        sequence_NR=ranked(sequence_NR.astype(np.int32), -1),
        activation_NRT=activation,
        stratum_NR=None if stratum_NR is None else ranked(stratum_NR.astype(np.int32), -1),
    )


def statistics_of(neurons: int, **known_N: np.ndarray) -> dict[str, np.ndarray]:
    """All statistics of some neurons; those that are not given are not known."""
    unknown = {name: np.full(neurons, np.nan) for name in schema.STATISTICS}
    return unknown | {"count": np.full(neurons, NOT_STATED, np.int64)} | known_N


def _again(sequence_NR: np.ndarray) -> np.ndarray:
    """Which entries name a sequence that an earlier entry of the neuron names."""
    order_NR = np.argsort(sequence_NR, axis=1, kind="stable")
    sorted_NR = np.take_along_axis(sequence_NR, order_NR, 1)
    again_NR = np.zeros(sequence_NR.shape, bool)
    again_NR[:, 1:] = sorted_NR[:, 1:] == sorted_NR[:, :-1]
    out_NR = np.zeros_like(again_NR)
    np.put_along_axis(out_NR, order_NR, again_NR, 1)
    return out_NR
