"""The attention layer of a decoder: projections, norms and rotation around `attention`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.attention import Prefix, attend, causal_attention
from jaxplain.subjects.norms import head_norm
from jaxplain.subjects.parameters import random_parameter
from jaxplain.subjects.products import merge_heads, project_heads
from jaxplain.subjects.rotary import apply_rotary

RotaryTables = tuple[Array, Array] | None
"""Cosines and sines of `rotary_tables`; None in a layer that does not rotate."""


class Attention(nnx.Module):
    """Causal multi-head, grouped-query or multi-query attention, optionally within a sliding window."""

    def __init__(self, arch: Architecture, layer: int, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, h, k, c = arch.width, arch.query_heads, arch.key_value_heads, arch.head_width
        self.query_DHC = random_parameter(rngs, dtype, d, h, c, fan_in=d)
        self.key_DKC = random_parameter(rngs, dtype, d, k, c, fan_in=d)
        self.value_DKC = random_parameter(rngs, dtype, d, k, c, fan_in=d)
        self.output_HCD = random_parameter(rngs, dtype, h, c, d, fan_in=h * c)
        self.has_bias = arch.attention_bias
        if self.has_bias:
            self.query_bias_HC = nnx.Param(jnp.zeros((h, c), dtype))
            self.key_bias_KC = nnx.Param(jnp.zeros((k, c), dtype))
            self.value_bias_KC = nnx.Param(jnp.zeros((k, c), dtype))
        self.has_output_bias = arch.attention_output_bias
        if self.has_output_bias:
            self.output_bias_D = nnx.Param(jnp.zeros(d, dtype))
        if arch.head_norm:
            self.query_norm = head_norm(arch.head_norm, "H", arch, dtype)
            self.key_norm = head_norm(arch.head_norm, "K", arch, dtype)
        else:
            self.query_norm = self.key_norm = None
        rotary = arch.rotary_of(layer)
        self.interleaved = rotary is not None and rotary.interleaved
        self.window = arch.window(layer)
        self.scale, self.softcap = arch.attention_scale, arch.attention_softcap

    def __call__(self, x_BTD: Float[Array, "B T D"], rotary_TC: RotaryTables) -> Float[Array, "B T D"]:
        """Mix the values of earlier positions; `rotary_TC` are the tables of `rotary_tables`."""
        query_BTHC, key_BTKC, value_BTKC = self._projections(x_BTD, rotary_TC)
        mixed_BTHC = causal_attention(
            query_BTHC, key_BTKC, value_BTKC, self.window, scale=self.scale, softcap=self.softcap
        )
        return self._output(mixed_BTHC)

    def extend(
        self,
        x_BTD: Float[Array, "B T D"],
        rotary_BTC: RotaryTables,
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
        mixed_BTHC = attend(
            query_BTHC,
            keys_BKCS,
            values_BKSC,
            seen[0],
            prefix,
            seen[1],
            scale=self.scale,
            softcap=self.softcap,
        )
        return self._output(mixed_BTHC), keys_BKCS, values_BKSC

    def _projections(self, x_BTD: Float[Array, "B T D"], rotary: RotaryTables) -> tuple[Array, Array, Array]:
        """Queries, keys and values, the first two normalised and rotated."""
        query_BTHC, key_BTKC, value_BTKC = (
            project_heads(x_BTD, weight[...]) for weight in (self.query_DHC, self.key_DKC, self.value_DKC)
        )
        if self.has_bias:
            query_BTHC += self.query_bias_HC[...][None, None]
            key_BTKC += self.key_bias_KC[...][None, None]
            value_BTKC += self.value_bias_KC[...][None, None]
        if self.query_norm is not None and self.key_norm is not None:
            query_BTHC, key_BTKC = self.query_norm(query_BTHC), self.key_norm(key_BTKC)
        if rotary is not None:
            query_BTHC, key_BTKC = (
                apply_rotary(x_BTHC, rotary, interleaved=self.interleaved)
                for x_BTHC in (query_BTHC, key_BTKC)
            )
        return query_BTHC, key_BTKC, value_BTKC

    def _output(self, mixed_BTHC: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        out_BTD = merge_heads(mixed_BTHC, self.output_HCD[...])
        return out_BTD + self.output_bias_D[...][None, None] if self.has_output_bias else out_BTD
