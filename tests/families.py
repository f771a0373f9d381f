"""Tiny models of the families beside Llama's, with every part of their arithmetic in some variant."""

import zlib

import numpy as np
from transformers import AutoConfig

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
RMS = SIZES | {"rms_norm_eps": 1e-5}
MHA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}

QWEN2 = RMS | {"model_type": "qwen2", "rope_theta": 1e6}
QWEN3 = RMS | {"model_type": "qwen3", "head_dim": 16}
OLMO2 = RMS | {"model_type": "olmo2"}
PHI3 = RMS | {"model_type": "phi3"}
GEMMA = RMS | {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 100.0,
    "rope_theta": 1e6,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 384,
    "n_embd": 32,
    "n_inner": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NEOX = MHA | {"model_type": "gpt_neox", "rotary_pct": 0.5, "layer_norm_eps": 1e-5}
GPTJ = GPT2 | {"model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False}
OPT = {name: value for name, value in MHA.items() if name != "intermediate_size"} | {
    "model_type": "opt",
    "ffn_dim": 24,
    "tie_word_embeddings": True,
}
FALCON = {name: value for name, value in MHA.items() if name != "intermediate_size"} | {
    "model_type": "falcon",
    "ffn_hidden_size": 24,
    "tie_word_embeddings": True,
    "alibi": False,
    "rope_theta": 100.0,
}
MIXTRAL = RMS | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = RMS | {
    "model_type": "qwen2_moe",
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = RMS | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 8,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
COHERE = SIZES | {"model_type": "cohere", "logit_scale": 0.25, "tie_word_embeddings": True}

VARIANTS = {
    "qwen2": QWEN2,
    "qwen2-sliding-window": QWEN2
    | {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3-biases": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "olmo2": OLMO2,
    "olmo2-mha": OLMO2 | {"num_key_value_heads": 4},
    "phi3": PHI3,
    "phi3-partial-window": PHI3 | {"partial_rotary_factor": 0.5, "sliding_window": 5},
    "gemma": GEMMA,
    "gemma-mqa": GEMMA | {"num_key_value_heads": 1, "hidden_act": "gelu"},
    "gemma2": GEMMA2,
    "gemma2-uncapped": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 4},
    "gemma3": GEMMA3,
    "gemma3-rope-linear": GEMMA3
    | {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gpt2": GPT2,
    "gpt2-wide": GPT2 | {"n_inner": None, "n_head": 2, "tie_word_embeddings": False, "n_layer": 2},
    "neox": NEOX,
    "neox-sequential": NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.25},
    "gptj": GPTJ,
    "opt": OPT,
    "opt-no-bias": OPT | {"enable_bias": False, "tie_word_embeddings": False},
    "falcon-multi-query": FALCON,
    "falcon-grouped": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-one-norm": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon-sequential": FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
    "mixtral": MIXTRAL,
    "mixtral-sliding-window": MIXTRAL
    | {"num_experts_per_tok": 3, "sliding_window": 5, "head_dim": 16, "tie_word_embeddings": True},
    "qwen2-moe": QWEN2_MOE,
    "qwen2-moe-plain-layers": QWEN2_MOE
    | {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-plain-layers": QWEN3_MOE
    | {"mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True}
    | {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    "cohere": COHERE,
    "cohere-qk-norm": COHERE | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False},
}


def tensors(config, seed=0):
    """Random weights under their Hugging Face names, each drawn by itself from its name and the seed."""
    from jaxplain.subjects.families import architecture_of, family_of
    from jaxplain.subjects.layouts import source_shape
    from jaxplain.subjects.loading import weights_of

    options = {name: value for name, value in config.items() if name != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **options)
    arch = architecture_of(hf_config)
    there = _parameters(arch)
    made = {}
    for weight in weights_of(family_of(hf_config), arch):
        if weight.target in there and weight.source not in made:
            made[weight.source] = _values(weight, source_shape(weight, arch), arch, seed)
    return made


def _values(weight, shape, arch, seed):
    values = np.random.default_rng([seed, zlib.crc32(weight.source.encode())]).standard_normal(shape)
    if "norm.scale" in weight.target:
        values = 0.2 * values + (arch.norm != "rms_one_plus")
    else:
        values = values * (0.3 if len(shape) > 1 else 0.2)
    return values.astype(np.float32)


def _parameters(arch):
    """The names of the decoder's parameters."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxplain.subjects.decoder import Decoder

    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"), with_head=True)
    )
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
