"""Mean activation of every vocabulary token, from the sequences that a store keeps: a token table.

Describing neurons by such tokens goes back to the token-space explanations of Bills et al. (2023). How the
means are estimated is in `store.token_means`; here they are drawn towards the neuron's own.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxplain.configs.explanation import Sign
from jaxplain.store.reader import Neuron
from jaxplain.store.token_means import estimated_means

_PRIOR_TOKENS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMeans:
    """Mean activation by token, strongest first, counted so that the explained sign is positive.

    Attributes:
        tokens: Token ids that occur in the stored sequences, int32 [N].
        means: Estimated mean activation at that token, drawn towards the neuron's overall mean, or
            0 where that is lower, as if the token had once more been seen with that, float32 [N].
        counts: How often the token occurs in the stored sequences, int64 [N].
    """

    tokens: Int[np.ndarray, "N"]
    means: Float[np.ndarray, "N"]
    counts: Int[np.ndarray, "N"]


def token_means(neuron: Neuron, sign: Sign) -> TokenMeans:
    """Mean activations from the exemplars of a sign and the random ones, where the store has them."""
    random = neuron.exemplars("random") if "random" in neuron.split.kinds else []
    tokens, estimates, counts = estimated_means(neuron.exemplars(sign), random, neuron.split.sequence_count)
    direction = 1.0 if sign == "max" else -1.0
    overall = max(direction * neuron.stats.mean, 0.0)
    # What was seen once may be chance, however many unseen tokens it stands for.
    means = (counts * direction * estimates + _PRIOR_TOKENS * overall) / (counts + _PRIOR_TOKENS)
    order = np.lexsort((tokens, -means))
    return TokenMeans(
        tokens=tokens[order].astype(np.int32),
        means=means[order].astype(np.float32),
        counts=counts[order],
    )


def describe_tokens(names: list[str]) -> str:
    """An explanation that lists tokens, each once whatever its case and spaces."""
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(name.strip().lower() or name, f'"{name}"')
    return f"tokens such as {', '.join(distinct.values())}"
