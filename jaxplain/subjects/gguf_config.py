"""A GGUF file's metadata as the attributes of a Hugging Face config, which the families' tables read."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError
from jaxplain.subjects.gguf import ARCHITECTURES, GGUFFile

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
_OPTIONAL = {
    "attention.head_count_kv": lambda config: config["num_attention_heads"],
    "rope.freq_base": lambda config: 10000.0,
}
"""What llama.cpp takes where a file does not say."""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.attn_factor": (1.0,),
}
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_IGNORED = {
    "vocab_size": "the embedding's rows count",
    "tensor_data_layout": "all files of the architecture have the same",
    "rope.scaling.factor": "read with the type",
    "rope.scaling.original_context_length": "matters to types of scaling that are refused",
    "rope.scaling.finetuned": "describes the training",
}
_BIASES: Mapping[str, Mapping[str, str]] = {
    "llama": {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
    "qwen2": {},
    "qwen3": {"attention_bias": "attn_q.bias"},
}
"""Attributes that say whether there are biases, and a tensor of the first layer that is there if so."""

_LOW, _HIGH = 1.0, 4.0  # the low_freq_factor and high_freq_factor of every Llama 3.x


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The attributes, as config.json would hold them.

    Raises JaxplainError for a key of the architecture that is missing, not known, or has a value that is
    not supported.
    """
    architecture = file.architecture
    prefix = f"{architecture}."
    stated = {
        key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)
    }
    known = {*_SIZES, *_NUMBERS, *_ONLY, *_HEAD_WIDTHS, *_IGNORED}
    for key, value in stated.items():
        if key not in known:
            raise _refused(file, key, value, "has no known meaning here")
        if key in _ONLY and value not in _ONLY[key]:
            known_values = " or ".join(map(repr, _ONLY[key]))
            raise _refused(file, key, value, f"is not supported, only {known_values}")
        if key in _SIZES and not isinstance(value, int):
            raise _refused(file, key, value, "is not the same in every layer")
    config: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": _rows(file, "token_embd.weight"),
    }
    for key, name in (_SIZES | _NUMBERS).items():
        if key not in stated and key not in _OPTIONAL:
            raise JaxplainError(f"{file.path.name} lacks {prefix}{key} in its metadata; fetch it again.")
        config[name] = stated[key] if key in stated else _OPTIONAL[key](config)
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 12)  # what the nearest float32 was meant to be
    width = stated.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    for key in _HEAD_WIDTHS:
        if stated.get(key, width) != width:
            raise _refused(file, key, stated[key], f"is not the {width} coordinates of a head")
    config |= {
        "head_dim": width,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    config |= {name: f"blk.0.{tensor}" in file.tensors for name, tensor in _BIASES[architecture].items()}
    if scaling := _rope_scaling(file, stated, width, config["rope_theta"]):
        config["rope_scaling"] = scaling
    return config


def _refused(file: GGUFFile, key: str, value: Any, why: str) -> JaxplainError:
    return JaxplainError(
        f"the metadata {file.architecture}.{key} = {value!r} of {file.path.name} {why}; loading it would "
        "risk wrong activations, so use the model's Hugging Face folder."
    )


def _rows(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise JaxplainError(f"{file.path.name} lacks the tensor {name}; fetch it again.")
    return int(file.tensors[name].shape[-1])


def _rope_scaling(
    file: GGUFFile, stated: Mapping[str, Any], width: int, theta: float
) -> dict[str, Any] | None:
    linear = stated.get("rope.scaling.type", "none") == "linear"
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return {"rope_type": "linear", "factor": stated["rope.scaling.factor"]} if linear else None
    scaling = llama3_scaling(np.asarray(factors.data, np.float64), width, theta)
    if scaling is None or linear:
        raise JaxplainError(
            f"the tensor rope_freqs.weight of {file.path.name} holds other factors than Llama 3's scaling "
            "gives; use the model's Hugging Face folder."
        )
    return scaling


def llama3_scaling(factors: np.ndarray, width: int, theta: float) -> dict[str, Any] | None:
    """What gives these divisors of a head's frequencies, which are all that llama.cpp keeps of it.

    None where Llama 3's scaling, with the two frequency factors that it always had, does not.
    """
    if factors.shape != (width // 2,):
        return None
    turns = theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)  # per token
    factor = factors.max()
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones_like(factors)
    blended = (kept > 1e-6) & (kept < 1 - 1e-6)
    if blended.any():
        length = round(float(np.median((_LOW + (_HIGH - _LOW) * kept[blended]) / turns[blended])))
    else:  # then any length that leaves the same frequencies alone does
        length = math.ceil(max(_HIGH / turns[kept > 0.5], default=1.0))
    again = np.clip((length * turns - _LOW) / (_HIGH - _LOW), 0, 1)
    if not np.allclose(1 / (again + (1 - again) / factor), factors, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": length,
    }
