"""The shape of a decoder: everything that decides its arithmetic, and nothing about where it came from.

Axis letters, used as suffixes of array and parameter names throughout the package:
B batch, T token, D model width, F neuron, H query head, K key/value head, C head width,
L layer, R rank, V vocabulary, P data shard.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu_exact", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021) and how its frequencies are rescaled.

    `linear` divides every frequency by `factor`. `llama3` divides the low frequencies, keeps the
    high ones and blends between the two, as Llama 3.1 does. `base` is the wavelength base (theta).
    """

    base: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's dimensions and variants. `layers` counts the whole checkpoint's layers."""

    vocabulary: int
    layers: int
    width: int
    neurons: int
    query_heads: int
    key_value_heads: int
    head_width: int
    max_positions: int
    activation: Activation = "silu"
    norm_epsilon: float = 1e-6
    rotary: Rotary = Rotary()
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
