"""What notebooks show of neurons and exemplars: parts of the pages, with their style and no script."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from jaxplain.store.exemplar import Exemplar
from jaxplain.store.reader import Neuron
from jaxplain.viewer.excerpts import Scale, excerpt_of
from jaxplain.viewer.pages import asset, fragment, neuron_fragment

_OF_NEURON, _OF_LIST = 5, 20


def neuron_html(neuron: Neuron) -> str:
    """A neuron's explanations, statistics and first exemplars of every kind."""
    return fragment("notebook.html", style=_style(), left_out=0, **neuron_fragment(neuron, shown=_OF_NEURON))


def exemplars_html(exemplars: Sequence[Exemplar]) -> str:
    """Exemplars as excerpts about their peaks, shaded by the strongest of them."""
    shown = exemplars[:_OF_LIST]
    scale = Scale.of({"": shown})
    found = {"": [excerpt_of(exemplar, _kind_of(exemplar), scale) for exemplar in shown]}
    return fragment("notebook.html", style=_style(), left_out=len(exemplars) - len(shown), excerpts=found)


def _kind_of(exemplar: Exemplar) -> str:
    """The kind that an exemplar's score speaks for."""
    acts_T = exemplar.activations[np.isfinite(exemplar.activations)]
    if not len(acts_T) or not np.isfinite(exemplar.score):
        return "random"
    for kind, extreme in (("max", acts_T.max()), ("min", acts_T.min())):
        # The score is the extreme before it was rounded.
        if np.isclose(extreme, exemplar.score, rtol=1e-2, atol=1e-3):
            return kind
    return "random"


def _style() -> Markup:
    return Markup(asset("style.css"))
