"""What is drawn at random from a split, known from its token table before the first step.

The table is complete before extraction begins, so a draw needs no reservoir that changes while the run goes
on: a step copies what is drawn, once, to the place that it keeps. What is drawn are the highest numbers of
`corpora.hashing`, which depend on the seed and on where a window comes from alone. So the draw is the same on
any mesh and in any batches, and the draws of two slices of a corpus, cut to their highest numbers, are that
of both.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxplain.corpora.hashing import lottery, token_lottery

NEVER = np.iinfo(np.int32).max
"""The turn of a sequence that is not drawn."""


class TableBlock(NamedTuple):
    """Consecutive rows of a token table: where each comes from, and which of its tokens count."""

    document_N: Int[np.ndarray, "N"]
    start_N: Int[np.ndarray, "N"]
    counted_NT: Bool[np.ndarray, "N T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn from a split.

    Attributes:
        rows: How many sequences of the split have a token that counts; no others are drawn.
        tokens: Tokens per sequence, padding included.
        sequence_D: Sequences that are drawn, ascending, int64.
        turn_D: The place of each in the draw, 0 for the first, so that the lowest turns are a smaller draw.
        token_M: Tokens that are drawn, ascending, int64: sequence * tokens + position.
        lottery_M: The number that each was drawn by.
    """

    rows: int
    tokens: int
    sequence_D: Int[np.ndarray, "D"]
    turn_D: Int[np.ndarray, "D"]
    token_M: Int[np.ndarray, "M"]
    lottery_M: Float[np.ndarray, "M"]

    def turns(self, sequence: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The turns of sequences, int32; NEVER for those that are not drawn."""
        if not len(self.sequence_D):
            return np.full(sequence.shape, NEVER, np.int32)
        place = np.minimum(np.searchsorted(self.sequence_D, sequence), len(self.sequence_D) - 1)
        return np.where(self.sequence_D[place] == sequence, self.turn_D[place], NEVER).astype(np.int32)

    @functools.cached_property
    def falling(self) -> Int[np.ndarray, "M"]:
        """The drawn tokens' places in `token_M` by falling number, equal ones by token."""
        return np.lexsort((self.token_M, -self.lottery_M))

    def tokens_of(
        self, first: int, *, batch: int, shards: int
    ) -> tuple[Int[np.ndarray, "P W"], Int[np.ndarray, "P W"]]:
        """The drawn tokens among the sequences from `first` on, for each shard of a batch of them.

        The first array has their places among the shard's tokens, -1 after the last; the second their slots,
        which are their places in `token_M`.
        """
        width = batch // shards * self.tokens
        low, high = np.searchsorted(self.token_M, [first * self.tokens, (first + batch) * self.tokens])
        shard_N, place_N = np.divmod(self.token_M[low:high] - first * self.tokens, width)
        rank_N = np.arange(high - low) - np.searchsorted(shard_N, shard_N)
        found = np.full((2, shards, width), -1, np.int32)
        found[:, shard_N, rank_N] = place_N, np.arange(low, high)
        return found[0], found[1]


def draw(blocks: Iterable[TableBlock], *, seed: int, sequences: int, tokens: int) -> Draws:
    """Draw up to that many sequences, and up to that many tokens, from consecutive blocks of a table."""
    drawn_sequences = drawn_tokens = (np.zeros(0, np.float32), np.zeros(0, np.int64))
    rows = first = length = 0
    for block in blocks:
        count, length = block.counted_NT.shape
        row_N = np.arange(first, first + count)
        counts_N = block.counted_NT.any(axis=1)
        rows += int(counts_N.sum())
        drawn_sequences = _highest(
            sequences,
            drawn_sequences,
            lottery(seed, block.document_N, block.start_N)[counts_N],
            row_N[counts_N],
        )
        drawn_tokens = _highest(
            tokens,
            drawn_tokens,
            token_lottery(seed, block.document_N, block.start_N, length)[block.counted_NT],
            (row_N[:, None] * length + np.arange(length))[block.counted_NT],
        )
        first += count
    order, token_order = np.argsort(drawn_sequences[1]), np.argsort(drawn_tokens[1])
    return Draws(
        rows=rows,
        tokens=length,
        sequence_D=drawn_sequences[1][order],
        turn_D=order.astype(np.int32),
        token_M=drawn_tokens[1][token_order],
        lottery_M=drawn_tokens[0][token_order],
    )


def _highest(
    count: int, held: tuple[np.ndarray, np.ndarray], number_N: np.ndarray, place_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The highest numbers and their places, highest first, equal ones by place; new places are higher."""
    if count == 0:
        return held
    if len(held[0]) == count:
        better_N = number_N > held[0][-1]
        number_N, place_N = number_N[better_N], place_N[better_N]
    number_N, place_N = np.concatenate([held[0], number_N]), np.concatenate([held[1], place_N])
    order = np.lexsort((place_N, -number_N))[:count]
    return number_N[order], place_N[order]
