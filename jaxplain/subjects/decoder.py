"""The decoder that every subject becomes: a Flax NNX transformer that sows its MLP activations.

Layers are a plain Python loop, so that under `jax.jit` every layer owns its weights and whatever
folds its activations, and donated buffers are updated in place.

A parameter's name ends in its axis letters (see `architecture`): `query_DHC` has axes model width,
query head, head width. Sharding (`loading.partition`) and the family tables rely on that.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxplain.subjects.architecture import Architecture, Rotary
from jaxplain.subjects.attention_layer import Attention, RotaryTables
from jaxplain.subjects.mixture import Mixture
from jaxplain.subjects.mlp import MLP
from jaxplain.subjects.norms import Norm, stream_norm
from jaxplain.subjects.parameters import random_parameter
from jaxplain.subjects.rotary import rotary_tables

_FLOAT32 = jnp.dtype("float32")
_Kind = TypeVar("_Kind")
_Made = TypeVar("_Made")


def _exact_products() -> contextlib.AbstractContextManager[None]:
    """Float32 products in float32: accelerators would otherwise round the factors to fewer bits."""
    return jax.default_matmul_precision("highest")


class Cache(NamedTuple):
    """What was read so far: every layer's keys and values, and which position each slot holds.

    `positions_BS` is -1 for slots without a token (padding, or not yet filled); slots from `used` on
    are free.
    """

    keys: tuple[Float[Array, "B K C S"], ...]
    values: tuple[Float[Array, "B K S C"], ...]
    positions_BS: Int[Array, "B S"]
    used: Int[Array, ""]


class Block(nnx.Module):
    """One transformer layer: attention and an MLP, which read the residual stream and add to it."""

    def __init__(self, arch: Architecture, layer: int, rngs: nnx.Rngs, dtype: jnp.dtype):
        def norm(there: bool) -> Norm | None:
            return stream_norm(arch, dtype) if there else None

        self.residual = arch.residual
        self.attention_norm = norm(arch.pre_norms)
        self.attention = Attention(arch, layer, rngs, dtype)
        self.attention_post_norm = norm(arch.post_norms)
        self.mlp_norm = norm(arch.pre_norms and arch.residual != "parallel_one_norm")
        self.mlp = (Mixture if arch.routed_experts(layer) else MLP)(arch, rngs, dtype)
        self.mlp_post_norm = norm(arch.post_norms)

    def __call__(self, x_BTD: Float[Array, "B T D"], rotary_TC: RotaryTables) -> Float[Array, "B T D"]:
        """The residual stream with what attention and MLP add to it."""
        read_BTD = _through(self.attention_norm, x_BTD)
        return self._joined(x_BTD, read_BTD, self.attention(read_BTD, rotary_TC))

    def extend(
        self, x_BTD: Float[Array, "B T D"], *context: Any
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B K C S"], Float[Array, "B K S C"]]:
        """The same after what a cache holds; `context` is what `Attention.extend` asks for."""
        read_BTD = _through(self.attention_norm, x_BTD)
        mixed_BTD, keys_BKCS, values_BKSC = self.attention.extend(read_BTD, *context)
        return self._joined(x_BTD, read_BTD, mixed_BTD), keys_BKCS, values_BKSC

    def _joined(
        self,
        x_BTD: Float[Array, "B T D"],
        read_BTD: Float[Array, "B T D"],
        mixed_BTD: Float[Array, "B T D"],
    ) -> Float[Array, "B T D"]:
        after_BTD = x_BTD + _through(self.attention_post_norm, mixed_BTD)
        match self.residual:
            case "sequential":
                read_BTD = _through(self.mlp_norm, after_BTD)
            case "parallel":
                read_BTD = _through(self.mlp_norm, x_BTD)
            case "parallel_one_norm":
                pass
        return after_BTD + _through(self.mlp_post_norm, self.mlp(read_BTD))


def _through(norm: Norm | None, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x_BTD if norm is None else norm(x_BTD)


class Head(nnx.Module):
    """The final norm and, unless the embedding serves, the unembedding."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = stream_norm(arch, dtype)
        if not arch.tied_embeddings:
            self.unembedding_DV = random_parameter(
                rngs, dtype, arch.width, arch.vocabulary, fan_in=arch.width
            )
        if arch.unembedding_bias:
            self.unembedding_bias_V = nnx.Param(jnp.zeros(arch.vocabulary, dtype))


class Decoder(nnx.Module):
    """A causal language model, or its first `depth` layers.

    Calling it gives the residual stream after its last layer, before the final norm. `logits`
    needs a decoder with all its layers and `with_head=True`. Parameters start random; `loading`
    replaces them with a checkpoint's.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = _FLOAT32,
        depth: int | None = None,
        with_head: bool = False,
    ):
        depth = arch.layers if depth is None else depth
        self.arch = arch
        self.embedding_VD = random_parameter(rngs, dtype, arch.vocabulary, arch.width, fan_in=1)
        if arch.position_rows is not None:
            self.position_ND = random_parameter(rngs, dtype, arch.position_rows, arch.width, fan_in=1)
        self.layers = nnx.List([Block(arch, layer, rngs, dtype) for layer in range(depth)])
        self.head = Head(arch, rngs, dtype) if with_head else None

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream after the last layer."""
        tokens = tokens_BT.shape[1]
        x_BTD = self._embed(tokens_BT, np.arange(tokens)[None])
        tables = self._per_layer(
            self.arch.rotary_of,
            lambda rotary: rotary and rotary_tables(rotary, self.arch.head_width, tokens),
        )
        with _exact_products():
            for layer, rotary_TC in zip(self.layers, tables, strict=True):
                x_BTD = layer(x_BTD, rotary_TC)
        return x_BTD

    def _embed(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array | np.ndarray, "#B T"]
    ) -> Float[Array, "B T D"]:
        x_BTD = self.embedding_VD[...][tokens_BT]
        if self.arch.embedding_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.arch.embedding_scale, x_BTD.dtype)
        if self.arch.position_rows is not None:
            x_BTD = x_BTD + self.position_ND[...][positions_BT + self.arch.position_offset]
        return x_BTD

    def _per_layer(self, kind: Callable[[int], _Kind], make: Callable[[_Kind], _Made]) -> list[_Made]:
        """What `make` gives for every layer's kind, made once for each kind."""
        kinds = [kind(layer) for layer in range(len(self.layers))]
        made = {kind: make(kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `batch` rows of up to `slots` tokens, padding included."""
        arch = self.arch
        heads, width, dtype = arch.key_value_heads, arch.head_width, self.embedding_VD[...].dtype
        keys = tuple(jnp.zeros((batch, heads, width, slots), dtype) for _ in self.layers)
        values = tuple(jnp.zeros((batch, heads, slots, width), dtype) for _ in self.layers)
        return Cache(keys, values, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: Cache,
        prefix: Cache | None = None,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The residual stream at positions that follow those in the cache, and the cache with them.

        Where a position is -1 there is no token; what comes out there means nothing. `prefix` is a cache of
        one row, which comes before every row of `cache`. With `remat`, a backward pass computes what is
        inside the layers again instead of keeping it.
        """
        extend = nnx.remat(Block.extend) if remat else Block.extend
        at_BT = jnp.maximum(positions_BT, 0)

        def rotary_at(rotary: Rotary | None) -> RotaryTables:
            if rotary is None:
                return None
            cos_PC, sin_PC = rotary_tables(rotary, self.arch.head_width, self.arch.max_positions)
            return cos_PC[at_BT], sin_PC[at_BT]

        slot = cache.used
        positions_BS = jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, positions_BT, slot, axis=1)

        def seen_within(window: int | None) -> tuple[Array, Array | None]:
            in_prefix = None if prefix is None else _seen(positions_BT, prefix.positions_BS, window)
            return _seen(positions_BT, positions_BS, window), in_prefix

        tables = self._per_layer(self.arch.rotary_of, rotary_at)
        seen = self._per_layer(self.arch.window, seen_within)
        x_BTD = self._embed(tokens_BT, at_BT)
        keys, values = [], []
        with _exact_products():
            for number, layer in enumerate(self.layers):
                x_BTD, keys_BKCS, values_BKSC = extend(
                    layer,
                    x_BTD,
                    tables[number],
                    seen[number],
                    slot,
                    cache.keys[number],
                    cache.values[number],
                    None if prefix is None else (prefix.keys[number], prefix.values[number]),
                )
                keys.append(keys_BKCS)
                values.append(values_BKSC)
        return x_BTD, Cache(tuple(keys), tuple(values), positions_BS, slot + tokens_BT.shape[1])

    def logits(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Next-token logits, float32."""
        return self.unembed(self(tokens_BT))

    def unembed(
        self, x_BTD: Float[Array, "B T D"], only: Int[Array | np.ndarray, "V"] | None = None
    ) -> Float[Array, "B T V"]:
        """Next-token logits from the residual stream, of `only` some tokens if they are given; float32."""
        if self.head is None or len(self.layers) != self.arch.layers:
            raise ValueError("logits need a decoder with all layers and with_head=True")
        chosen = slice(None) if only is None else only
        if self.arch.tied_embeddings:
            return self.unembed_by(x_BTD, self.embedding_VD[chosen], only)
        return self.unembed_by(x_BTD, self.head.unembedding_DV[:, chosen].T, only)

    def unembed_by(
        self,
        x_BTD: Float[Array, "B T D"],
        rows_VD: Float[Array, "V D"],
        only: Int[Array | np.ndarray, "V"] | None = None,
    ) -> Float[Array, "B T V"]:
        """The same with other rows in place of the unembedding's own for those tokens."""
        assert self.head is not None
        with _exact_products():
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV", self.head.norm(x_BTD), rows_VD, preferred_element_type=_FLOAT32
            )
        if self.arch.unembedding_bias:
            bias_V = self.head.unembedding_bias_V[slice(None) if only is None else only]
            logits_BTV += bias_V.astype(_FLOAT32)[None, None]
        if self.arch.logit_scale is not None:
            logits_BTV *= self.arch.logit_scale
        if self.arch.logit_softcap is not None:
            logits_BTV = self.arch.logit_softcap * jnp.tanh(logits_BTV / self.arch.logit_softcap)
        return logits_BTV


def _seen(
    positions_BT: Int[Array, "B T"], positions_BS: Int[Array, "#B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Which slots each position attends to: filled ones, not after it, within the window."""
    distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    seen_BTS = (positions_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)
