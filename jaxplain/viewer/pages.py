"""The pages: what each shows, laid out by templates that escape whatever they are given."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import escape

from jaxplain import __version__
from jaxplain.errors import JaxplainError
from jaxplain.simulators.simulation import LEVELS
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Neuron, Store
from jaxplain.viewer.charts import HEIGHT, WIDTH, Bar, Distribution, distribution, edges_of, even_edges
from jaxplain.viewer.excerpts import Scale, excerpt_of, near_peak, shaded, visible, visible_lines
from jaxplain.viewer.explained import Explained, explained
from jaxplain.viewer.searching import BY_NEURON, BY_RELEVANCE, RANGES, Query, Range, Result
from jaxplain.viewer.site import Site

SHOWN = 20
"""Exemplars of a kind on a neuron's page, unless more are asked for."""

STRIPS = 3
_SCORES_DRAWN = 8
_TITLES = {
    "max": "Highest",
    "min": "Lowest",
    "random": "Random",
    "quantile": "By quantile",
}


def asset(name: str) -> str:
    """A style or script that comes with jaxplain."""
    return (resources.files("jaxplain.viewer") / "assets" / name).read_text(encoding="utf-8")


def number(value: int | float | None) -> str:
    """A number in few digits; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def file_of(neuron: NeuronId) -> str:
    """The name of a neuron's page."""
    return f"{'.'.join(map(str, neuron))}.html"


def neuron_of_file(name: str) -> NeuronId | None:
    """The neuron whose page has a name; None where it is no such name."""
    parts = name.removesuffix(".html").split(".")
    if len(parts) not in (2, 3) or not all(p.isascii() and p.isdecimal() and len(p) < 10 for p in parts):
        return None
    return NeuronId(map(int, parts))


def environment() -> jinja2.Environment:
    """The templates."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxplain.viewer", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "visible": visible,
        "lines": visible_lines,
        "file": file_of,
        "short": lambda text: visible(text, longest=300),
    }
    made.globals |= {"version": __version__, "chart_width": WIDTH, "chart_height": HEIGHT, "titles": _TITLES}
    return made


_TEMPLATES = environment()


def error_page(message: str, *, root: str = "") -> str:
    """A page that says what went wrong."""
    return _TEMPLATES.get_template("error.html").render(message=message, root=root, is_static=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A sequence with its real activations, and those of simulators by name; or why there are none."""

    sequence: int
    real: str
    simulated: Mapping[str, str]


class Pages:
    """The pages of a site, as text. `is_static` ones are files that no server answers for."""

    def __init__(self, site: Site, *, is_static: bool = False, shown: int = SHOWN):
        self.site, self._is_static, self._shown = site, is_static, shown
        for template in _TEMPLATES.list_templates():
            _TEMPLATES.get_template(template)  # once, and before anyone waits for a page
        self._drawn: dict[tuple[str, str], tuple[np.ndarray, Distribution]] = {}

    def _render(self, template: str, root: str, split: str, **values: Any) -> str:
        store = self.site.store
        return _TEMPLATES.get_template(template).render(
            root=root,
            split=split,
            splits=store.splits,
            subject=store.attributes["subject"],
            is_static=self._is_static,
            **values,
        )

    def overview(self, split: str, *, root: str) -> str:
        """Subject, corpora, splits, counts, and charts of one split. Raises JaxplainError for no such one."""
        site = self.site
        catalogue = site.catalogue(split)
        store = site.store
        samples = site.sample_counts()
        return self._render(
            "overview.html",
            root,
            split,
            store=store,
            of_split=catalogue.split,
            neurons=len(catalogue),
            corpora=self._corpora(),
            samples=samples,
            trouble=site.trouble,
            charts=list(self._charts(split)),
            search=functools.partial(_search_address, root, split),
        )

    def _corpora(self) -> list[tuple[str, Mapping[str, Any]]]:
        sources = (self.site.store.config.get("corpus") or {}).get("sources") or []
        described = sources if len(sources) == len(self.site.store.corpora) else []
        padded = [*described, *[{}] * (len(self.site.store.corpora) - len(described))]
        return list(zip(self.site.store.corpora, padded, strict=True))

    def _charts(self, split: str) -> Iterator[Distribution]:
        catalogue = self.site.catalogue(split)
        layer_N = catalogue.name_NA[:, 0]
        headlines = [column for column in self.site.score_columns() if column.is_headline][:_SCORES_DRAWN]
        edges: Mapping[str, list[float]] = {"fraction_active": even_edges(0.0, 1.0)}
        labels = {column.name: column.label for column in headlines}
        for name in ("fraction_active", "kurtosis"):
            labels[name] = catalogue.labels[name]
        for name, label in labels.items():
            values_N = self.site.column(split, name)
            before = self._drawn.get((split, name))
            if before is not None and before[0] is values_N:
                yield before[1]
                continue
            score = name.startswith("score|")
            bins = edges.get(name) or (even_edges(-1.0, 1.0) if score else edges_of(values_N))
            # Of several simulators, one is shown by layers.
            by_layer = not score or name == headlines[0].name
            drawn = distribution(name, label, values_N, layer_N, edges=bins, by_layer=by_layer)
            self._drawn[split, name] = (values_N, drawn)
            yield drawn

    def neuron(self, split: str, neuron: NeuronId, *, root: str, shown: int | None = None) -> str:
        """One neuron. Raises JaxplainError where the store does not hold it."""
        site, shown = self.site, shown or self._shown
        found = site.store[split].neuron_called(neuron)
        exemplars = {kind: found.exemplars(kind) for kind in found.split.kinds}
        scale = Scale.of(exemplars)
        with site.database() as database:
            explanations = list(explained(database, neuron, split)) if database else []
        others = [s for s in site.store.splits if s != split]
        return self._render(
            "neuron.html",
            root,
            split,
            neuron=found,
            name=neuron,
            scale=scale,
            stats=found.stats,
            active_above=_threshold(site.store),
            quantiles=found.quantiles,
            excerpts={
                kind: [excerpt_of(e, kind, scale) for e in several[:shown]]
                for kind, several in exemplars.items()
            },
            totals={kind: len(several) for kind, several in exemplars.items()},
            explanations=[(e, list(_strips(found, e, exemplars, scale))) for e in explanations],
            beside=site.catalogue(split).beside(neuron),
            others=[s for s in others if site.catalogue(s).row_of(neuron) is not None],
        )

    def search(self, query: Query, result: Result | None, *, root: str) -> str:
        """The form, and what was found."""
        ranges = [(r.column, _edge(r.low), _edge(r.high)) for r in query.ranges]
        return self._render(
            "search.html",
            root,
            query.split,
            query=query,
            result=result,
            ranges=[*ranges, *[("", "", "")] * (RANGES - len(ranges))],
            labels=self.site.labels(query.split),
            sorts=[(BY_NEURON, "layer and number")]
            # Files are not searched by a database, which knows how well words match.
            + ([] if self._is_static else [(BY_RELEVANCE, "relevance of the words")]),
            has_experts=self.site.catalogue(query.split).split.experts is not None,
        )


def _search_address(root: str, split: str, column: str, bar: Bar, layer: int | None) -> str:
    """Where the neurons behind a bar are found."""
    ranges = [Range(column=column, low=bar.low, high=bar.high)]
    return f"{root}search.html?{Query(split=split, layer=layer, ranges=ranges, sort=column).address()}"


def _edge(value: float | None) -> str:
    return "" if value is None else f"{value!r}"


def neuron_fragment(neuron: Neuron, *, shown: int) -> Mapping[str, Any]:
    """What a neuron's statistics and exemplars are laid out from, without a site."""
    exemplars = {kind: neuron.exemplars(kind) for kind in neuron.split.kinds}
    scale = Scale.of(exemplars)
    with contextlib.suppress(JaxplainError):
        return _fragment(neuron, exemplars, scale, neuron.explanations(), shown)
    return _fragment(neuron, exemplars, scale, [], shown)


def _threshold(store: Store) -> float:
    """Above what a neuron is active."""
    return store.config.get("statistics", {}).get("active_above", 0.0)


def _fragment(
    neuron: Neuron,
    exemplars: Mapping[str, Sequence[Exemplar]],
    scale: Scale,
    explanations: Sequence[Any],
    shown: int,
) -> Mapping[str, Any]:
    return {
        "neuron": neuron,
        "name": neuron.id,
        "scale": scale,
        "stats": neuron.stats,
        "active_above": _threshold(neuron.split.store),
        "explanations": explanations,
        "excerpts": {
            kind: [excerpt_of(e, kind, scale) for e in found[:shown]] for kind, found in exemplars.items()
        },
    }


def fragment(template: str, **values: Any) -> str:
    """A part of a page with its style, for a notebook."""
    return _TEMPLATES.get_template(template).render(**values)


def _level(value: float) -> str:
    return f"level {abs(value):.3g}"


def _strips(
    neuron: Neuron, one: Explained, exemplars: Mapping[str, Sequence[Exemplar]], scale: Scale
) -> Iterator[Strip]:
    """Sequences that were simulated, the first ones as the exemplars come, real and simulated."""
    if not one.simulations:
        return
    sign = one.explanation.sign
    kinds = dict.fromkeys([sign, "random", *exemplars])
    held = {e.sequence: e for kind in reversed(kinds) for e in reversed(exemplars.get(kind, []))}
    order = [e.sequence for kind in kinds for e in exemplars.get(kind, [])]
    simulated = set().union(*one.simulations.values())
    levels = Scale(float(LEVELS - 1), 0.0) if sign == "max" else Scale(0.0, -float(LEVELS - 1))
    direction = 1 if sign == "max" else -1
    for sequence in list(dict.fromkeys(s for s in order if s in simulated))[:STRIPS]:
        exemplar = held[sequence]
        texts, near = exemplar.token_strings, near_peak(exemplar, sign)
        lines: dict[str, str] = {}
        for name, by_sequence in one.simulations.items():
            found = by_sequence.get(sequence)
            if found is None:
                continue
            if found.expected is None or len(found.expected) != len(texts):
                lines[name] = escape(visible(found.detail or "no levels"))
            else:
                lines[name] = shaded(texts, direction * found.expected, levels, near, says=_level)
        yield Strip(sequence=sequence, real=shaded(texts, exemplar.activations, scale, near), simulated=lines)
