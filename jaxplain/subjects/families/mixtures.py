"""Families whose layers are mixtures of experts.

Published checkpoints have a tensor for every expert. transformers joins them in memory, and writes them so
where it is told not to keep the original format; both are read.
"""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.families.attributes import (
    GENERIC,
    LAYER_TYPES,
    TRAINING,
    layer_types,
    to_all,
)
from jaxplain.subjects.families.family import Family, Meaning, Weight, layer_weights
from jaxplain.subjects.families.llama import (
    ATTENTION,
    BOTH_BIASES,
    EMBEDDING,
    FINAL_NORM,
    MLP,
    PRE_NORMS,
    SHARED_HEAD_NORMS,
    UNEMBEDDING,
    WITHOUT_HEAD_WIDTH,
)


def _experts_per_token(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts and not 1 <= count <= experts:
        raise ValueError(f"there are {experts} experts")
    return {"experts_per_token": count}


def _at_least_one(field: str) -> Meaning:
    def check(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if count < 1:
            raise ValueError("only 1 or more are")
        return {field: count}

    return check


def _dense_layers(step: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every `step`th layer is a mixture, but for those that are listed as plain."""
    if step < 1:
        raise ValueError("only 1 or more are")
    plain = config.get("mlp_only_layers") or []
    layers = range(config["num_hidden_layers"])
    return {"dense_layers": tuple(layer in plain or (layer + 1) % step != 0 for layer in layers)}


def _experts(source: str, gate: str, up: str, down: str) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """A layer's router and experts by the names of their matrices, and the experts all in one tensor."""
    single = layer_weights(
        source,
        ("gate.weight", "mlp.router_DE", "E D"),
        (f"experts.{{expert}}.{gate}.weight", "mlp.gate_DEI", "I D"),
        (f"experts.{{expert}}.{up}.weight", "mlp.up_DEI", "I D"),
        (f"experts.{{expert}}.{down}.weight", "mlp.down_EID", "D I"),
    )
    joined = layer_weights(
        source,
        ("experts.gate_up_proj", "mlp.gate_DEI", "E I+I D", 0),
        ("experts.gate_up_proj", "mlp.up_DEI", "E I+I D", 1),
        ("experts.down_proj", "mlp.down_EID", "E D I"),
    )
    return single, joined


_TRAINED = {"router_aux_loss_coef": TRAINING, "output_router_logits": "an option of the torch classes"}
_AROUND = (EMBEDDING, *ATTENTION, *PRE_NORMS, FINAL_NORM, UNEMBEDDING)

_MIXTRAL_EXPERTS, _MIXTRAL_JOINED = _experts("model.layers.{layer}.block_sparse_moe", "w1", "w3", "w2")

MIXTRAL = Family(
    attributes=WITHOUT_HEAD_WIDTH
    | {
        "intermediate_size": to_all("neurons", "expert_neurons"),
        "num_local_experts": _at_least_one("experts"),
        "num_experts_per_tok": _experts_per_token,
        "sliding_window": "sliding_window",
    },
    ignored=GENERIC | _TRAINED | {"router_jitter_noise": TRAINING},
    fixed={"routing_sums_to_one": True},
    weights=(*_AROUND, *_MIXTRAL_EXPERTS),
    other_weights=_MIXTRAL_JOINED,
    older_names=((r"\.mlp\.", ".block_sparse_moe."),),
)

_QWEN_EXPERTS, _QWEN_JOINED = _experts("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj")
_QWEN_ATTRIBUTES: Mapping[str, Meaning] = WITHOUT_HEAD_WIDTH | {
    "moe_intermediate_size": "expert_neurons",
    "num_experts": "experts",
    "num_experts_per_tok": _experts_per_token,
    "norm_topk_prob": "routing_sums_to_one",
    "decoder_sparse_step": _dense_layers,
    "mlp_only_layers": lambda layers, config: {},  # read with decoder_sparse_step
    "sliding_window": "sliding_window",
}

QWEN2_MOE = Family(
    attributes=_QWEN_ATTRIBUTES
    | {
        "shared_expert_intermediate_size": _at_least_one("shared_neurons"),
        "qkv_bias": "attention_bias",
        "layer_types": layer_types,
    },
    ignored=GENERIC | _TRAINED | {"use_sliding_window": LAYER_TYPES, "max_window_layers": LAYER_TYPES},
    weights=(
        *_AROUND,
        *MLP,
        *_QWEN_EXPERTS,
        *layer_weights(
            "model.layers.{layer}.mlp",
            ("shared_expert_gate.weight", "mlp.shared_router_D", "1 D"),
            ("shared_expert.gate_proj.weight", "mlp.shared_gate_DJ", "J D"),
            ("shared_expert.up_proj.weight", "mlp.shared_up_DJ", "J D"),
            ("shared_expert.down_proj.weight", "mlp.shared_down_JD", "D J"),
        ),
    ),
    other_weights=_QWEN_JOINED,
)

QWEN3_MOE = Family(
    attributes=_QWEN_ATTRIBUTES | {"num_local_experts": "experts", "attention_bias": BOTH_BIASES},
    ignored=GENERIC
    | _TRAINED
    | {
        "use_sliding_window": "transformers leaves sliding_window out where this is false",
        "max_window_layers": "transformers gives every layer the window, or none",
    },
    fixed={"head_norm": "shared"},
    weights=(*_AROUND, *MLP, *_QWEN_EXPERTS, *SHARED_HEAD_NORMS),
    other_weights=_QWEN_JOINED,
)
