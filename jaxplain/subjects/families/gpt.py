"""GPT-2 and the families with its layer norms and plain MLP."""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.architecture import Rotary
from jaxplain.subjects.families.attributes import (
    CLASSIFICATION,
    GENERATION,
    GENERIC,
    TRAINING,
    activation,
    only,
    partial_rotary,
    query_heads,
    to_all,
)
from jaxplain.subjects.families.family import Family, Weight, layer_weights

_FIXED = {"norm": "layer", "gated": False}
_ALL_BIASES = to_all("attention_bias", "attention_output_bias", "mlp_bias")
_MASKS = {
    "*.attn.bias": "the causal mask",
    "*.attn.masked_bias": "a constant of the causal mask",
    "*.attention.bias": "the causal mask",
    "*.attention.masked_bias": "a constant of the causal mask",
    "*.rotary_emb.inv_freq": "computed from the config",
}


def _norms(source: str, **targets: str) -> tuple[Weight, ...]:
    """A layer's norms with scale and bias: their name in the checkpoint, and in the decoder."""
    return layer_weights(
        source,
        *((f"{name}.weight", f"{target}.scale_D", "D") for name, target in targets.items()),
        *((f"{name}.bias", f"{target}.bias_D", "D") for name, target in targets.items()),
    )


def _ends(embedding: str, norm: str, unembedding: str = "lm_head") -> tuple[Weight, ...]:
    return (
        Weight(source=f"{embedding}.weight", target="embedding_VD", axes="V D"),
        Weight(source=f"{norm}.weight", target="head.norm.scale_D", axes="D"),
        Weight(source=f"{norm}.bias", target="head.norm.bias_D", axes="D"),
        Weight(source=f"{unembedding}.weight", target="head.unembedding_DV", axes="V D"),
    )


def _neurons(count: int | None, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"neurons": count or 4 * config["n_embd"]}


def _heads(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"query_heads": count, "key_value_heads": count, "head_width": config["n_embd"] // count}


_GPT_ATTRIBUTES = {
    "vocab_size": "vocabulary",
    "n_layer": "layers",
    "n_embd": "width",
    "n_inner": _neurons,
    "n_head": _heads,
    "activation_function": activation,
    "layer_norm_epsilon": "norm_epsilon",
    "tie_word_embeddings": "tied_embeddings",
    "scale_attn_weights": only(True),
}
_GPT_IGNORED = GENERIC | {
    "n_ctx": "n_positions is read instead",
    "resid_pdrop": TRAINING,
    "embd_pdrop": TRAINING,
    "attn_pdrop": TRAINING,
    "summary_type": CLASSIFICATION,
    "summary_use_proj": CLASSIFICATION,
    "summary_activation": CLASSIFICATION,
    "summary_proj_to_labels": CLASSIFICATION,
    "summary_first_dropout": CLASSIFICATION,
}

GPT2 = Family(
    attributes=_GPT_ATTRIBUTES
    | {
        "n_positions": to_all("max_positions", "position_rows"),
        "scale_attn_by_inverse_layer_idx": only(False),
        "add_cross_attention": only(False),
    },
    ignored=_GPT_IGNORED
    | {"reorder_and_upcast_attn": "attention's logits and sums are always in float32 here"},
    fixed=_FIXED | {"rotary": None, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    weights=(
        *_ends("transformer.wte", "transformer.ln_f"),
        Weight(source="transformer.wpe.weight", target="position_ND", axes="N D"),
        *layer_weights(
            "transformer.h.{layer}",
            ("attn.c_attn.weight", "attention.query_DHC", "D (H+K+K C)", 0),
            ("attn.c_attn.weight", "attention.key_DKC", "D (H+K+K C)", 1),
            ("attn.c_attn.weight", "attention.value_DKC", "D (H+K+K C)", 2),
            ("attn.c_attn.bias", "attention.query_bias_HC", "(H+K+K C)", 0),
            ("attn.c_attn.bias", "attention.key_bias_KC", "(H+K+K C)", 1),
            ("attn.c_attn.bias", "attention.value_bias_KC", "(H+K+K C)", 2),
            ("attn.c_proj.weight", "attention.output_HCD", "(H C) D"),
            ("attn.c_proj.bias", "attention.output_bias_D", "D"),
            ("mlp.c_fc.weight", "mlp.up_DF", "D F"),
            ("mlp.c_fc.bias", "mlp.up_bias_F", "F"),
            ("mlp.c_proj.weight", "mlp.down_FD", "F D"),
            ("mlp.c_proj.bias", "mlp.down_bias_D", "D"),
        ),
        *_norms("transformer.h.{layer}", ln_1="attention_norm", ln_2="mlp_norm"),
    ),
    ignored_tensors=_MASKS,
    older_names=((r"^(?!transformer\.|lm_head\.)", "transformer."),),
)


def _rotary_dim(coordinates: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"rotary": Rotary(coordinates=coordinates, interleaved=True)}


GPTJ = Family(
    attributes=_GPT_ATTRIBUTES
    | {"n_positions": "max_positions", "rotary_dim": _rotary_dim, "rotary": only(True)},
    ignored=_GPT_IGNORED,
    fixed=_FIXED | {"residual": "parallel_one_norm", "mlp_bias": True, "unembedding_bias": True},
    weights=(
        *_ends("transformer.wte", "transformer.ln_f"),
        Weight(source="lm_head.bias", target="head.unembedding_bias_V", axes="V"),
        *layer_weights(
            "transformer.h.{layer}",
            ("attn.q_proj.weight", "attention.query_DHC", "(H C) D"),
            ("attn.k_proj.weight", "attention.key_DKC", "(K C) D"),
            ("attn.v_proj.weight", "attention.value_DKC", "(K C) D"),
            ("attn.out_proj.weight", "attention.output_HCD", "D (H C)"),
            ("mlp.fc_in.weight", "mlp.up_DF", "F D"),
            ("mlp.fc_in.bias", "mlp.up_bias_F", "F"),
            ("mlp.fc_out.weight", "mlp.down_FD", "D F"),
            ("mlp.fc_out.bias", "mlp.down_bias_D", "D"),
        ),
        *_norms("transformer.h.{layer}", ln_1="attention_norm"),
    ),
    ignored_tensors=_MASKS,
)


def _as_many_key_heads(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return query_heads(count, config) | {"key_value_heads": count}


GPT_NEOX = Family(
    attributes={
        "vocab_size": "vocabulary",
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "intermediate_size": "neurons",
        "num_attention_heads": _as_many_key_heads,
        "max_position_embeddings": "max_positions",
        "hidden_act": activation,
        "layer_norm_eps": "norm_epsilon",
        "tie_word_embeddings": "tied_embeddings",
        "use_parallel_residual": lambda parallel, config: {
            "residual": "parallel" if parallel else "sequential"
        },
        "rope_parameters": partial_rotary,
        "attention_bias": to_all("attention_bias", "attention_output_bias"),
    },
    ignored=GENERIC | {"hidden_dropout": TRAINING, "classifier_dropout": CLASSIFICATION},
    fixed=_FIXED | {"mlp_bias": True},
    weights=(
        *_ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        *layer_weights(
            "gpt_neox.layers.{layer}",
            ("attention.query_key_value.weight", "attention.query_DHC", "(H 1+1+1 C) D", 0),
            ("attention.query_key_value.weight", "attention.key_DKC", "(K 1+1+1 C) D", 1),
            ("attention.query_key_value.weight", "attention.value_DKC", "(K 1+1+1 C) D", 2),
            ("attention.query_key_value.bias", "attention.query_bias_HC", "(H 1+1+1 C)", 0),
            ("attention.query_key_value.bias", "attention.key_bias_KC", "(K 1+1+1 C)", 1),
            ("attention.query_key_value.bias", "attention.value_bias_KC", "(K 1+1+1 C)", 2),
            ("attention.dense.weight", "attention.output_HCD", "D (H C)"),
            ("attention.dense.bias", "attention.output_bias_D", "D"),
            ("mlp.dense_h_to_4h.weight", "mlp.up_DF", "F D"),
            ("mlp.dense_h_to_4h.bias", "mlp.up_bias_F", "F"),
            ("mlp.dense_4h_to_h.weight", "mlp.down_FD", "D F"),
            ("mlp.dense_4h_to_h.bias", "mlp.down_bias_D", "D"),
        ),
        *_norms(
            "gpt_neox.layers.{layer}", input_layernorm="attention_norm", post_attention_layernorm="mlp_norm"
        ),
    ),
    ignored_tensors=_MASKS,
    older_names=((r"^lm_head\.", "embed_out."),),
)


def _opt_positions(count: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"max_positions": count, "position_rows": count + 2, "position_offset": 2}


def _as_wide_as_the_model(width: int, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if width != config["hidden_size"]:
        raise ValueError(f"only hidden_size, {config['hidden_size']}, is")
    return {}


OPT = Family(
    attributes={
        "vocab_size": "vocabulary",
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "ffn_dim": "neurons",
        "num_attention_heads": _as_many_key_heads,
        "max_position_embeddings": _opt_positions,
        "activation_function": activation,
        "tie_word_embeddings": "tied_embeddings",
        "enable_bias": _ALL_BIASES,
        "do_layer_norm_before": only(True),
        "layer_norm_elementwise_affine": only(True),
        "_remove_final_layer_norm": only(False),
        "word_embed_proj_dim": _as_wide_as_the_model,
    },
    ignored=GENERIC
    | {
        "dropout": TRAINING,
        "activation_dropout": TRAINING,
        "layerdrop": TRAINING,
        "init_std": TRAINING,
        "prefix": GENERATION,
    },
    fixed=_FIXED | {"norm_epsilon": 1e-5, "rotary": None},
    weights=(
        *_ends("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
        Weight(source="model.decoder.embed_positions.weight", target="position_ND", axes="N D"),
        *layer_weights(
            "model.decoder.layers.{layer}",
            ("self_attn.q_proj.weight", "attention.query_DHC", "(H C) D"),
            ("self_attn.k_proj.weight", "attention.key_DKC", "(K C) D"),
            ("self_attn.v_proj.weight", "attention.value_DKC", "(K C) D"),
            ("self_attn.out_proj.weight", "attention.output_HCD", "D (H C)"),
            ("self_attn.q_proj.bias", "attention.query_bias_HC", "(H C)"),
            ("self_attn.k_proj.bias", "attention.key_bias_KC", "(K C)"),
            ("self_attn.v_proj.bias", "attention.value_bias_KC", "(K C)"),
            ("self_attn.out_proj.bias", "attention.output_bias_D", "D"),
            ("fc1.weight", "mlp.up_DF", "F D"),
            ("fc1.bias", "mlp.up_bias_F", "F"),
            ("fc2.weight", "mlp.down_FD", "D F"),
            ("fc2.bias", "mlp.down_bias_D", "D"),
        ),
        *_norms(
            "model.decoder.layers.{layer}",
            self_attn_layer_norm="attention_norm",
            final_layer_norm="mlp_norm",
        ),
    ),
    older_names=((r"^decoder\.", "model.decoder."),),
)
