"""What is shown of a neuron: which exemplars, from which threshold on, which tokens; and solved examples."""

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence

import numpy as np
import yaml

from jaxplain.configs.explanation import ExplainConfig, PromptConfig, Sign
from jaxplain.errors import JaxplainError
from jaxplain.explainers.excerpts import Excerpt, excerpt_of, marked_excerpt
from jaxplain.explainers.prompts import Shown, SolvedExample
from jaxplain.explainers.token_means import TokenMeans, token_means
from jaxplain.ranges import parse_range
from jaxplain.store.exemplar import Exemplar, Vocabulary
from jaxplain.store.reader import Neuron

_LEAST_HIGHLIGHTS = 3
_MARKED_THRESHOLD = 5.0  # hand-made marks from here on are highlighted; weaker ones are noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a prompt shows, and the rows of the token table that it was taken from."""

    shown: Shown
    sequences: dict[str, list[int]]


def gather(neuron: Neuron, sign: Sign, sample: int, config: ExplainConfig) -> Evidence | None:
    """What the n-th prompt about a neuron shows; None where nothing drives the neuron in that direction.

    With style highlighted_both_signs `sign` is max, and exemplars of both signs are shown.
    """
    prompt = config.prompt
    rng = np.random.default_rng(
        [config.sampling.seed, *neuron.id, sign == "min", sample * prompt.resample_exemplars]
    )
    if prompt.style in ("token_list", "activation_values"):
        return _token_evidence(neuron, sign, prompt)
    both = prompt.style == "highlighted_both_signs"
    count = int(rng.integers(*prompt.exemplar_range, endpoint=True))
    ranked = neuron.exemplars(sign)
    chosen = _choose(ranked, sign, -(-count // 2) if both else count, prompt, rng)
    sequences: dict[str, list[int]] = {sign: [e.sequence for e in chosen]}
    excerpts = [excerpt_of(e, sign).around_peak(prompt.context) for e in chosen]
    threshold = _threshold(ranked, excerpts, sign, neuron.stats.count, prompt.quantile)
    negative_threshold, counterexamples = np.inf, []
    if both:
        opposite = neuron.exemplars("min")
        chosen = _choose(opposite, "min", count // 2 or 1, prompt, rng)
        sequences["min"] = [e.sequence for e in chosen]
        negatives = [excerpt_of(e, "min").around_peak(prompt.context) for e in chosen]
        negative_threshold = _threshold(opposite, negatives, "min", neuron.stats.count, prompt.quantile)
        excerpts = _alternating(excerpts, [e.opposite() for e in negatives])
    elif prompt.style == "contrastive":
        silent = [
            (e.sequence, excerpt)
            for e in neuron.exemplars("random")
            if (excerpt := excerpt_of(e, sign)).strengths.max() < threshold
        ][: prompt.counterexamples]
        sequences["random"] = [sequence for sequence, _ in silent]
        counterexamples = [excerpt.around_peak(prompt.context) for _, excerpt in silent]
    if not excerpts:
        return None
    shown = Shown(
        excerpts=excerpts,
        threshold=float(threshold),
        negative_threshold=float(negative_threshold),
        counterexamples=counterexamples,
        scale=max(float(e.strengths.max()) for e in excerpts) or 1.0,
    )
    return Evidence(shown=shown, sequences=sequences)


def token_names(means: TokenMeans, vocabulary: Vocabulary, count: int) -> list[tuple[str, float]]:
    """The tokens with the highest means above zero, by their text, to be shown with `escape`."""
    best = zip(means.tokens[:count].tolist(), means.means[:count].tolist(), strict=True)
    return [
        (vocabulary.bytes_of(token).decode("utf-8", "surrogateescape") or f"<token {token}>", mean)
        for token, mean in best
        if mean > 0
    ]


def _token_evidence(neuron: Neuron, sign: Sign, prompt: PromptConfig) -> Evidence | None:
    tokens = token_names(token_means(neuron, sign), neuron.split.store.vocabulary, prompt.tokens)
    if not tokens:
        return None
    return Evidence(shown=Shown(tokens=tokens, scale=tokens[0][1]), sequences={})


def _choose(
    ranked: Sequence[Exemplar], sign: Sign, count: int, prompt: PromptConfig, rng: np.random.Generator
) -> list[Exemplar]:
    """Exemplars of the config's ranks, but none that does not drive the neuron in the direction of `sign`."""
    ranks = parse_range(prompt.ranks, "prompt.ranks", len(ranked))
    if ranked and not ranks:
        raise JaxplainError(
            f"prompt.ranks is {prompt.ranks!r}, but the store holds {len(ranked)} exemplars per neuron."
        )
    direction = 1 if sign == "max" else -1
    chosen = [ranked[rank] for rank in ranks if (direction * ranked[rank].activations > 0).any()]
    if prompt.permute:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return chosen[:count]


def _threshold(
    ranked: Sequence[Exemplar], shown: Sequence[Excerpt], sign: Sign, tokens: int, quantile: float
) -> float:
    """The activation that a share 1 - quantile of all tokens exceeds; infinite where nothing is positive.

    The tail is exact, since every activation above the last rank's score lies in a stored sequence. The
    share is doubled until at least 3 of the tokens shown exceed it.
    """
    activations = np.concatenate([np.zeros(0), *(e.activations for e in ranked)])
    signed = activations if sign == "max" else -activations
    descending = np.sort(signed[signed > 0])[::-1]
    if not len(descending):
        return np.inf
    place = max(round((1 - quantile) * tokens), 1)
    while True:
        threshold = descending[min(place, len(descending)) - 1]
        highlighted = sum(int((excerpt.strengths >= threshold).sum()) for excerpt in shown)
        if highlighted >= _LEAST_HIGHLIGHTS or place >= len(descending):
            return float(threshold)
        place *= 2


def _alternating(first: Sequence[Excerpt], second: Sequence[Excerpt]) -> list[Excerpt]:
    paired = [excerpt for pair in zip(first, second, strict=False) for excerpt in pair]
    return [*paired, *first[len(second) :], *second[len(first) :]]


def solved_examples(prompt: PromptConfig, *draw: int) -> list[SolvedExample]:
    """Few-shot examples in the form of a style: the first ones, or a draw that the numbers decide."""
    if prompt.few_shot == "none":
        return []
    examples = _all_solved_examples(prompt.style)
    if prompt.few_shot_count > len(examples):
        raise JaxplainError(
            f"prompt.few_shot_count is {prompt.few_shot_count}, but there are {len(examples)} examples."
        )
    order = np.arange(len(examples))
    if prompt.resample_few_shot:
        order = np.random.default_rng(draw).permutation(len(examples))
    return [examples[i] for i in order[: prompt.few_shot_count]]


@functools.cache
def _all_solved_examples(style: str) -> list[SolvedExample]:
    text = (importlib.resources.files("jaxplain.explainers") / "few_shot.yaml").read_text("utf-8")
    return [
        SolvedExample(
            shown=marked_evidence(
                entry["both_signs" if style == "highlighted_both_signs" else "excerpts"], entry["quiet"]
            ),
            explanation=entry["explanation"],
            reasoning=entry["reasoning"],
            negative_explanation=entry["negative_explanation"],
            negative_reasoning=entry["negative_reasoning"],
        )
        for entry in yaml.safe_load(text)
    ]


def marked_evidence(excerpts: Sequence[str], quiet: Sequence[str]) -> Shown:
    """What hand-marked excerpts show."""
    shown = [marked_excerpt(text) for text in excerpts]
    silent = [marked_excerpt(text) for text in quiet]
    means: dict[str, list[float]] = {}
    for excerpt in shown:
        for piece, value in zip(excerpt.pieces, excerpt.strengths.tolist(), strict=True):
            if value > 0:
                means.setdefault(piece, []).append(value)
    tokens = sorted(((p, float(np.mean(v))) for p, v in means.items()), key=lambda item: -item[1])
    return Shown(
        excerpts=shown,
        threshold=_MARKED_THRESHOLD,
        negative_threshold=_MARKED_THRESHOLD,
        counterexamples=silent,
        tokens=tokens,
    )
