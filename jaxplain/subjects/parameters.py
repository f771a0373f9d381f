"""Parameters as they are before a checkpoint's values replace them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


def random_parameter(rngs: nnx.Rngs, dtype: jnp.dtype, *shape: int, fan_in: int) -> nnx.Param[Array]:
    """Normally distributed, with variance 1 / fan_in."""
    scale = fan_in**-0.5
    return nnx.Param((jax.random.normal(rngs.params(), shape) * scale).astype(dtype))
