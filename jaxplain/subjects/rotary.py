"""Rotary position embeddings (Su et al., 2021; https://arxiv.org/abs/2104.09864), in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxplain.subjects.architecture import Rotary


def _frequencies(rotary: Rotary, head_width: int) -> np.ndarray:
    """Radians per token of each pair of coordinates, float32 [head_width / 2]."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / head_width
    frequencies = (1.0 / rotary.base**exponents).astype(np.float32)
    match rotary.scaling:
        case "none":
            return frequencies
        case "linear":
            return frequencies / np.float32(rotary.factor)
        case "llama3":
            # How many whole turns a pair makes over the original context decides: below `low` it is
            # slowed down by the factor, above `high` it is left alone, in between it is blended.
            low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
            turns = rotary.original_max_positions * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return (frequencies * (kept + (1 - kept) / rotary.factor)).astype(np.float32)


def rotary_tables(
    rotary: Rotary, head_width: int, tokens: int
) -> tuple[Float[Array, "T C2"], Float[Array, "T C2"]]:
    """Cosines and sines of every position's angles, float32 [T, head_width / 2] each."""
    angles = np.arange(tokens, dtype=np.float32)[:, None] * _frequencies(rotary, head_width)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BTHC: Float[Array, "B T H C"], tables: tuple[Array, Array]) -> Array:
    """Rotate coordinate i against coordinate i + C/2 (the layout of Hugging Face checkpoints).

    `tables` are [T, C/2] where all rows hold the same positions, or [B, T, C/2].
    """
    cos, sin = (table.reshape((-1, *table.shape[-2:]))[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHC.dtype)
