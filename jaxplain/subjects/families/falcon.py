"""Falcon: attention and MLP mostly side by side, and queries fused with the key and value that they share."""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.families.attributes import (
    GENERIC,
    TRAINING,
    activation,
    only,
    query_heads,
    rotary,
    to_all,
)
from jaxplain.subjects.families.family import Family, Weight, layer_weights


def _key_heads(config: Mapping[str, Any]) -> int:
    if config["multi_query"] and not config["new_decoder_architecture"]:
        return 1
    return config["num_kv_heads"]


def _heads(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return query_heads(count, config) | {"key_value_heads": _key_heads(config)}


def _read_by_heads(value: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """An attribute that `_heads` looks at."""
    return {}


def _residual(parallel: bool, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if not parallel:
        if config["new_decoder_architecture"]:
            raise ValueError("with new_decoder_architecture only True is")
        return {"residual": "sequential"}
    two_norms = config["new_decoder_architecture"] and config["num_ln_in_parallel_attn"] in (None, 2)
    return {"residual": "parallel" if two_norms else "parallel_one_norm"}


def _norms_in_parallel(count: int | None, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if count not in (None, 1) and not (count == 2 and config["new_decoder_architecture"]):
        raise ValueError("known are 1, and 2 with new_decoder_architecture")
    return {}


def _norm(source: str, target: str, *residuals: str) -> tuple[Weight, ...]:
    return tuple(
        Weight(
            source=f"transformer.h.{{layer}}.{source}.{kind}",
            target=f"layers.{{layer}}.{target}.{parameter}",
            axes="D",
            when=("residual", residual),
        )
        for kind, parameter in (("weight", "scale_D"), ("bias", "bias_D"))
        for residual in residuals
    )


_FUSED = "(K G+1+1 C)"

FALCON = Family(
    attributes={
        "vocab_size": "vocabulary",
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "ffn_hidden_size": "neurons",
        "num_attention_heads": _heads,
        "num_kv_heads": _read_by_heads,
        "multi_query": _read_by_heads,
        "new_decoder_architecture": _read_by_heads,
        "parallel_attn": _residual,
        "num_ln_in_parallel_attn": _norms_in_parallel,
        "max_position_embeddings": "max_positions",
        "activation": activation,
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tied_embeddings",
        "bias": to_all("attention_bias", "attention_output_bias", "mlp_bias"),
        "alibi": only(False),
        "apply_residual_connection_post_layernorm": only(False),
        "rope_parameters": rotary,
    },
    ignored=GENERIC | {"hidden_dropout": TRAINING},
    fixed={"norm": "layer", "gated": False},
    weights=(
        Weight(source="transformer.word_embeddings.weight", target="embedding_VD", axes="V D"),
        Weight(source="transformer.ln_f.weight", target="head.norm.scale_D", axes="D"),
        Weight(source="transformer.ln_f.bias", target="head.norm.bias_D", axes="D"),
        Weight(source="lm_head.weight", target="head.unembedding_DV", axes="V D"),
        *layer_weights(
            "transformer.h.{layer}",
            ("self_attention.query_key_value.weight", "attention.query_DHC", f"{_FUSED} D", 0),
            ("self_attention.query_key_value.weight", "attention.key_DKC", f"{_FUSED} D", 1),
            ("self_attention.query_key_value.weight", "attention.value_DKC", f"{_FUSED} D", 2),
            ("self_attention.query_key_value.bias", "attention.query_bias_HC", _FUSED, 0),
            ("self_attention.query_key_value.bias", "attention.key_bias_KC", _FUSED, 1),
            ("self_attention.query_key_value.bias", "attention.value_bias_KC", _FUSED, 2),
            ("self_attention.dense.weight", "attention.output_HCD", "D (H C)"),
            ("self_attention.dense.bias", "attention.output_bias_D", "D"),
            ("mlp.dense_h_to_4h.weight", "mlp.up_DF", "F D"),
            ("mlp.dense_h_to_4h.bias", "mlp.up_bias_F", "F"),
            ("mlp.dense_4h_to_h.weight", "mlp.down_FD", "D F"),
            ("mlp.dense_4h_to_h.bias", "mlp.down_bias_D", "D"),
        ),
        *_norm("input_layernorm", "attention_norm", "sequential", "parallel_one_norm"),
        *_norm("post_attention_layernorm", "mlp_norm", "sequential"),
        *_norm("ln_attn", "attention_norm", "parallel"),
        *_norm("ln_mlp", "mlp_norm", "parallel"),
    ),
    ignored_tensors={"*.rotary_emb.inv_freq": "computed from the config"},
)
