"""Real against simulated activations of single sequences, as coloured tokens."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxplain.simulators.simulation import LEVELS
from jaxplain.store.exemplar import Vocabulary
from jaxplain.store.neuron_id import NeuronId

_STRONGEST = (217, 95, 2)  # a deep orange, which colour-blind people tell from white too
_NONE = "#dddddd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Tokens with a CSS colour each, by one simulator or as they really are."""

    name: str
    cells: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A sequence with its real activations, and below them those of every simulator."""

    neuron: NeuronId
    sign: str
    explanation: str
    lines: Sequence[Line]


def strip_lines(
    vocabulary: Vocabulary,
    tokens: Int[np.ndarray, "T"],
    truth: Float[np.ndarray, "T"],
    simulated: Mapping[str, Float[np.ndarray, "T"]],
) -> list[Line]:
    """A line of the real activations, coloured by the strongest of them, and one by each simulator."""
    texts = [text.replace("\n", "⏎") for text in vocabulary.strings(tokens)]
    strongest = np.nanmax(truth, initial=0.0)
    shares = {"real": truth / strongest if strongest > 0 else np.zeros_like(truth)}
    shares |= {name: levels / (LEVELS - 1) for name, levels in simulated.items()}
    return [
        Line(
            name=name,
            cells=[(text, colour(share)) for text, share in zip(texts, values.tolist(), strict=True)],
        )
        for name, values in shares.items()
    ]


def colour(share: float) -> str:
    """A CSS colour from white for 0 to deep orange for 1; grey for what is not a number."""
    if not np.isfinite(share):
        return _NONE
    clipped = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(255 - clipped * (255 - end)):02x}" for end in _STRONGEST)
