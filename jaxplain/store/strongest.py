"""The strongest entries of several ranked lists, and the arrays that belong to them.

A running top-k over stores instead of over batches: the ranks of all stores are compared first, and then of
each store's activations only the winners are kept.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

NONE = -1
"""The sequence of a rank that holds nothing; its score is NaN."""


class Strongest(NamedTuple):
    """For each of N neurons the R strongest entries of all lists, strongest first.

    `source_NR` is list * R + rank, where an entry comes from.
    """

    score_NR: Float[np.ndarray, "N R"]
    sequence_NR: Int[np.ndarray, "N R"]
    source_NR: Int[np.ndarray, "N R"]


def strongest(
    lists: Iterable[tuple[Float[np.ndarray, "N R"], Int[np.ndarray, "N R"]]], *, lowest: bool = False
) -> Strongest:
    """The R strongest of all lists' scores and sequences; the weakest where `lowest`.

    Among equal scores, a list's entries must be in the order of their sequences, and these be higher than
    those of the lists before; then the lower sequence wins a tie. An entry whose sequence is NONE never
    enters, wherever in its list it stands.
    """
    sign = -1 if lowest else 1
    held: Strongest | None = None
    for number, (score_NR, sequence_NR) in enumerate(lists):
        neurons, ranks = score_NR.shape
        source_R = np.arange(ranks, dtype=np.int32) + number * ranks
        score_NR = np.where(sequence_NR == NONE, np.float32(np.nan), score_NR)
        added = Strongest(score_NR, sequence_NR, np.broadcast_to(source_R, (neurons, ranks)))
        if held is not None:
            added = Strongest(*(np.concatenate(pair, axis=1) for pair in zip(held, added, strict=True)))
        # NaN comes last. Runs that are sorted already take little more than a comparison for each entry.
        order_NR = np.argsort(-sign * added.score_NR, axis=1, kind="stable")[:, :ranks]
        held = Strongest(*(np.take_along_axis(array, order_NR, axis=1) for array in added))
    if held is None:
        raise ValueError("there are no lists")
    return held


def place_winners(
    out_MX: Shaped[np.ndarray, "M *X"],
    found_MX: Shaped[np.ndarray, "M *X"],
    source_M: Int[np.ndarray, "M"],
    number: int,
    *,
    ranks: int,
) -> None:
    """Copy those of list `number`'s entries that are among the strongest to their places in `out_MX`.

    The first axis is of neurons and ranks together, neurons first; `source_M` is `Strongest.source_NR`, or
    -1 where nothing is to be copied.
    """
    won_W = np.flatnonzero(source_M // ranks == number)
    entry_W = won_W - won_W % ranks + source_M[won_W] % ranks
    out_MX[won_W] = found_MX[entry_W]
