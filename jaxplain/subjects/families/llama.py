"""Llama and the families that differ from it in little."""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.families.attributes import (
    GENERIC,
    LAYER_TYPES,
    STORAGE,
    TRAINING,
    activation,
    layer_types,
    only,
    partial_rotary,
    query_heads,
    rotary,
    rotary_of,
    to_all,
)
from jaxplain.subjects.families.family import Family, Meaning, Weight, layer_weights

LLAMA_ATTRIBUTES: dict[str, Meaning] = {
    "vocab_size": "vocabulary",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "neurons",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "key_value_heads",
    "head_dim": "head_width",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_embeddings",
    "hidden_act": activation,
    "rope_parameters": rotary,
}

BOTH_BIASES = to_all("attention_bias", "attention_output_bias")
WITHOUT_HEAD_WIDTH = LLAMA_ATTRIBUTES | {
    "num_attention_heads": query_heads,
    "head_dim": lambda width, config: {"head_width": width} if width else {},
}

EMBEDDING = Weight(source="model.embed_tokens.weight", target="embedding_VD", axes="V D")
FINAL_NORM = Weight(source="model.norm.weight", target="head.norm.scale_D", axes="D")
UNEMBEDDING = Weight(source="lm_head.weight", target="head.unembedding_DV", axes="V D")
ATTENTION = layer_weights(
    "model.layers.{layer}.self_attn",
    ("q_proj.weight", "attention.query_DHC", "(H C) D"),
    ("k_proj.weight", "attention.key_DKC", "(K C) D"),
    ("v_proj.weight", "attention.value_DKC", "(K C) D"),
    ("o_proj.weight", "attention.output_HCD", "D (H C)"),
    ("q_proj.bias", "attention.query_bias_HC", "(H C)"),
    ("k_proj.bias", "attention.key_bias_KC", "(K C)"),
    ("v_proj.bias", "attention.value_bias_KC", "(K C)"),
    ("o_proj.bias", "attention.output_bias_D", "D"),
)
MLP = layer_weights(
    "model.layers.{layer}.mlp",
    ("gate_proj.weight", "mlp.gate_DF", "F D"),
    ("up_proj.weight", "mlp.up_DF", "F D"),
    ("down_proj.weight", "mlp.down_FD", "D F"),
    ("gate_proj.bias", "mlp.gate_bias_F", "F"),
    ("up_proj.bias", "mlp.up_bias_F", "F"),
    ("down_proj.bias", "mlp.down_bias_D", "D"),
)
SHARED_HEAD_NORMS = layer_weights(
    "model.layers.{layer}.self_attn",
    ("q_norm.weight", "attention.query_norm.scale_C", "C"),
    ("k_norm.weight", "attention.key_norm.scale_C", "C"),
)


def stream_norms(**targets: str) -> tuple[Weight, ...]:
    """A layer's norms of the residual stream: their name in the checkpoint, and in the decoder."""
    rows = ((f"{source}.weight", f"{target}.scale_D", "D") for source, target in targets.items())
    return layer_weights("model.layers.{layer}", *rows)


PRE_NORMS = stream_norms(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
_LLAMA_WEIGHTS = (EMBEDDING, *ATTENTION, *PRE_NORMS, *MLP, FINAL_NORM, UNEMBEDDING)

LLAMA = Family(
    attributes=LLAMA_ATTRIBUTES | {"attention_bias": BOTH_BIASES, "mlp_bias": "mlp_bias"},
    ignored=GENERIC
    | {
        "pretraining_tp": "sums the same products in another order",
        "is_llama_config": STORAGE,
        "rope_interleaved": "SmolLM2's training code wrote it; transformers ignores it",
    },
    weights=_LLAMA_WEIGHTS,
    ignored_tensors={"*.rotary_emb.inv_freq": "computed from the config"},
)

MISTRAL = Family(
    attributes=LLAMA_ATTRIBUTES | {"sliding_window": "sliding_window"},
    ignored=GENERIC,
    weights=_LLAMA_WEIGHTS,
)

_QWEN_ATTRIBUTES = {
    "sliding_window": "sliding_window",
    "layer_types": layer_types,
    "use_mrope": only(False),
}
QWEN_IGNORED = GENERIC | {"use_sliding_window": LAYER_TYPES, "max_window_layers": LAYER_TYPES}

QWEN2 = Family(
    attributes=WITHOUT_HEAD_WIDTH | _QWEN_ATTRIBUTES,
    ignored=QWEN_IGNORED,
    fixed={"attention_bias": True},
    weights=_LLAMA_WEIGHTS,
)

QWEN3 = Family(
    attributes=LLAMA_ATTRIBUTES | _QWEN_ATTRIBUTES | {"attention_bias": BOTH_BIASES},
    ignored=QWEN_IGNORED,
    fixed={"head_norm": "shared"},
    weights=(*_LLAMA_WEIGHTS, *SHARED_HEAD_NORMS),
)

OLMO2 = Family(
    attributes=WITHOUT_HEAD_WIDTH | {"attention_bias": BOTH_BIASES},
    ignored=GENERIC,
    fixed={"head_norm": "joint", "pre_norms": False, "post_norms": True},
    weights=(
        EMBEDDING,
        *ATTENTION,
        *layer_weights(
            "model.layers.{layer}.self_attn",
            ("q_norm.weight", "attention.query_norm.scale_HC", "(H C)"),
            ("k_norm.weight", "attention.key_norm.scale_KC", "(K C)"),
        ),
        *stream_norms(
            post_attention_layernorm="attention_post_norm", post_feedforward_layernorm="mlp_post_norm"
        ),
        *MLP,
        FINAL_NORM,
        UNEMBEDDING,
    ),
)

PHI3 = Family(
    attributes=WITHOUT_HEAD_WIDTH
    | {
        "rope_parameters": partial_rotary,
        "sliding_window": "sliding_window",
        "attention_bias": only(False),
        "mlp_bias": only(False),
        "lm_head_bias": only(False),
    },
    ignored=GENERIC
    | {
        "resid_pdrop": TRAINING,
        "embd_pdrop": TRAINING,
        "original_max_position_embeddings": "only matters for rope_type 'longrope', which is refused",
        "partial_rotary_factor": "transformers has put it into rope_parameters",
    },
    weights=(
        EMBEDDING,
        *layer_weights(
            "model.layers.{layer}",
            ("self_attn.qkv_proj.weight", "attention.query_DHC", "(H+K+K C) D", 0),
            ("self_attn.qkv_proj.weight", "attention.key_DKC", "(H+K+K C) D", 1),
            ("self_attn.qkv_proj.weight", "attention.value_DKC", "(H+K+K C) D", 2),
            ("self_attn.o_proj.weight", "attention.output_HCD", "D (H C)"),
            ("mlp.gate_up_proj.weight", "mlp.gate_DF", "F+F D", 0),
            ("mlp.gate_up_proj.weight", "mlp.up_DF", "F+F D", 1),
            ("mlp.down_proj.weight", "mlp.down_FD", "D F"),
        ),
        *PRE_NORMS,
        FINAL_NORM,
        UNEMBEDDING,
    ),
)


def _cohere_rotary(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"rotary": rotary_of(parameters, interleaved=True)}


COHERE = Family(
    attributes={name: meaning for name, meaning in WITHOUT_HEAD_WIDTH.items() if name != "rms_norm_eps"}
    | {
        "layer_norm_eps": "norm_epsilon",
        "rope_parameters": _cohere_rotary,
        "attention_bias": BOTH_BIASES,
        "use_qk_norm": lambda used, config: {"head_norm": "per_head" if used else None},
        "logit_scale": "logit_scale",
    },
    ignored=GENERIC | {"pretraining_tp": "sums the same products in another order"},
    fixed={"norm": "layer_without_bias", "residual": "parallel_one_norm"},
    weights=(
        EMBEDDING,
        *ATTENTION,
        *layer_weights(
            "model.layers.{layer}.self_attn",
            ("q_norm.weight", "attention.query_norm.scale_HC", "H C"),
            ("k_norm.weight", "attention.key_norm.scale_KC", "K C"),
        ),
        *stream_norms(input_layernorm="attention_norm"),
        *MLP,
        FINAL_NORM,
        UNEMBEDDING,
    ),
)
