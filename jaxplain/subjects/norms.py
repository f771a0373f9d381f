"""Normalisation of positions and of heads, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxplain.subjects.architecture import Architecture, HeadNorm, NormKind


class Norm(nnx.Module):
    """Root-mean-square (Zhang & Sennrich, 2019) or layer normalisation (Ba et al., 2016).

    `axes` are the letters of the parameters `scale_...` and, for a layer norm, `bias_...`; they stand for
    the last axes of what is normalised, and the last `over` of them are normalised together.
    """

    def __init__(self, kind: NormKind, axes: dict[str, int], epsilon: float, dtype: jnp.dtype, over: int = 1):
        self.kind, self.epsilon, self.over = kind, epsilon, over
        self.letters = "".join(axes)
        shape = tuple(axes.values())
        one = jnp.zeros if kind == "rms_one_plus" else jnp.ones
        setattr(self, f"scale_{self.letters}", nnx.Param(one(shape, dtype)))
        if kind == "layer":
            setattr(self, f"bias_{self.letters}", nnx.Param(jnp.zeros(shape, dtype)))

    def __call__(self, x: Float[Array, "*B X"]) -> Float[Array, "*B X"]:
        """Normalise, then scale and shift as learned."""
        axes = tuple(range(-self.over, 0))
        normal = x.astype(jnp.float32)
        if self.kind in ("layer", "layer_without_bias"):
            normal = normal - jnp.mean(normal, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(normal), axis=axes, keepdims=True)
        normal = normal * jax.lax.rsqrt(variance + self.epsilon)
        scale = self._parameter("scale", x.ndim)
        match self.kind:
            case "rms":  # rounded before it is scaled, as Llama's
                return scale * normal.astype(x.dtype)
            case "rms_one_plus":
                normal = (1 + scale.astype(jnp.float32)) * normal
            case "layer":
                normal = scale.astype(jnp.float32) * normal
                normal = normal + self._parameter("bias", x.ndim).astype(jnp.float32)
            case "layer_without_bias":
                normal = scale.astype(jnp.float32) * normal
        return normal.astype(x.dtype)

    def _parameter(self, name: str, dimensions: int) -> Array:
        value = getattr(self, f"{name}_{self.letters}")[...]
        return value.reshape((1,) * (dimensions - value.ndim) + value.shape)


def stream_norm(arch: Architecture, dtype: jnp.dtype) -> Norm:
    """A norm of the residual stream's width."""
    return Norm(arch.norm, {"D": arch.width}, arch.norm_epsilon, dtype)


def head_norm(kind: HeadNorm, heads: str, arch: Architecture, dtype: jnp.dtype) -> Norm:
    """A norm of queries (`heads` is H) or keys (K)."""
    axes = {"C": arch.head_width}
    if kind != "shared":
        axes = {heads: arch.sizes[heads]} | axes
    return Norm(arch.norm, axes, arch.norm_epsilon, dtype, over=2 if kind == "joint" else 1)
