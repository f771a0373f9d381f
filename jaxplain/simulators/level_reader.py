"""Reading levels off a decoder's logits, for many prompts with several sequences each.

A prompt is read once for all its sequences, and what all prompts begin with once for all of them.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxplain.errors import JaxplainError
from jaxplain.simulators.reading import NO_TOKEN, read_sequences
from jaxplain.subjects.decoder import Cache, Decoder

# Widths are few, since each pair of them is a program to compile.
_PROMPT_STEP, _SEQUENCE_STEP = 16, 32
_BATCHES_AT_ONCE = 8  # read together, so that prompts of like length share a batch


class Asked(NamedTuple):
    """A prompt, and the sequences that follow it, one or more; `job` is whatever they are for."""

    job: Any
    prompt: list[int]
    sequences: Sequence[Int[np.ndarray, "_"]]


class LevelReader:
    """Reads the probabilities of levels at every token of sequences after prompts.

    `batch_size` is the number of sequences at once, over all devices; `shared` is what every prompt begins
    with, and is not repeated in them.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        level_ids: Int[np.ndarray, "L"],
        *,
        batch_size: int,
        shared: Sequence[int] = (),
    ):
        self._mesh, self._batch_size, self._limit = mesh, batch_size, decoder.arch.max_positions
        self._graph, self._weights = nnx.split(decoder)
        self._level_ids, self._offset = jnp.asarray(level_ids), len(shared)
        self._shared = _read_shared(self._graph, self._weights, jnp.asarray([shared])) if shared else None

    def read(self, asked: Iterator[Asked]) -> Iterator[tuple[Any, list[Float[np.ndarray, "_ L"]]]]:
        """Jobs with the probabilities of the levels at every token of their sequences, float32.

        Raises JaxplainError where a prompt and its sequence are longer than the model reads.
        """
        while chunk := _take(asked, self._batch_size * _BATCHES_AT_ONCE):
            yield from self._read_chunk(chunk)

    def _read_chunk(self, chunk: list[Asked]) -> Iterator[tuple[Any, list[Float[np.ndarray, "_ L"]]]]:
        longest = max(len(one.prompt) + max(map(len, one.sequences)) for one in chunk) + self._offset
        if longest > self._limit:
            raise JaxplainError(
                f"a prompt and its sequence have {longest} tokens, more than the {self._limit} that the "
                "simulator reads; use shorter explanations or sequences."
            )
        data = self._mesh.shape["data"]
        together = min(max(len(one.sequences) for one in chunk), self._batch_size)
        prompts = max(self._batch_size // together // data, 1) * data
        # A prompt with more sequences than fit comes again.
        pieces = [
            Asked((number, start), one.prompt, one.sequences[start : start + together])
            for number, one in enumerate(chunk)
            for start in range(0, len(one.sequences), together)
        ]
        pieces.sort(key=lambda piece: len(piece.prompt))
        found: list[dict[int, list[np.ndarray]]] = [{} for _ in chunk]
        for at in range(0, len(pieces), prompts):
            batch = pieces[at : at + prompts]
            for piece, values in zip(
                batch, self._read_batch(batch, prompts=prompts, together=together), strict=True
            ):
                number, start = piece.job
                found[number][start] = values
        for one, parts in zip(chunk, found, strict=True):
            yield one.job, [values for start in sorted(parts) for values in parts[start]]

    def _read_batch(
        self, rows: Sequence[Asked], *, prompts: int, together: int
    ) -> list[list[Float[np.ndarray, "_ L"]]]:
        filled = [*rows, *[rows[-1]] * (prompts - len(rows))]
        width = _padded(max(len(row.prompt) for row in rows), _PROMPT_STEP)
        length = _padded(max(len(sequence) for row in rows for sequence in row.sequences), _SEQUENCE_STEP)
        prompts_EP = np.full((prompts, width), NO_TOKEN, np.int32)
        tokens_EST = np.full((prompts, together, length), NO_TOKEN, np.int32)
        for e, (_, prompt, sequences) in enumerate(filled):
            prompts_EP[e, : len(prompt)] = prompt
            for s, sequence in enumerate(sequences):
                tokens_EST[e, s, : len(sequence)] = sequence
        placed = (
            jax.device_put(array, NamedSharding(self._mesh, P("data"))) for array in (prompts_EP, tokens_EST)
        )
        probabilities_ESTL = np.asarray(
            _probabilities(self._graph, self._weights, self._shared, *placed, self._level_ids)
        )
        return [
            [probabilities_ESTL[e, s, : len(sequence)] for s, sequence in enumerate(sequences)]
            for e, (_, _, sequences) in enumerate(rows)
        ]


def _take(asked: Iterator[Asked], sequences: int) -> list[Asked]:
    """The next ones, with about that many sequences in all."""
    taken: list[Asked] = []
    for one in asked:
        taken.append(one)
        sequences -= len(one.sequences)
        if sequences <= 0:
            break
    return taken


def _padded(tokens: int, step: int) -> int:
    """The next multiple of a step that grows with the width, to at most four widths in an octave."""
    step = max(step, 2 ** ((tokens - 1).bit_length() - 3))
    return math.ceil(tokens / step) * step


@functools.partial(jax.jit, static_argnums=0)
def _read_shared(graph: nnx.GraphDef[Decoder], weights: nnx.State, tokens_1P: Int[Array, "1 P"]) -> Cache:
    decoder = nnx.merge(graph, weights)
    positions_1P = jnp.arange(tokens_1P.shape[1], dtype=jnp.int32)[None]
    _, cache = decoder.extend(tokens_1P, positions_1P, decoder.empty_cache(1, tokens_1P.shape[1]))
    return cache


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(
    graph: nnx.GraphDef[Decoder],
    weights: nnx.State,
    shared: Cache | None,
    prompts_EP: Int[Array, "E P"],
    tokens_EST: Int[Array, "E S T"],
    level_ids: Int[Array, "L"],
) -> Float[Array, "E S T L"]:
    decoder = nnx.merge(graph, weights)
    x_BTD = read_sequences(decoder, prompts_EP, tokens_EST, shared)
    return jax.nn.softmax(decoder.unembed(x_BTD, level_ids)).reshape((*tokens_EST.shape, -1))
