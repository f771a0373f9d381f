"""Families of Hugging Face checkpoints, as data.

A family says what each attribute of its `config.json` means for the decoder, why the ones without
meaning are left out, and where each tensor of the checkpoint belongs. Supporting a further family
means adding an entry to `FAMILIES` (and to the decoder whatever arithmetic is new).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from jaxplain.errors import JaxplainError
from jaxplain.subjects.architecture import Activation, Architecture, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a checkpoint and the parameter that it becomes.

    `axes` spells the source's axes in the letters of the parameter, bracketing those that the
    source has flattened into one: "(H C) D" becomes `query_DHC` by splitting and transposing.
    `{layer}` in both names stands for the layer number.
    """

    source: str
    target: str
    axes: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` maps onto the decoder.

    `attributes` maps config attributes to fields of `Architecture`, by name or by a function from
    the value to several fields. `ignored` maps attributes to the reason that they do not matter here.
    """

    attributes: Mapping[str, str | Callable[[Any], Mapping[str, Any]]]
    ignored: Mapping[str, str]
    weights: tuple[Weight, ...]
    ignored_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)


_TRAINING = "only matters in training"
_GENERATION = "only matters when generating text"
_TOKENIZER = "the tokenizer's own files say this"
_STORAGE = "describes the files, not the arithmetic"

_GENERIC: Mapping[str, str] = {
    "transformers_version": _STORAGE,
    "architectures": "the model_type decides; heads are not used",
    "model_type": "selects the family",
    "_name_or_path": _STORAGE,
    "dtype": "the subject's dtype is the user's choice",
    "torch_dtype": "the subject's dtype is the user's choice",
    "return_dict": "an option of the torch classes",
    "output_hidden_states": "an option of the torch classes",
    "output_attentions": "an option of the torch classes",
    "_attn_implementation": "an option of the torch classes",
    "chunk_size_feed_forward": "an option of the torch classes; changes no result",
    "id2label": "belongs to classification heads",
    "label2id": "belongs to classification heads",
    "problem_type": "belongs to classification heads",
    "is_decoder": "every family here is a decoder",
    "is_encoder_decoder": "every family here is a decoder",
    "tokenizer_class": _TOKENIZER,
    "use_cache": _GENERATION,
    "bos_token_id": _TOKENIZER,
    "eos_token_id": _TOKENIZER,
    "pad_token_id": _TOKENIZER,
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "transformers.js_config": "belongs to another runtime",
}

_HF_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(name: str) -> Mapping[str, Any]:
    if name not in _HF_ACTIVATIONS:
        raise ValueError(f"known are {', '.join(_HF_ACTIVATIONS)}")
    return {"activation": _HF_ACTIVATIONS[name]}


def _rotary(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    values = dict(parameters)
    kind = values.pop("rope_type", "default")
    base = float(values.pop("rope_theta"))
    # Dynamic scaling changes nothing up to the model's own length, and longer windows are refused.
    known = {"default": set(), "dynamic": {"factor"}, "linear": {"factor"}} | {
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    }
    if kind not in known:
        raise ValueError(f"rope_type is {kind!r}; known are {', '.join(known)}")
    if unknown := sorted(values.keys() - known[kind]):
        raise ValueError(f"{unknown[0]} has no known meaning for rope_type {kind!r}")
    match kind:
        case "linear":
            rotary = Rotary(base=base, scaling="linear", factor=float(values["factor"]))
        case "llama3":
            rotary = Rotary(
                base=base,
                scaling="llama3",
                factor=float(values["factor"]),
                low_frequency_factor=float(values["low_freq_factor"]),
                high_frequency_factor=float(values["high_freq_factor"]),
                original_max_positions=int(values["original_max_position_embeddings"]),
            )
        case _:
            rotary = Rotary(base=base)
    return {"rotary": rotary}


_LLAMA_ATTRIBUTES: Mapping[str, str | Callable[[Any], Mapping[str, Any]]] = {
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
    "hidden_act": _activation,
    "rope_parameters": _rotary,
}

_LLAMA_WEIGHTS = (
    Weight(source="model.embed_tokens.weight", target="embedding_VD", axes="V D"),
    *(
        Weight(
            source=f"model.layers.{{layer}}.{source}",
            target=f"layers.{{layer}}.{target}",
            axes=axes,
        )
        for source, target, axes in (
            ("input_layernorm.weight", "attention_norm.scale_D", "D"),
            ("self_attn.q_proj.weight", "attention.query_DHC", "(H C) D"),
            ("self_attn.k_proj.weight", "attention.key_DKC", "(K C) D"),
            ("self_attn.v_proj.weight", "attention.value_DKC", "(K C) D"),
            ("self_attn.o_proj.weight", "attention.output_HCD", "D (H C)"),
            ("self_attn.q_proj.bias", "attention.query_bias_HC", "(H C)"),
            ("self_attn.k_proj.bias", "attention.key_bias_KC", "(K C)"),
            ("self_attn.v_proj.bias", "attention.value_bias_KC", "(K C)"),
            ("self_attn.o_proj.bias", "attention.output_bias_D", "D"),
            ("post_attention_layernorm.weight", "mlp_norm.scale_D", "D"),
            ("mlp.gate_proj.weight", "mlp.gate_DF", "F D"),
            ("mlp.up_proj.weight", "mlp.up_DF", "F D"),
            ("mlp.down_proj.weight", "mlp.down_FD", "D F"),
            ("mlp.gate_proj.bias", "mlp.gate_bias_F", "F"),
            ("mlp.up_proj.bias", "mlp.up_bias_F", "F"),
            ("mlp.down_proj.bias", "mlp.down_bias_D", "D"),
        )
    ),
    Weight(source="model.norm.weight", target="head.norm.scale_D", axes="D"),
    Weight(source="lm_head.weight", target="head.unembedding_DV", axes="V D"),
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        attributes=_LLAMA_ATTRIBUTES | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        ignored=_GENERIC
        | {
            "pretraining_tp": "sums the same products in another order",
            "is_llama_config": _STORAGE,
            "rope_interleaved": "SmolLM2's training code wrote it; transformers ignores it",
        },
        weights=_LLAMA_WEIGHTS,
        ignored_tensors={"*.rotary_emb.inv_freq": "computed from the config"},
    ),
    "mistral": Family(
        attributes=_LLAMA_ATTRIBUTES | {"sliding_window": "sliding_window"},
        ignored=_GENERIC,
        weights=_LLAMA_WEIGHTS,
    ),
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The decoder's architecture for a Hugging Face config.

    Raises JaxplainError for a family, an attribute or a value that is not supported, naming it.
    """
    family = family_of(config)
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in family.ignored:
            continue
        if name not in family.attributes:
            raise JaxplainError(
                f"config attribute {name} = {value!r} of a {config.model_type} model has no known "
                "meaning here; loading it would risk wrong activations, so use another checkpoint "
                "or teach jaxplain/subjects/families.py the attribute."
            )
        meaning = family.attributes[name]
        try:
            fields |= {meaning: value} if isinstance(meaning, str) else meaning(value)
        except ValueError as error:
            raise JaxplainError(
                f"config attribute {name} = {value!r} of a {config.model_type} model is not "
                f"supported: {error}."
            ) from error
    return Architecture(**fields)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config's model_type; JaxplainError where there is none."""
    if config.model_type not in FAMILIES:
        raise JaxplainError(
            f"the subject's architecture {config.model_type!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]
