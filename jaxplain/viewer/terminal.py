"""Neurons in a terminal: excerpts with the activating tokens highlighted."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.text import Text

from jaxplain.errors import JaxplainError
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.explanations import Explanation
from jaxplain.store.neuron_id import NeuronId, neuron_of
from jaxplain.store.reader import Neuron, Store
from jaxplain.store.schema import group_of

_BACKGROUNDS = {
    1: ("#3d2b00", "#7a5500", "#b87f00", "#ffb000"),
    -1: ("#14264d", "#24458c", "#3465cc", "#5c8eff"),
}
_TOKENS_BEFORE_PEAK, _TOKENS_AFTER_PEAK = 12, 6


def print_neuron(neuron: Neuron, console: Console, *, kind: str = "max", limit: int = 5) -> None:
    """A neuron's statistics and its strongest excerpts of a kind."""
    stats = neuron.stats
    tokens = f"{stats.count:,} tokens" if stats.count else "a number of tokens that is not known"
    shared = "reads every token; " if neuron.expert is not None and neuron.is_shared else ""
    threshold = neuron.split.store.config.get("statistics", {}).get("active_above", 0.0)
    console.print(
        f"[bold]{neuron.id}[/bold] "
        f"[dim]{shared}{neuron.split.name}, {kind}; over {tokens}: mean {stats.mean:.3f}, "
        f"deviation {stats.variance**0.5:.3f}, above {threshold or 'zero'} {stats.fraction_active:.1%}[/dim]",
        highlight=False,
        soft_wrap=True,
    )
    try:
        print_explanations([e for e in neuron.explanations() if e.sign == kind], console)
    except JaxplainError as error:  # of another store, for one; the exemplars are none the worse for it
        console.print(f"[dim]no explanations: {escape(str(error))}[/dim]", highlight=False, soft_wrap=True)
    for exemplar in neuron.exemplars(kind, limit=limit):
        console.print(_excerpt(exemplar, kind, marked=console.color_system is None), soft_wrap=True)


def print_sample(store: Store, console: Console, *, neurons: int = 3, limit: int = 4) -> list[Neuron]:
    """Print a few neurons that stand out: those whose exemplars lie furthest above their own mean."""
    split = store[store.splits[0]]
    kind = "max" if "max" in split.kinds else split.kinds[0]
    console.print(f"\n[bold]{escape(repr(split))}[/bold]\n", highlight=False)
    layers = np.unique(np.linspace(0, len(split.layers) - 1, neurons + 2)[1:-1].round().astype(int))
    shown = []
    for place in layers:
        neuron = split.neuron_called(_most_peaked(store, split.name, kind, int(place)))
        print_neuron(neuron, console, kind=kind, limit=limit)
        console.print()
        shown.append(neuron)
    return shown


def print_explanations(explanations: Sequence[Explanation], console: Console) -> None:
    """Explanations, a line each."""
    arrows = {"max": "+", "min": "-"}
    for explanation in explanations:
        text = Text().append(f"  {neuron_of(explanation)} ", "bold")
        text.append(f"{arrows[explanation.sign]} ").append(_visible(explanation.text))
        console.print(text, soft_wrap=True, highlight=False)


def _most_peaked(store: Store, split: str, kind: str, place: int) -> NeuronId:
    names = (f"{group_of(kind)}/score", "stats/mean", "stats/variance")
    arrays = store[split].layer_arrays(place, *names)
    neurons, places = zip(*store[split].neurons_of(place), strict=True)
    at = tuple(np.transpose(places))
    scores_FR, mean_F, variance_F = (array[at] for array in arrays)
    # A single sequence may be a fluke; the tenth best is not.
    filled_F = np.isfinite(scores_FR).sum(axis=1)
    score_F = scores_FR[np.arange(len(scores_FR)), np.clip(filled_F - 1, 0, 9)]
    with np.errstate(invalid="ignore", divide="ignore"):
        heights_F = np.abs(score_F - mean_F) / np.sqrt(variance_F)
    return neurons[int(np.argmax(np.where(np.isfinite(heights_F), heights_F, -1)))]


def _excerpt(exemplar: Exemplar, kind: str, *, marked: bool) -> Text:
    """The tokens around the peak; the stronger the activation, the brighter the background.

    Where there are no colours, `marked` puts the peak between guillemets.
    """
    if len(exemplar.tokens) == 0:
        raise JaxplainError(f"sequence {exemplar.sequence} has no tokens; the store is damaged.")
    acts_T = exemplar.activations
    down = -np.nanmin(acts_T) > np.nanmax(acts_T) if kind == "random" else kind == "min"
    sign = -1 if down else 1
    strength_T = np.where(np.isnan(acts_T), -np.inf, sign * acts_T)
    peak = int(np.argmax(strength_T))
    text = Text().append(f"{acts_T[peak]:8.2f}  ", "bold")
    first, last = max(0, peak - _TOKENS_BEFORE_PEAK), peak + _TOKENS_AFTER_PEAK
    for i, token in enumerate(exemplar.token_strings[first:last], first):
        share = float(max(strength_T[i], 0) / strength_T[peak]) if strength_T[peak] > 0 else 0.0
        token = f"\u00ab{_visible(token)}\u00bb" if marked and i == peak else _visible(token)
        text.append(token, _shade(share, sign) if share > 0.2 else "")
    return text


def _shade(share: float, sign: int) -> Style:
    step = min(int(share * len(_BACKGROUNDS[sign])), len(_BACKGROUNDS[sign]) - 1)
    return Style(bgcolor=_BACKGROUNDS[sign][step], color="white" if step < 2 else "black")


def _visible(token: str) -> str:
    """The token on one line, without characters that would move the cursor."""
    token = token.replace("\n", "\u23ce").replace("\t", "\u21e5")
    return "".join(c if c.isprintable() else "\u00b7" for c in token)
