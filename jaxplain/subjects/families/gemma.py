"""Gemma's families: embeddings scaled by the root of the width, norms whose scale is one plus the tensor."""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.families.attributes import (
    GENERIC,
    LAYER_TYPES,
    activation,
    layer_types,
    only,
    rotary_of,
    to_all,
)
from jaxplain.subjects.families.family import Family
from jaxplain.subjects.families.llama import (
    ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    LLAMA_ATTRIBUTES,
    MLP,
    SHARED_HEAD_NORMS,
    UNEMBEDDING,
    stream_norms,
)


def _width(width: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"width": width, "embedding_scale": width**0.5}


def _local_and_global_rotary(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := parameters.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{min(unknown)!r} is no known type of layer")
    return {
        "rotary": rotary_of(parameters["full_attention"]),
        "local_rotary": rotary_of(parameters["sliding_attention"]),
    }


_ATTRIBUTES = LLAMA_ATTRIBUTES | {
    "hidden_size": _width,
    "attention_bias": to_all("attention_bias", "attention_output_bias"),
    "use_bidirectional_attention": only(False, None),
}
_LATER_ATTRIBUTES = {name: meaning for name, meaning in _ATTRIBUTES.items() if name != "hidden_act"} | {
    "hidden_activation": activation,
    "query_pre_attn_scalar": lambda scalar, config: {"attention_scale": scalar**-0.5},
    "sliding_window": "sliding_window",
    "layer_types": layer_types,
    "final_logit_softcapping": "logit_softcap",
}
_LATER_IGNORED = GENERIC | {
    "hidden_act": "hidden_activation is read instead",
    "sliding_window_pattern": LAYER_TYPES,
    "_sliding_window_pattern": LAYER_TYPES,
}
_FIXED = {"norm": "rms_one_plus"}
_LATER_WEIGHTS = (
    EMBEDDING,
    *ATTENTION,
    *stream_norms(
        input_layernorm="attention_norm",
        post_attention_layernorm="attention_post_norm",
        pre_feedforward_layernorm="mlp_norm",
        post_feedforward_layernorm="mlp_post_norm",
    ),
    *MLP,
    FINAL_NORM,
    UNEMBEDDING,
)

GEMMA = Family(
    attributes=_ATTRIBUTES | {"hidden_activation": only("gelu_pytorch_tanh", None)},
    ignored=GENERIC,
    fixed=_FIXED,
    weights=(
        EMBEDDING,
        *ATTENTION,
        *stream_norms(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm"),
        *MLP,
        FINAL_NORM,
        UNEMBEDDING,
    ),
)

GEMMA2 = Family(
    attributes=_LATER_ATTRIBUTES | {"attn_logit_softcapping": "attention_softcap"},
    ignored=_LATER_IGNORED,
    fixed=_FIXED | {"post_norms": True},
    weights=_LATER_WEIGHTS,
)

GEMMA3_TEXT = Family(
    attributes=_LATER_ATTRIBUTES
    | {"attn_logit_softcapping": only(None), "rope_parameters": _local_and_global_rotary},
    ignored=_LATER_IGNORED,
    fixed=_FIXED | {"post_norms": True, "head_norm": "shared"},
    weights=(*_LATER_WEIGHTS, *SHARED_HEAD_NORMS),
)
