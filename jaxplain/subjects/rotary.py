"""Rotary position embeddings (Su et al., 2021; https://arxiv.org/abs/2104.09864), in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxplain.subjects.architecture import Rotary


def _frequencies(rotary: Rotary, head_width: int) -> np.ndarray:
    """Radians per token of each pair of coordinates, float32 [rotated coordinates / 2]."""
    rotated = rotary.coordinates or head_width
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / rotated
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
    """Cosines and sines of every position's angles, float32 [T, rotated coordinates / 2] each."""
    angles = np.arange(tokens, dtype=np.float32)[:, None] * _frequencies(rotary, head_width)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x_BTHC: Float[Array, "B T H C"], tables: tuple[Array, Array], *, interleaved: bool = False
) -> Array:
    """Rotate the first coordinates of each head, as many as the tables have angles for twice.

    `tables` are [T, C/2] where all rows hold the same positions, or [B, T, C/2]. Coordinate i is rotated
    against coordinate i + C/2 (the layout of most Hugging Face checkpoints), or, where they are
    `interleaved`, 2i against 2i + 1.
    """
    cos, sin = (table.reshape((-1, *table.shape[-2:]))[:, :, None, :] for table in tables)
    rotated = 2 * cos.shape[-1]
    x = x_BTHC[..., :rotated].astype(jnp.float32)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        together = jnp.stack(turned, axis=-1).reshape(x.shape)
    else:
        together = jnp.concatenate(turned, axis=-1)
    together = together.astype(x_BTHC.dtype)
    if rotated == x_BTHC.shape[-1]:
        return together
    return jnp.concatenate([together, x_BTHC[..., rotated:]], axis=-1)
