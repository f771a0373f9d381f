"""The shape of a decoder: everything that decides its arithmetic, and nothing about where it came from.

Axis letters, used as suffixes of array and parameter names throughout the package:
B batch, T token, D model width, F neuron, H query head, K key/value head, C head width,
L layer, R rank, V vocabulary, P data shard, N row of a table of positions, E expert,
I neuron of an expert that tokens are routed to, J neuron of the shared expert.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu_exact", "gelu_tanh", "relu"]

NormKind = Literal["rms", "rms_one_plus", "layer", "layer_without_bias"]
"""`rms_one_plus` scales by one more than its parameter, as Gemma does."""

HeadNorm = Literal["shared", "per_head", "joint"]
"""A norm of queries and keys: of each head alone, with one scale for all heads or a scale for each, or of
all heads together."""

Residual = Literal["sequential", "parallel", "parallel_one_norm"]
"""What the MLP reads: the stream with the attention's output in it, or the stream that attention reads,
through its own norm or the attention's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021) and how its frequencies are rescaled.

    `linear` divides every frequency by `factor`. `llama3` divides the low frequencies, keeps the
    high ones and blends between the two, as Llama 3.1 does. `base` is the wavelength base (theta).
    Of each head the first `coordinates` are rotated, all where that is None. A coordinate is rotated
    against the one half of them further, or against its neighbour where they are `interleaved`.
    """

    base: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192
    coordinates: int | None = None
    interleaved: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's dimensions and variants. `layers` counts the whole checkpoint's layers.

    Attributes:
        neurons: Of a plain MLP.
        experts: Experts that tokens are routed to, in layers that are mixtures; 0 where none is.
        experts_per_token: How many of them read a token.
        expert_neurons: Of each of them.
        shared_neurons: Of the expert that reads every token; 0 where there is none.
        routing_sums_to_one: Whether a token's experts are weighted by their chances among themselves, rather
            than among all.
        dense_layers: Which layers have a plain MLP instead, one entry per layer; None where none has.
        rotary: None where positions are not rotated.
        position_rows: Rows of the table of learned positions; None where there is no table.
        position_offset: The row of the first position.
        sliding_window: Positions that a local layer attends to, its own included; None for all.
        local_layers: Which layers are local, one entry per layer; None where all are.
        local_rotary: The local layers' rotation, where it differs.
        pre_norms: Whether attention and MLP read the residual stream through norms.
        post_norms: Whether what they add to it passes norms.
        attention_bias: Of queries, keys and values.
        attention_scale: What attention's logits are multiplied by; None is head_width ** -0.5.
        attention_softcap: The bound c of attention's logits, c * tanh(x / c) (Gemma 2).
        mlp_bias: Of all of the MLP's matrices.
        embedding_scale: What embeddings are multiplied by.
        logit_scale: What logits are multiplied by.
        logit_softcap: As attention's, of the logits.
    """

    vocabulary: int
    layers: int
    width: int
    neurons: int
    query_heads: int
    key_value_heads: int
    head_width: int
    max_positions: int
    experts: int = 0
    experts_per_token: int = 0
    expert_neurons: int = 0
    shared_neurons: int = 0
    routing_sums_to_one: bool = False
    dense_layers: tuple[bool, ...] | None = None
    activation: Activation = "silu"
    gated: bool = True
    residual: Residual = "sequential"
    norm: NormKind = "rms"
    norm_epsilon: float = 1e-6
    pre_norms: bool = True
    post_norms: bool = False
    head_norm: HeadNorm | None = None
    rotary: Rotary | None = Rotary()
    position_rows: int | None = None
    position_offset: int = 0
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] | None = None
    local_rotary: Rotary | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    mlp_bias: bool = False
    embedding_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    unembedding_bias: bool = False

    def is_local(self, layer: int) -> bool:
        """Whether a layer has the sliding window and the local rotation, if there are any."""
        return self.local_layers is None or self.local_layers[layer]

    def window(self, layer: int) -> int | None:
        """How many positions a layer attends to; None for all."""
        return self.sliding_window if self.is_local(layer) else None

    def rotary_of(self, layer: int) -> Rotary | None:
        """A layer's rotation."""
        return self.local_rotary if self.local_rotary and self.is_local(layer) else self.rotary

    def routed_experts(self, layer: int) -> int:
        """How many experts of a layer read only the tokens that are routed to them; 0 for a plain MLP."""
        return 0 if self.dense_layers and self.dense_layers[layer] else self.experts

    def expert_widths(self, layer: int) -> tuple[int, ...]:
        """The neurons of each of a layer's experts, the shared one last. A plain MLP is one expert."""
        if not self.routed_experts(layer):
            return (self.neurons,)
        shared = (self.shared_neurons,) if self.shared_neurons else ()
        return (self.expert_neurons,) * self.experts + shared

    def with_first_layers(self, layers: int) -> "Architecture":
        """The architecture of the first layers alone."""
        local = self.local_layers and self.local_layers[:layers]
        dense = self.dense_layers and self.dense_layers[:layers]
        return dataclasses.replace(self, layers=layers, local_layers=local, dense_layers=dense)

    @property
    def sizes(self) -> dict[str, int]:
        """How long the axes of parameters are, by their letters; G counts the query heads of a key head."""
        sizes = {
            "V": self.vocabulary,
            "D": self.width,
            "F": self.neurons,
            "H": self.query_heads,
            "K": self.key_value_heads,
            "G": self.query_heads // self.key_value_heads,
            "C": self.head_width,
        }
        if self.experts:
            sizes |= {"E": self.experts, "I": self.expert_neurons, "J": self.shared_neurons}
        return sizes if self.position_rows is None else sizes | {"N": self.position_rows}
