"""The decoder that every subject becomes: a Flax NNX transformer that sows its MLP activations.

Layers are a plain Python loop, so that under `jax.jit` every layer owns its weights and whatever
folds its activations, and donated buffers are updated in place.

A parameter's name ends in its axis letters (see `architecture`): `query_DHC` has axes model width,
query head, head width. Sharding (`loading.partition`) and the family tables rely on that.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.attention import Prefix, attend, causal_attention
from jaxplain.subjects.products import merge_heads, project, project_heads
from jaxplain.subjects.rotary import apply_rotary, rotary_tables

MLP_ACTIVATION = "mlp_activation"
"""The site whose features are neurons: the input of the MLP's down projection, [B, T, F]."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


_FLOAT32 = jnp.dtype("float32")


class Sown(nnx.Variable[Any]):
    """What a layer's activations are folded into while they pass; read it with `nnx.capture`.

    Captured without an initial value it collects the activations themselves in a tuple. With one,
    the value's own `fold(activations)` decides, and only its result leaves the layer.
    """


def _fold(accumulator: Any, activations: Array) -> Any:
    if hasattr(accumulator, "fold"):
        return accumulator.fold(activations)
    return (*accumulator, activations)


def _exact_products() -> contextlib.AbstractContextManager[None]:
    """Float32 products in float32: accelerators would otherwise round the factors to fewer bits."""
    return jax.default_matmul_precision("highest")


def _parameter(rngs: nnx.Rngs, dtype: jnp.dtype, *shape: int, fan_in: int) -> nnx.Param[Array]:
    scale = fan_in**-0.5
    return nnx.Param((jax.random.normal(rngs.params(), shape) * scale).astype(dtype))


class Cache(NamedTuple):
    """What was read so far: every layer's keys and values, and which position each slot holds.

    `positions_BS` is -1 for slots without a token (padding, or not yet filled); slots from `used` on
    are free.
    """

    keys: tuple[Float[Array, "B K C S"], ...]
    values: tuple[Float[Array, "B K S C"], ...]
    positions_BS: Int[Array, "B S"]
    used: Int[Array, ""]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang & Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype):
        self.scale_D = nnx.Param(jnp.ones(width, dtype))
        self.epsilon = epsilon

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Scale every position to unit root mean square, then by the learned scale."""
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return self.scale_D[...][None, None] * x.astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Causal multi-head, grouped-query or multi-query attention, optionally within a sliding window."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, h, k, c = arch.width, arch.query_heads, arch.key_value_heads, arch.head_width
        self.query_DHC = _parameter(rngs, dtype, d, h, c, fan_in=d)
        self.key_DKC = _parameter(rngs, dtype, d, k, c, fan_in=d)
        self.value_DKC = _parameter(rngs, dtype, d, k, c, fan_in=d)
        self.output_HCD = _parameter(rngs, dtype, h, c, d, fan_in=h * c)
        self.has_bias = arch.attention_bias
        if self.has_bias:
            self.query_bias_HC = nnx.Param(jnp.zeros((h, c), dtype))
            self.key_bias_KC = nnx.Param(jnp.zeros((k, c), dtype))
            self.value_bias_KC = nnx.Param(jnp.zeros((k, c), dtype))
            self.output_bias_D = nnx.Param(jnp.zeros(d, dtype))
        self.window = arch.sliding_window  # counts the query's own position

    def __call__(self, x_BTD: Float[Array, "B T D"], rotary_TC: tuple[Array, Array]) -> Float[Array, "B T D"]:
        """Mix the values of earlier positions; `rotary_TC` are the tables of `rotary_tables`."""
        query_BTHC, key_BTKC, value_BTKC = self._projections(x_BTD, rotary_TC)
        mixed_BTHC = causal_attention(query_BTHC, key_BTKC, value_BTKC, self.window)
        return self._output(mixed_BTHC)

    def extend(
        self,
        x_BTD: Float[Array, "B T D"],
        rotary_BTC: tuple[Array, Array],
        seen: tuple[Bool[Array, "B T S"], Bool[Array, "B T P"] | None],
        slot: Int[Array, ""],
        keys_BKCS: Float[Array, "B K C S"],
        values_BKSC: Float[Array, "B K S C"],
        prefix: Prefix | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B K C S"], Float[Array, "B K S C"]]:
        """The same for positions that follow those in a cache; also the cache's keys and values with theirs.

        The new positions go into the slots from `slot` on. `seen` says which slots of the cache and of
        the prefix each of them attends to.
        """
        query_BTHC, key_BTKC, value_BTKC = self._projections(x_BTD, rotary_BTC)
        update = jax.lax.dynamic_update_slice_in_dim
        keys_BKCS = update(keys_BKCS, key_BTKC.transpose(0, 2, 3, 1), slot, axis=3)
        values_BKSC = update(values_BKSC, value_BTKC.swapaxes(1, 2), slot, axis=2)
        mixed_BTHC = attend(query_BTHC, keys_BKCS, values_BKSC, seen[0], prefix, seen[1])
        return self._output(mixed_BTHC), keys_BKCS, values_BKSC

    def _projections(
        self, x_BTD: Float[Array, "B T D"], rotary: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, the first two rotated."""
        query_BTHC, key_BTKC, value_BTKC = (
            project_heads(x_BTD, weight[...]) for weight in (self.query_DHC, self.key_DKC, self.value_DKC)
        )
        if self.has_bias:
            query_BTHC += self.query_bias_HC[...][None, None]
            key_BTKC += self.key_bias_KC[...][None, None]
            value_BTKC += self.value_bias_KC[...][None, None]
        return apply_rotary(query_BTHC, rotary), apply_rotary(key_BTKC, rotary), value_BTKC

    def _output(self, mixed_BTHC: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        out_BTD = merge_heads(mixed_BTHC, self.output_HCD[...])
        return out_BTD + self.output_bias_D[...][None, None] if self.has_bias else out_BTD


class GatedMLP(nnx.Module):
    """The gated feed-forward layer (Shazeer, 2020). Its hidden units are the neurons."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, f = arch.width, arch.neurons
        self.gate_DF = _parameter(rngs, dtype, d, f, fan_in=d)
        self.up_DF = _parameter(rngs, dtype, d, f, fan_in=d)
        self.down_FD = _parameter(rngs, dtype, f, d, fan_in=f)
        self.has_bias = arch.mlp_bias
        if self.has_bias:
            self.gate_bias_F = nnx.Param(jnp.zeros(f, dtype))
            self.up_bias_F = nnx.Param(jnp.zeros(f, dtype))
            self.down_bias_D = nnx.Param(jnp.zeros(d, dtype))
        self.activation = arch.activation

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Compute and sow the neurons, and project them down."""
        gate_BTF, up_BTF = project(x_BTD, self.gate_DF[...]), project(x_BTD, self.up_DF[...])
        if self.has_bias:
            gate_BTF += self.gate_bias_F[...][None, None]
            up_BTF += self.up_bias_F[...][None, None]
        acts_BTF = ACTIVATIONS[self.activation](gate_BTF) * up_BTF
        if hasattr(self, "__captures__"):  # Flax warns of a sow that `nnx.capture` does not surround
            self.sow(Sown, MLP_ACTIVATION, acts_BTF, reduce_fn=_fold, init_fn=tuple)
        out_BTD = project(acts_BTF, self.down_FD[...])
        return out_BTD + self.down_bias_D[...][None, None] if self.has_bias else out_BTD


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(arch.width, arch.norm_epsilon, dtype)
        self.attention = Attention(arch, rngs, dtype)
        self.mlp_norm = RMSNorm(arch.width, arch.norm_epsilon, dtype)
        self.mlp = GatedMLP(arch, rngs, dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"], rotary_TC: tuple[Array, Array]) -> Float[Array, "B T D"]:
        """Add what attention and MLP read from the residual stream to it."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary_TC)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def extend(
        self, x_BTD: Float[Array, "B T D"], *context: Any
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B K C S"], Float[Array, "B K S C"]]:
        """The same after what a cache holds; `context` is what `Attention.extend` asks for."""
        mixed_BTD, keys_BKCS, values_BKSC = self.attention.extend(self.attention_norm(x_BTD), *context)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), keys_BKCS, values_BKSC


class Head(nnx.Module):
    """The final norm and, unless the embedding serves, the unembedding."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = RMSNorm(arch.width, arch.norm_epsilon, dtype)
        if not arch.tied_embeddings:
            self.unembedding_DV = _parameter(rngs, dtype, arch.width, arch.vocabulary, fan_in=arch.width)


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
        self.embedding_VD = _parameter(rngs, dtype, arch.vocabulary, arch.width, fan_in=1)
        self.layers = nnx.List([Block(arch, rngs, dtype) for _ in range(depth)])
        self.head = Head(arch, rngs, dtype) if with_head else None

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream after the last layer."""
        x_BTD = self.embedding_VD[...][tokens_BT]
        rotary_TC = rotary_tables(self.arch.rotary, self.arch.head_width, tokens_BT.shape[1])
        with _exact_products():
            for layer in self.layers:
                x_BTD = layer(x_BTD, rotary_TC)
        return x_BTD

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
        cos_PC, sin_PC = rotary_tables(self.arch.rotary, self.arch.head_width, self.arch.max_positions)
        at_BT = jnp.maximum(positions_BT, 0)
        rotary_BTC = (cos_PC[at_BT], sin_PC[at_BT])
        slot = cache.used
        positions_BS = jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, positions_BT, slot, axis=1)
        seen = (
            self._seen(positions_BT, positions_BS),
            None if prefix is None else self._seen(positions_BT, prefix.positions_BS),
        )
        x_BTD = self.embedding_VD[...][tokens_BT]
        keys, values = [], []
        with _exact_products():
            for number, layer in enumerate(self.layers):
                x_BTD, keys_BKCS, values_BKSC = extend(
                    layer,
                    x_BTD,
                    rotary_BTC,
                    seen,
                    slot,
                    cache.keys[number],
                    cache.values[number],
                    None if prefix is None else (prefix.keys[number], prefix.values[number]),
                )
                keys.append(keys_BKCS)
                values.append(values_BKSC)
        return x_BTD, Cache(tuple(keys), tuple(values), positions_BS, slot + tokens_BT.shape[1])

    def _seen(
        self, positions_BT: Int[Array, "B T"], positions_BS: Int[Array, "#B S"]
    ) -> Bool[Array, "B T S"]:
        """Which slots each position attends to: filled ones, not after it, within the window."""
        distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
        window = self.arch.sliding_window or self.arch.max_positions
        return (positions_BS[:, None, :] >= 0) & (distance_BTS >= 0) & (distance_BTS < window)

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
            return self.unembed_by(x_BTD, self.embedding_VD[chosen])
        return self.unembed_by(x_BTD, self.head.unembedding_DV[:, chosen].T)

    def unembed_by(self, x_BTD: Float[Array, "B T D"], rows_VD: Float[Array, "V D"]) -> Float[Array, "B T V"]:
        """The same with rows of an unembedding that are not the model's own."""
        assert self.head is not None
        with _exact_products():
            return jnp.einsum("BTD,VD->BTV", self.head.norm(x_BTD), rows_VD, preferred_element_type=_FLOAT32)
