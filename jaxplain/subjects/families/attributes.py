"""What config attributes that several families share mean, and which of them never matter."""

from collections.abc import Mapping
from typing import Any

from jaxplain.subjects.architecture import Activation, Rotary
from jaxplain.subjects.families.family import Meaning

TRAINING = "only matters in training"
GENERATION = "only matters when generating text"
TOKENIZER = "the tokenizer's own files say this"
STORAGE = "describes the files, not the arithmetic"
CLASSIFICATION = "belongs to classification heads"
LAYER_TYPES = "transformers has put it into layer_types"

GENERIC: dict[str, str] = {
    "transformers_version": STORAGE,
    "architectures": "the model_type decides; heads are not used",
    "model_type": "selects the family",
    "_name_or_path": STORAGE,
    "auto_map": "code that comes with a checkpoint is never run",
    "dtype": "the subject's dtype is the user's choice",
    "torch_dtype": "the subject's dtype is the user's choice",
    "return_dict": "an option of the torch classes",
    "output_hidden_states": "an option of the torch classes",
    "output_attentions": "an option of the torch classes",
    "_attn_implementation": "an option of the torch classes",
    "chunk_size_feed_forward": "an option of the torch classes; changes no result",
    "id2label": CLASSIFICATION,
    "label2id": CLASSIFICATION,
    "problem_type": CLASSIFICATION,
    "is_decoder": "every family here is a decoder",
    "is_encoder_decoder": "every family here is a decoder",
    "tokenizer_class": TOKENIZER,
    "model_max_length": TOKENIZER,
    "use_cache": GENERATION,
    "cache_implementation": GENERATION,
    "task_specific_params": GENERATION,
    "bos_token_id": TOKENIZER,
    "eos_token_id": TOKENIZER,
    "pad_token_id": TOKENIZER,
    "initializer_range": TRAINING,
    "attention_dropout": TRAINING,
    "gradient_checkpointing": TRAINING,
    "transformers.js_config": "belongs to another runtime",
}

_HF_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_ROPE_TYPES: Mapping[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor"},  # changes nothing up to the model's own length, and longer windows are refused
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def only(*values: Any) -> Meaning:
    """An attribute that may have these values alone, which all mean the same."""

    def check(value: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if value not in values:
            raise ValueError(f"only {values[0]!r} is")
        return {}

    return check


def to_all(*fields: str) -> Meaning:
    """An attribute that is the value of several fields."""
    return lambda value, config: dict.fromkeys(fields, value)


def activation(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name of an activation function."""
    if name not in _HF_ACTIVATIONS:
        raise ValueError(f"known are {', '.join(_HF_ACTIVATIONS)}")
    return {"activation": _HF_ACTIVATIONS[name]}


def head_width(config: Mapping[str, Any]) -> int:
    """The width of a head; where none is given, heads divide the model's width among them."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def query_heads(count: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of query heads, in a config that need not give their width."""
    return {"query_heads": count, "head_width": head_width(config)}


def layer_types(types: list[str], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which layers attend within the sliding window."""
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{min(unknown)!r} is no known type of layer")
    return {"local_layers": tuple(kind == "sliding_attention" for kind in types)}


def rotary(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotation of whole heads."""
    return {"rotary": rotary_of(parameters)}


def partial_rotary(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotation of a share of each head's coordinates."""
    parameters = dict(parameters)
    coordinates = int(head_width(config) * parameters.pop("partial_rotary_factor", 1.0))
    return {"rotary": rotary_of(parameters, coordinates=coordinates)}


def rotary_of(parameters: Mapping[str, Any], **others: Any) -> Rotary:
    """What transformers calls rope parameters, with the `others` of `Rotary`'s fields."""
    values = dict(parameters)
    kind = values.pop("rope_type", "default")
    base = float(values.pop("rope_theta"))
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; known are {', '.join(_ROPE_TYPES)}")
    if unknown := sorted(values.keys() - _ROPE_TYPES[kind]):
        raise ValueError(f"{unknown[0]} has no known meaning for rope_type {kind!r}")
    match kind:
        case "linear":
            return Rotary(base=base, scaling="linear", factor=float(values["factor"]), **others)
        case "llama3":
            return Rotary(
                base=base,
                scaling="llama3",
                factor=float(values["factor"]),
                low_frequency_factor=float(values["low_freq_factor"]),
                high_frequency_factor=float(values["high_freq_factor"]),
                original_max_positions=int(values["original_max_position_embeddings"]),
                **others,
            )
        case _:
            return Rotary(base=base, **others)
