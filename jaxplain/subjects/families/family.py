"""What a family of checkpoints is made of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Meaning = str | Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
"""A field of `Architecture`, or a function from an attribute's value and the whole config to fields of it,
which raises ValueError for a value that is not supported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a checkpoint, or a part of one, and the parameter that it becomes.

    `axes` spells the source's axes in the letters of the parameter, bracketing those that the source has
    flattened into one: "(H C) D" becomes `query_DHC` by splitting and transposing. Where the source puts
    several parameters one after the other along an axis, their letters (or 1) are joined by plus signs, and
    `part` says which of them this is: in "(H+K+K C) D" part 1 becomes `key_DKC`. "K G" stands for H, the
    heads in groups that share a key head. `{layer}` in both names stands for the layer number. Where the
    source has `{expert}` there is a tensor for each expert, that expert's part of the parameter's axis E;
    `expert` is its number, once that is put in.

    `when` names a field of the architecture and the value that it must have for there to be such a tensor.
    """

    source: str
    target: str
    axes: str
    part: int = 0
    when: tuple[str, Any] | None = None
    expert: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` maps onto the decoder.

    Attributes:
        attributes: What config attributes mean.
        ignored: Config attributes that do not matter here, with the reason.
        fixed: Fields of `Architecture` that the family's checkpoints have in common.
        weights: The checkpoints' tensors.
        other_weights: Tensors that some checkpoints have in place of those with the same targets.
        ignored_tensors: Patterns of tensors that do not matter, with the reason.
        older_names: Patterns of what tensors are called in some checkpoints, and the replacements (as of
            `re.sub`) that make of it what `weights` calls them.
    """

    attributes: Mapping[str, Meaning]
    ignored: Mapping[str, str]
    weights: tuple[Weight, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    older_names: tuple[tuple[str, str], ...] = ()
    other_weights: tuple[Weight, ...] = ()


def layer_weights(source: str, *rows: tuple[str, str, str] | tuple[str, str, str, int]) -> tuple[Weight, ...]:
    """Weights of every layer: rows of source, target, axes and perhaps part, `source` before all sources."""
    return tuple(
        Weight(source=f"{source}.{row[0]}", target=f"layers.{{layer}}.{row[1]}", axes=row[2], part=part)
        for row in rows
        for part in (row[3] if len(row) == 4 else 0,)
    )
