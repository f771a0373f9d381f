"""Mean activation of every vocabulary token, from the sequences that a store keeps: a token table.

The stored sequences are two samples of all that were seen: the extreme ones, of which none is missing, and
the random ones. Taken as two strata, the random ones standing for all that are not extreme, they
estimate the mean without another pass and without bias towards what is extreme (the estimator of
Horvitz & Thompson, 1952). Describing neurons by such tokens goes back to the token-space
explanations of Bills et al. (2023).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxplain.configs.explanation import Sign
from jaxplain.store.reader import Exemplar, Neuron

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
    kinds = neuron.split.kinds
    extreme = neuron.exemplars(sign)
    inside = {exemplar.sequence for exemplar in extreme}
    others = [
        exemplar
        for exemplar in (neuron.exemplars("random") if "random" in kinds else [])
        if exemplar.sequence not in inside
    ]
    if neuron.expert is None:
        unseen, drawn = neuron.split.sequence_count - len(extreme), len(others)
    else:  # how many sequences have tokens for an expert is not known, but how many tokens they are is
        unseen, drawn = neuron.stats.count - _counted(extreme), _counted(others)
    weights = [1.0] * len(extreme) + [unseen / max(drawn, 1)] * len(others)
    direction = 1.0 if sign == "max" else -1.0
    return _weighted_means([*extreme, *others], weights, direction, direction * neuron.stats.mean)


def _counted(exemplars: list[Exemplar]) -> int:
    return sum(int((~np.isnan(exemplar.activations)).sum()) for exemplar in exemplars)


def _weighted_means(
    exemplars: list[Exemplar], weights: list[float], direction: float, overall: float
) -> TokenMeans:
    token_N = np.concatenate([np.zeros(0, np.int32), *(exemplar.tokens for exemplar in exemplars)])
    act_N = direction * np.concatenate([np.zeros(0), *(exemplar.activations for exemplar in exemplars)])
    weight_N = np.repeat(weights, np.array([len(exemplar.tokens) for exemplar in exemplars], np.int64))
    counted_N = ~np.isnan(act_N)
    tokens, place_N, counts = np.unique(token_N[counted_N], return_inverse=True, return_counts=True)
    total = np.bincount(place_N, weight_N[counted_N] * act_N[counted_N])
    weight = np.bincount(place_N, weight_N[counted_N])
    # What was seen once may be chance, however many unseen tokens it stands for.
    means = (counts * total / weight + _PRIOR_TOKENS * max(overall, 0.0)) / (counts + _PRIOR_TOKENS)
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
