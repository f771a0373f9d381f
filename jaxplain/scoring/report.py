"""What a scoring run comes to: means by simulator and layer, best explanations, and plots."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxplain.configs.scoring import BootstrapConfig
from jaxplain.scoring.bootstrap import mean_interval
from jaxplain.scoring.choice import best
from jaxplain.scoring.scoring import ScoredExplanation
from jaxplain.store.neuron_id import NeuronId, neuron_of

HEADLINE = "correlation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one simulator on one kind of explanations, averaged over neurons and signs.

    Attributes:
        explanations, neurons: How many.
        correlation: The mean over explanations, over top and random sequences; `low` to `high` is its
            interval, documents and neurons both drawn anew.
        missing: Explanations without a correlation.
        top, random: The mean correlation over those sequences alone.
    """

    split: str
    simulator: str
    provider: str
    explanations: int
    neurons: int
    correlation: float
    low: float
    high: float
    missing: int
    top: float
    random: float


def summarise(scored: Sequence[ScoredExplanation], bootstrap: BootstrapConfig) -> list[Row]:
    """A row for each split, simulator and provider, in order of the first two."""
    groups: dict[tuple[str, str, str], list[ScoredExplanation]] = defaultdict(list)
    for one in scored:
        for provider in (one.explanation.provider, "all"):
            groups[one.split, one.simulator, provider].append(one)
    rows = []
    for (split, simulator, provider), members in groups.items():
        if provider == "all" and len({one.explanation.provider for one in members}) == 1:
            continue
        whole = members[0].scores[0].sequences
        values = np.array([one.value(HEADLINE, whole) for one in members])
        low, high = mean_interval(
            np.array([one.resampled for one in members]), seed=bootstrap.seed, level=bootstrap.level
        )
        rows.append(
            Row(
                split=split,
                simulator=simulator,
                provider=provider,
                explanations=len(members),
                neurons=len({neuron_of(one.explanation) for one in members}),
                correlation=_mean(values),
                low=low,
                high=high,
                missing=int(np.isnan(values).sum()),
                top=_mean(np.array([one.value(HEADLINE, "top") for one in members])),
                random=_mean(np.array([one.value(HEADLINE, "random") for one in members])),
            )
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestChoice:
    """The best explanation of a neuron and sign: chosen on one split, `reported` on another.

    Either value is NaN where there is none; then no explanation could be chosen, or it could not be scored.
    """

    layer: int
    expert: int | None
    index: int
    sign: str
    simulator: str
    explanation: int
    text: str
    chosen_by: float
    reported: float


def best_explanations(
    scored: Sequence[ScoredExplanation], *, choose_on: str, report_on: str
) -> list[BestChoice]:
    """For every neuron, sign and simulator the explanation with the highest correlation; NaN never wins."""
    groups: dict[tuple[NeuronId, str, str], dict[int, dict[str, ScoredExplanation]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for one in scored:
        e = one.explanation
        groups[neuron_of(e), e.sign, one.simulator][e.id][one.split] = one
    found = []
    for (neuron, sign, simulator), candidates in sorted(groups.items()):
        numbers = sorted(number for number in candidates if choose_on in candidates[number])
        values = [_headline(candidates[number][choose_on]) for number in numbers]
        place = best(values)
        if place is None:
            continue
        chosen = candidates[numbers[place]]
        found.append(
            BestChoice(
                layer=neuron.layer,
                expert=neuron.expert,
                index=neuron.index,
                sign=sign,
                simulator=simulator,
                explanation=numbers[place],
                text=chosen[choose_on].explanation.text,
                chosen_by=values[place],
                reported=_headline(chosen[report_on]) if report_on in chosen else math.nan,
            )
        )
    return found


def by_layer(scored: Sequence[ScoredExplanation]) -> dict[tuple[str, str], dict[int, float]]:
    """Mean correlation per layer, for every split and simulator."""
    values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        values[one.split, one.simulator][one.explanation.layer].append(_headline(one))
    return {
        key: {layer: _mean(np.array(found)) for layer, found in sorted(layers.items())}
        for key, layers in values.items()
    }


def draw_scores(scored: Sequence[ScoredExplanation], path: Path) -> None:
    """Histograms of correlations, and their means by layer, as PNG."""
    from matplotlib.figure import Figure

    split = scored[-1].split
    kept = [one for one in scored if one.split == split]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.linspace(-1, 1, 41).tolist()
    for simulator in dict.fromkeys(one.simulator for one in kept):
        values = np.array([_headline(one) for one in kept if one.simulator == simulator])
        left.hist(values[np.isfinite(values)], bins=bins, histtype="step", label=simulator, linewidth=1.5)
        layers = by_layer(kept)[split, simulator]
        right.plot(list(layers), list(layers.values()), marker="o", markersize=3, label=simulator)
    left.set_xlabel(f"correlation of simulated and real activations ({split})")
    left.set_ylabel("explanations")
    right.set_xlabel("layer")
    right.set_ylabel("mean correlation")
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _headline(one: ScoredExplanation) -> float:
    return one.value(HEADLINE, one.scores[0].sequences)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
