"""Families of Hugging Face checkpoints, as data.

A family says what each attribute of its `config.json` means for the decoder, why the ones without
meaning are left out, and where each tensor of the checkpoint belongs. Supporting a further family
means adding an entry to `FAMILIES` (and to the decoder whatever arithmetic is new).
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from jaxplain.errors import JaxplainError
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.families.falcon import FALCON
from jaxplain.subjects.families.family import Family, Weight
from jaxplain.subjects.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from jaxplain.subjects.families.gpt import GPT2, GPT_NEOX, GPTJ, OPT
from jaxplain.subjects.families.llama import COHERE, LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from jaxplain.subjects.families.mixtures import MIXTRAL, QWEN2_MOE, QWEN3_MOE

__all__ = ["FAMILIES", "Family", "Weight", "architecture_of", "family_of"]

FAMILIES: Mapping[str, Family] = {
    "cohere": COHERE,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The decoder's architecture for a Hugging Face config.

    Raises JaxplainError for a family, an attribute or a value that is not supported, naming it.
    """
    family = family_of(config)
    fields: dict[str, Any] = dict(family.fixed)
    attributes = config.to_dict()
    for name, value in attributes.items():
        if name in family.ignored:
            continue
        if name not in family.attributes:
            raise JaxplainError(
                f"config attribute {name} = {value!r} of a {config.model_type} model has no known "
                "meaning here; loading it would risk wrong activations, so use another checkpoint "
                "or teach jaxplain/subjects/families the attribute."
            )
        meaning = family.attributes[name]
        try:
            fields |= {meaning: value} if isinstance(meaning, str) else meaning(value, attributes)
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
