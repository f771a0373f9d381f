"""Batched sampling from a decoder with a key/value cache, and the likelihood of given continuations.

Prompts stand right-aligned in the cache, so that all rows of a batch grow by one slot per step. What
all prompts of a call begin with is read once. A row's sample depends on its own seed alone, not on the
rows beside it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxplain.errors import JaxplainError
from jaxplain.subjects.decoder import Cache, Decoder

_TOKENS_PER_READ = 128
# Reads and caches come in multiples of these, so that few programs are compiled.
_TOKENS_PER_STEP = 32
_SLOTS_PER_STEP = 128
_BISECTIONS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Choose among the likeliest tokens that together reach this probability (nucleus
            sampling, Holtzman et al., 2020).
        max_tokens: Tokens at most.
        stop: Token ids that end a completion, and are not part of it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 100
    stop: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Sampled tokens. `finished` is False where `max_tokens` cut them short."""

    tokens: list[int]
    finished: bool


class Generator:
    """Samples from a decoder that is loaded with its head."""

    def __init__(self, decoder: Decoder, mesh: Mesh, *, batch_size: int):
        self.batch_size = batch_size
        self._mesh, self._arch = mesh, decoder.arch
        self._graph, self._weights = nnx.split(decoder)
        self._rows, self._all = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Completions with their prompts' numbers, a batch at a time, long prompts first.

        Raises JaxplainError where a prompt and its completion are longer than the model reads.
        """
        for batch, prefix, cache, last_BD in self._read(prompts, sampling.max_tokens):
            seeds_B = jnp.asarray([np.uint32(seeds[i] % 2**32) for i in self._filled(batch)])
            tokens_BN, lengths_B = jax.device_get(
                _sample(self._graph, self._weights, cache, prefix, last_BD, seeds_B, sampling)
            )
            for row, number in enumerate(batch):
                length = int(lengths_B[row])
                finished = length < sampling.max_tokens
                yield number, Completion(tokens=tokens_BN[row, :length].tolist(), finished=finished)

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Float[np.ndarray, "N"]:
        """Natural logarithm of each continuation's probability after its prompt, float32 [N].

        Raises JaxplainError where a prompt and its continuation are longer than the model reads.
        """
        found = np.zeros(len(prompts), np.float32)
        width = max(map(len, continuations), default=0)
        for batch, prefix, cache, last_BD in self._read(prompts, width):
            tokens_BT = np.zeros((self.batch_size, width), np.int32)
            positions_BT = np.full((self.batch_size, width), -1, np.int32)
            for row, number in enumerate(batch):
                length = len(continuations[number])
                tokens_BT[row, :length] = continuations[number]
                positions_BT[row, :length] = len(prompts[number]) + np.arange(length)
            values_B = _log_likelihood(
                self._graph, self._weights, cache, prefix, last_BD, *self._place(tokens_BT, positions_BT)
            )
            found[batch] = np.asarray(values_B)[: len(batch)]
        return found

    def _filled(self, batch: list[int]) -> list[int]:
        return batch + [batch[-1]] * (self.batch_size - len(batch))

    def _place(self, *arrays: np.ndarray) -> list[Array]:
        return [jax.device_put(array, self._rows if len(array) > 1 else self._all) for array in arrays]

    def _read(
        self, prompts: Sequence[Sequence[int]], room: int
    ) -> Iterator[tuple[list[int], Cache | None, Cache, Float[Array, "B D"]]]:
        """Batches of prompts by number, what all of them begin with, a cache each, and its last position."""
        longest, shortest = max(map(len, prompts), default=1), min(map(len, prompts), default=1)
        if shortest == 0:
            raise ValueError("every prompt needs a token to go on from")
        if longest + room > self._arch.max_positions:
            raise JaxplainError(
                f"a prompt of {longest} tokens with {room} to come is longer than the "
                f"{self._arch.max_positions} tokens that the model reads; use fewer or shorter exemplars."
            )
        # Every row keeps a token of its own: what comes next is read off the row's last position.
        prefix = os.path.commonprefix([list(prompt) for prompt in prompts])[: shortest - 1]  # noqa: RUF071
        if len(prefix) < _TOKENS_PER_READ:
            prefix = []  # not worth two more programs
        shared = None
        if prefix:
            empty = self._empty_cache(1, _padded(len(prefix), _SLOTS_PER_STEP))
            shared, _ = self._read_rows(empty, None, [prefix], 0)
        slots = _padded(_padded(longest - len(prefix), _TOKENS_PER_STEP) + room, _SLOTS_PER_STEP)

        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rest = [prompts[i][len(prefix) :] for i in self._filled(batch)]
            empty = self._empty_cache(self.batch_size, slots)
            cache, last_BD = self._read_rows(empty, shared, rest, len(prefix))
            yield batch, shared, cache, last_BD

    def _read_rows(
        self, cache: Cache, prefix: Cache | None, rows: Sequence[Sequence[int]], position: int
    ) -> tuple[Cache, Float[Array, "B D"]]:
        """Rows of tokens, from `position` on, read in pieces, padded on the left."""
        width = _padded(max(map(len, rows)), _TOKENS_PER_STEP)
        tokens_BT = np.zeros((len(rows), width), np.int32)
        positions_BT = np.full((len(rows), width), -1, np.int32)
        for row, tokens in enumerate(rows):
            tokens_BT[row, width - len(tokens) :] = tokens
            positions_BT[row, width - len(tokens) :] = position + np.arange(len(tokens))
        last_BD = jnp.zeros((len(rows), self._arch.width))
        stop = (width - 1) % _TOKENS_PER_READ + 1  # the first piece is what the others leave
        while stop <= width:
            piece = np.s_[:, max(stop - _TOKENS_PER_READ, 0) : stop]
            placed = self._place(tokens_BT[piece], positions_BT[piece])
            cache, last_BD = _extend(self._graph, self._weights, cache, prefix, *placed)
            stop += _TOKENS_PER_READ
        return cache, last_BD

    def _empty_cache(self, batch: int, slots: int) -> Cache:
        """Rows over `data`, key heads over `model` where they divide; a single row is everywhere."""
        rows = "data" if batch > 1 else None
        heads = "model" if self._arch.key_value_heads % self._mesh.shape["model"] == 0 else None
        layer, positions, used = (NamedSharding(self._mesh, spec) for spec in (P(rows, heads), P(rows), P()))
        layers = (layer,) * self._arch.layers
        return _empty(self._graph, self._weights, batch, slots, (layers, layers, positions, used))


def _padded(tokens: int, step: int) -> int:
    return math.ceil(tokens / step) * step


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _empty(
    graph: nnx.GraphDef[Decoder], weights: nnx.State, batch: int, slots: int, shardings: tuple
) -> Cache:
    cache = nnx.merge(graph, weights).empty_cache(batch, slots)
    return jax.lax.with_sharding_constraint(cache, Cache(*shardings))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    graph: nnx.GraphDef[Decoder],
    weights: nnx.State,
    cache: Cache,
    prefix: Cache | None,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
) -> tuple[Cache, Float[Array, "B D"]]:
    x_BTD, cache = nnx.merge(graph, weights).extend(tokens_BT, positions_BT, cache, prefix)
    return cache, x_BTD[:, -1]


@functools.partial(jax.jit, static_argnums=(0, 6))
def _sample(
    graph: nnx.GraphDef[Decoder],
    weights: nnx.State,
    cache: Cache,
    prefix: Cache | None,
    last_BD: Float[Array, "B D"],
    seeds_B: Array,
    sampling: Sampling,
) -> tuple[Int[Array, "B N"], Int[Array, "B"]]:
    """Tokens until each row stops, and how many they are."""
    decoder = nnx.merge(graph, weights)
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    stop_S = jnp.asarray(sampling.stop, jnp.int32).reshape(-1)
    rows, room = last_BD.shape[0], sampling.max_tokens
    next_B = cache.positions_BS.max(axis=1) + 1  # a batch's rows never end with the prefix

    def unfinished(state: tuple) -> Bool[Array, ""]:
        step, lengths_B, *_ = state
        return (step < room) & (lengths_B == step).any()

    def choose(step: Array, lengths_B: Array, tokens_BN: Array, last_BD: Array) -> tuple:
        logits_BV = decoder.unembed(last_BD[:, None])[:, 0]
        chosen_B = _choose(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), sampling)
        goes_on_B = (lengths_B == step) & ~(chosen_B[:, None] == stop_S[None]).any(axis=1)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, chosen_B[:, None], step, axis=1)
        return step + 1, lengths_B + goes_on_B, tokens_BN, chosen_B

    def advance(state: tuple) -> tuple:
        step, lengths_B, tokens_BN, chosen_B, cache = state
        x_BTD, cache = decoder.extend(chosen_B[:, None], (next_B + step - 1)[:, None], cache, prefix)
        return *choose(step, lengths_B, tokens_BN, x_BTD[:, -1]), cache

    first = choose(jnp.int32(0), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, room), jnp.int32), last_BD)
    _, lengths_B, tokens_BN, _, _ = jax.lax.while_loop(unfinished, advance, (*first, cache))
    return tokens_BN, lengths_B


def _choose(logits_BV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, "B"]:
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        logits_BV = jnp.where(nucleus(logits_BV, sampling.top_p), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def nucleus(logits_BV: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """Which tokens are in the smallest set of the likeliest that reaches probability `top_p`.

    Tokens as likely as the last one of the set are in it too. The least likelihood is found by
    bisection, which needs no sorting of the vocabulary.
    """
    chances_BV = jax.nn.softmax(logits_BV, axis=-1)
    enough_B, too_high_B = jnp.zeros(len(logits_BV)), chances_BV.max(axis=-1) * (1 + 1e-6)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        enough_B, too_high_B = bounds
        middle_B = (enough_B + too_high_B) / 2
        mass_B = jnp.where(chances_BV >= middle_B[:, None], chances_BV, 0).sum(axis=-1)
        reached_B = mass_B >= top_p
        return jnp.where(reached_B, middle_B, enough_B), jnp.where(reached_B, too_high_B, middle_B)

    enough_B, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (enough_B, too_high_B))
    return chances_BV >= enough_B[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(
    graph: nnx.GraphDef[Decoder],
    weights: nnx.State,
    cache: Cache,
    prefix: Cache | None,
    last_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
) -> Float[Array, "B"]:
    decoder = nnx.merge(graph, weights)
    x_BTD, _ = decoder.extend(tokens_BT, positions_BT, cache, prefix)
    x_BTD = jnp.concatenate([last_BD[:, None], x_BTD[:, :-1]], axis=1)
    logits_BTV = decoder.unembed(x_BTD)
    at_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[..., None], axis=-1)[..., 0]
    return jnp.where(positions_BT >= 0, at_BT, 0).sum(axis=1)
