"""Searching neurons: what an address asks for, and which neurons answer it."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from urllib.parse import urlencode

import numpy as np
from jaxtyping import Bool, Int

from jaxplain.errors import JaxplainError
from jaxplain.store.explanations import Explanation
from jaxplain.store.neuron_id import NeuronId
from jaxplain.viewer.catalogue import Catalogue, in_range
from jaxplain.viewer.explained import neurons_about
from jaxplain.viewer.peaks import KINDS, PeakIndex
from jaxplain.viewer.site import Site

PAGE = 50
RANGES = 3
BY_NEURON, BY_RELEVANCE = "neuron", "relevance"
PEAK, ANYWHERE = "peak", "anywhere"
_LONGEST = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Values of a column of at least `low` and below `high`."""

    column: str
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """What is searched for. All of it must hold.

    Attributes:
        split: Whose statistics and exemplars.
        words: Words that an explanation has.
        token, kind, where: A token at which an exemplar of kind max or min peaks, or that is anywhere in it.
        layer, expert, index: The neuron's.
        sort: A column, `neuron`, or `relevance` of the words; only a column is ever `descending`.
        page: From 1.
    """

    split: str
    words: str = ""
    token: str = ""
    kind: str = "max"
    where: str = PEAK
    layer: int | None = None
    expert: int | None = None
    index: int | None = None
    ranges: Sequence[Range] = ()
    sort: str = ""
    descending: bool = True
    page: int = 1

    def address(self, **changes: object) -> str:
        """The query part of an address that asks the same, but for changes."""
        query = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        pairs: list[tuple[str, object]] = [("split", query.split)]
        for name in ("words", "token", "layer", "expert", "index", "sort"):
            if (value := getattr(query, name)) not in ("", None):
                pairs.append((name, value))
        if query.token and query.kind != "max":
            pairs.append(("kind", query.kind))
        if query.token and query.where != PEAK:
            pairs.append(("where", query.where))
        for one in query.ranges:
            ends = ("" if end is None else repr(end) for end in (one.low, one.high))
            pairs += zip(("by", "from", "to"), (one.column, *ends), strict=True)
        if not query.descending:
            pairs.append(("order", "up"))
        if query.page > 1:
            pairs.append(("page", query.page))
        return urlencode(pairs)


def query_of(parameters: Iterable[tuple[str, str]], default_split: str) -> Query:
    """The query of an address. Raises JaxplainError for what cannot be asked."""
    given: dict[str, list[str]] = {}
    for name, value in parameters:
        if len(value) > _LONGEST:
            raise JaxplainError(f"{name} is longer than {_LONGEST} characters.")
        given.setdefault(name, []).append(value.strip())

    def one(name: str, default: str = "") -> str:
        return given.get(name, [default])[0]

    columns = given.get("by", [])
    ends = [given.get(name, []) for name in ("from", "to")]
    ends = [[*values, *[""] * len(columns)] for values in ends]
    ranges = [
        Range(column=column, low=_number("from", low), high=_number("to", high))
        for column, low, high in zip(columns, *ends, strict=False)
        if column and (low or high)
    ]
    kind = one("kind", "max")
    if kind not in KINDS:
        raise JaxplainError(f"kind is {kind!r}; give {' or '.join(KINDS)}.")
    where = one("where", PEAK)
    if where not in (PEAK, ANYWHERE):
        raise JaxplainError(f"where is {where!r}; give {PEAK} or {ANYWHERE}.")
    return Query(
        split=one("split") or default_split,
        words=one("words"),
        token=one("token"),
        kind=kind,
        where=where,
        layer=_whole("layer", one("layer")),
        expert=_whole("expert", one("expert")),
        index=_whole("index", one("index")),
        ranges=tuple(ranges[:RANGES]),
        sort=one("sort"),
        descending=one("order") != "up",
        page=max(1, _whole("page", one("page")) or 1),
    )


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise JaxplainError(f"{name} is {text!r}, which is no number.")
    return number


def _whole(name: str, text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise JaxplainError(f"{name} is {text!r}; give a whole number from 0.")
    return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A neuron that was found; `values` are those of the result's columns."""

    neuron: NeuronId
    values: Sequence[float]
    explanations: Sequence[Explanation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The neurons on a page, of `total`; `columns` are what is shown of each, by name and label.

    `note` says why a part of the search was not possible.
    """

    total: int
    pages: int
    columns: dict[str, str]
    rows: Sequence[Row]
    note: str | None = None


def search(site: Site, query: Query) -> Result:
    """The neurons that answer a query, and of those on its page what there is to show.

    Raises JaxplainError for a split or a column that there is not.
    """
    catalogue = site.catalogue(query.split)
    labels = site.labels(query.split)
    asked = [query.sort] if query.sort not in ("", BY_NEURON, BY_RELEVANCE) else []
    asked += [one.column for one in query.ranges]
    for name in asked:
        if name not in labels:
            raise JaxplainError(f"{name!r} is neither a statistic nor a score that there is.")

    kept_N = np.ones(len(catalogue), bool)
    has_experts = catalogue.split.experts is not None
    for name, axis in (("layer", 0), ("expert", 1), ("index", -1)):
        if (value := getattr(query, name)) is not None:
            is_there = has_experts or name != "expert"
            kept_N &= (catalogue.name_NA[:, axis] == value) & is_there
    for one in query.ranges:
        kept_N &= in_range(site.column(query.split, one.column), one.low, one.high)
    note = None
    found_M: Int[np.ndarray, "M"] | None = None
    with site.database() as database:
        if query.words:
            rows = neurons_about(database, query.words) if database else np.zeros((0, 2), np.int64)
            found_M = catalogue.rows_of(rows)
            found_M = found_M[found_M >= 0]
            about_N = np.zeros(len(catalogue), bool)
            about_N[found_M] = True
            kept_N &= about_N
            if database is None:
                note = "There are no explanations yet; make some with python -m jaxplain.explain."
        if query.token:
            if query.kind not in catalogue.split.kinds:
                raise JaxplainError(f"the store holds no exemplars of kind {query.kind!r}.")
            wanted_V = site.tokens_like(query.token)
            if query.where == ANYWHERE:
                kept_N &= site.holding(query.split).matches(query.kind, wanted_V, catalogue.place_N)
            elif site.peaks is not None:
                kept_N &= _peaks_like(site.peaks, catalogue, query, wanted_V)
            else:
                note = (
                    "Tokens at peaks are searched for in an index, which is not there yet; make it with "
                    "python -m jaxplain.view --index, or search for tokens anywhere in exemplars."
                )
                kept_N[:] = False
        order_P = _order(site, query, kept_N, found_M)
        pages = max(1, math.ceil(len(order_P) / PAGE))
        shown = order_P[(query.page - 1) * PAGE : query.page * PAGE]
        defaults = [name for name in ("mean", "fraction_active", "kurtosis") if name in labels]
        scores = [column.name for column in site.score_columns() if column.is_headline][:1]
        columns = {name: labels[name] for name in dict.fromkeys([*scores, *asked, *defaults])}
        values = {name: site.column(query.split, name) for name in columns}
        return Result(
            total=len(order_P),
            pages=pages,
            columns=columns,
            note=note,
            rows=[
                Row(
                    neuron=(neuron := catalogue.neuron(row)),
                    values=[float(values[name][row]) for name in columns],
                    explanations=database.explanations(neuron.layer, neuron.index, neuron.expert)
                    if database
                    else [],
                )
                for row in shown.tolist()
            ],
        )


def _peaks_like(
    peaks: PeakIndex, catalogue: Catalogue, query: Query, wanted_V: Bool[np.ndarray, "V"]
) -> Bool[np.ndarray, "N"]:
    counts_N = peaks.matches(query.split, query.kind, wanted_V)
    # The index is of all neurons that the store holds, and a site may be of some.
    held = np.flatnonzero(catalogue.split.whole_array("stats/count") >= 0)
    return counts_N[np.searchsorted(held, catalogue.place_N)] > 0


def _order(
    site: Site, query: Query, kept_N: np.ndarray, found_M: Int[np.ndarray, "M"] | None
) -> Int[np.ndarray, "P"]:
    rows_M = np.flatnonzero(kept_N)
    sort = query.sort or (BY_RELEVANCE if found_M is not None else BY_NEURON)
    if sort == BY_NEURON:
        return rows_M
    if sort == BY_RELEVANCE:
        return rows_M if found_M is None else found_M[kept_N[found_M]]
    values_M = site.column(query.split, sort)[rows_M].astype(np.float64)
    # NaN goes last either way.
    return rows_M[np.argsort(-values_M if query.descending else values_M, kind="stable")]
