"""The decoder that every subject becomes: a Flax NNX transformer that sows its MLP activations.

Layers are a plain Python loop, so that under `jax.jit` every layer owns its weights and whatever
folds its activations, and donated buffers are updated in place.

A parameter's name ends in its axis letters (see `architecture`): `query_DHC` has axes model width,
query head, head width. Sharding (`loading.partition`) and the family tables rely on that.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxplain.subjects.architecture import Architecture
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
        # The window counts the query's own position; `local_window_size` counts those to its left.
        self.window = None if arch.sliding_window is None else (arch.sliding_window - 1, 0)

    def __call__(self, x_BTD: Float[Array, "B T D"], rotary_TC: tuple[Array, Array]) -> Float[Array, "B T D"]:
        """Mix the values of earlier positions; `rotary_TC` are the tables of `rotary_tables`."""
        query_BTHC = jnp.einsum("BTD,DHC->BTHC", x_BTD, self.query_DHC[...])
        key_BTKC = jnp.einsum("BTD,DKC->BTKC", x_BTD, self.key_DKC[...])
        value_BTKC = jnp.einsum("BTD,DKC->BTKC", x_BTD, self.value_DKC[...])
        if self.has_bias:
            query_BTHC += self.query_bias_HC[...][None, None]
            key_BTKC += self.key_bias_KC[...][None, None]
            value_BTKC += self.value_bias_KC[...][None, None]
        mixed_BTHC = jax.nn.dot_product_attention(
            apply_rotary(query_BTHC, rotary_TC),
            apply_rotary(key_BTKC, rotary_TC),
            value_BTKC,
            is_causal=True,
            local_window_size=self.window,
        )
        out_BTD = jnp.einsum("BTHC,HCD->BTD", mixed_BTHC, self.output_HCD[...])
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
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.gate_DF[...])
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.up_DF[...])
        if self.has_bias:
            gate_BTF += self.gate_bias_F[...][None, None]
            up_BTF += self.up_bias_F[...][None, None]
        acts_BTF = ACTIVATIONS[self.activation](gate_BTF) * up_BTF
        if hasattr(self, "__captures__"):  # Flax warns of a sow that `nnx.capture` does not surround
            self.sow(Sown, MLP_ACTIVATION, acts_BTF, reduce_fn=_fold, init_fn=tuple)
        out_BTD = jnp.einsum("BTF,FD->BTD", acts_BTF, self.down_FD[...])
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

    def logits(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Next-token logits, in the dtype of the weights."""
        if self.head is None or len(self.layers) != self.arch.layers:
            raise ValueError("logits need a decoder with all layers and with_head=True")
        x_BTD = self.head.norm(self(tokens_BT))
        with _exact_products():
            if self.arch.tied_embeddings:
                return jnp.einsum("BTD,VD->BTV", x_BTD, self.embedding_VD[...])
            return jnp.einsum("BTD,DV->BTV", x_BTD, self.head.unembedding_DV[...])
