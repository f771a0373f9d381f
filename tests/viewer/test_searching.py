"""Searches, against the same done by hand."""

import itertools
import shutil
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest
import zarr

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.store.neuron_id import NeuronId
from jaxplain.viewer import holding, peaks, searching
from jaxplain.viewer.explained import full_text_query
from jaxplain.viewer.searching import Query, Range, query_of, search
from jaxplain.viewer.site import Site
from tests.viewer import runs
from tests.viewer.conftest import client_of
from tests.viewer.reading import assert_harmless, parse


@pytest.fixture(scope="module")
def site(run):
    return Site(jaxplain.open_store(run))


def found(site, **asked):
    result = search(site, Query(split="train", **asked))
    assert result.total == len(result.rows)
    return [tuple(row.neuron) for row in result.rows]


def numbers(name):
    """A statistic of all neurons that are held, by hand."""
    values = {}
    for place, layer in enumerate(runs.LAYERS):
        of_layer = runs.statistics(place)[name]
        values |= {(int(layer), int(index)): v for index, v in zip(runs.NEURONS, of_layer, strict=True)}
    return {name: values[name] for name in map(tuple, runs.neurons())}


def numbered(*places):
    return [tuple(runs.neurons()[place]) for place in places]


def test_everything_where_nothing_is_asked(site):
    assert found(site) == list(map(tuple, runs.neurons()))


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("cat", [1]),
        ("cats", [0]),
        ("cat*", [0, 1]),
        ("CATS animals", [0]),
        ('"small animals"', [0]),
        ('"animals small"', []),
        ("cats barks", []),
        ("cafe", [3]),
        ("closing OR cats", []),
        ("script", [2]),
        ("say", [2]),
        ("*", []),
        ('"', []),
        ("NEAR(cat dog)", []),
        ("cat) OR (1=1", []),
        ("text:cat", []),
        ("ca\0ts", []),
        ("'; DROP TABLE samples; --", []),
    ],
)
def test_words_of_explanations(site, words, places):
    assert sorted(found(site, words=words)) == numbered(*places)


def test_words_are_no_operators():
    assert full_text_query('cat* "a phrase" NOT (x OR y)') == '"cat" * "a phrase" "NOT" "(x" "OR" "y)"'
    assert full_text_query('*** -- ""') == ""


def test_the_best_explanations_come_first(site):
    by_rank = found(site, words="cat*")
    assert sorted(by_rank) == numbered(0, 1)
    with site.database() as database:
        best = [(e.layer, e.index) for e in database.search("cat*")]
    assert by_rank == best


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.3, None), (None, 0.6), (0.3, 0.6), (2.0, None)])
@pytest.mark.parametrize("column", ["mean", "skewness", "fraction_active", "kurtosis"])
def test_ranges_of_statistics(site, column, low, high):
    expected = [
        name
        for name, value in numbers(column).items()
        if not np.isnan(value) and (low is None or value >= low) and (high is None or value < high)
    ]
    assert found(site, ranges=[Range(column=column, low=low, high=high)]) == expected


def test_ranges_of_quantiles_and_extremes(site, run):
    split = jaxplain.open_store(run)["train"]
    held = [split.neuron_called(name) for name in runs.neurons()]
    expected = [tuple(n.id) for n in held if n.quantile(0.9) >= 0.2]
    assert 0 < len(expected) < len(held)
    assert found(site, ranges=[Range(column="quantile 0.9", low=0.2, high=None)]) == expected
    for column, kind in (("highest", "max"), ("lowest", "min")):
        scores = sorted(n.exemplars(kind)[0].score for n in held)
        middle = scores[len(scores) // 2]
        expected = [tuple(n.id) for n in held if n.exemplars(kind)[0].score < middle]
        assert found(site, ranges=[Range(column=column, low=None, high=middle)]) == expected


def test_ranges_of_scores(site):
    (column,) = site.score_columns()
    assert found(site, ranges=[Range(column=column.name, low=0.75, high=None)]) == numbered(0)
    assert found(site, ranges=[Range(column=column.name, low=None, high=0.75)]) == []


def test_all_that_is_asked_must_hold(site):
    mean = sorted(numbers("mean").values())[4]
    both = [Range(column="mean", low=None, high=float(mean)), Range(column="kurtosis", low=0.0, high=None)]
    names = found(site, ranges=both, layer=0)
    kurtosis = numbers("kurtosis")
    expected = [n for n, v in numbers("mean").items() if v < mean and n[0] == 0 and not np.isnan(kurtosis[n])]
    assert names == expected
    assert found(site, words="cat*", layer=0, index=2) == numbered(1)
    assert found(site, layer=3, index=7) == []


@pytest.mark.parametrize("descending", [True, False])
def test_sorting_leaves_what_has_no_number_to_the_end(site, descending):
    kurtosis = numbers("kurtosis")
    known = sorted((v, n) for n, v in kurtosis.items() if not np.isnan(v))
    unknown = [n for n, v in kurtosis.items() if np.isnan(v)]
    expected = [n for _, n in (reversed(known) if descending else known)] + unknown
    assert found(site, sort="kurtosis", descending=descending) == expected
    with_words = found(site, words="cat*", sort="kurtosis", descending=descending)
    assert with_words == [n for n in expected if n in numbered(0, 1)]


def test_pages_part_the_whole(site, monkeypatch):
    monkeypatch.setattr(searching, "PAGE", 4)
    parts = [search(site, Query(split="train", sort="mean", page=page)) for page in (1, 2, 3, 4)]
    assert [part.pages for part in parts] == [3] * 4
    assert [len(part.rows) for part in parts] == [4, 4, 1, 0]
    assert {part.total for part in parts} == {9}
    names = [tuple(row.neuron) for part in parts for row in part.rows]
    assert names == [n for _, n in sorted(((-v, n) for n, v in numbers("mean").items()))]


def peak_words(run, name, kind, split="train"):
    """The vocabulary tokens at which a neuron's exemplars peak, by hand."""
    neuron = jaxplain.open_store(run)[split].neuron_called(name)
    pick = np.nanargmax if kind == "max" else np.nanargmin
    return {runs.WORDS[e.tokens[pick(e.activations)]] for e in neuron.exemplars(kind)}


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("cat", {b" cat"}),
        (" CAT ", {b" cat"}),
        ("cat*", {b" cat", b" Cats"}),
        ("*o*", {b" dog", *(w for w in runs.HOSTILE if b"o" in w)}),
        ("*g", {b" dog"}),
        ("the", {b" the"}),
        ("zebra", set()),
        ("*", set()),
    ],
)
def test_tokens_at_which_exemplars_peak(site, run, kind, asked, wanted):
    expected = [tuple(n) for n in runs.neurons() if peak_words(run, n, kind) & wanted]
    assert found(site, token=asked, kind=kind) == expected


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("asked", ["cat", "cat*", "*script*", "w*", "zebra", "*"])
@pytest.mark.parametrize("block", [5, 2**17])
def test_tokens_anywhere_in_exemplars(run, kind, asked, block, monkeypatch):
    monkeypatch.setattr(holding, "_BLOCK", block)
    monkeypatch.setattr(holding, "RANKS", 2)
    store = jaxplain.open_store(run)
    wanted = {w for w, is_like in zip(runs.WORDS, Site(store).tokens_like(asked), strict=True) if is_like}
    expected = [
        tuple(n)
        for n in runs.neurons()
        if wanted
        & {runs.WORDS[t] for e in store["train"].neuron_called(n).exemplars(kind, limit=2) for t in e.tokens}
    ]
    if asked == "*script*":
        assert 0 < len(expected) < len(runs.neurons())
    site = Site(store, index=run / "no index")
    assert found(site, token=asked, kind=kind, where="anywhere") == expected


def test_an_empty_rank_holds_no_token(tmp_path):
    path = runs.write_store(tmp_path / "exemplars.zarr")
    zarr.open(path, mode="r+")["train/max/sequence"][0, 0] = [0, -1, -1, -1]
    assert runs.HOSTILE[3] in [runs.WORDS[token] for token in runs.tokens()[-1]]
    assert runs.HOSTILE[3] not in [runs.WORDS[token] for token in runs.tokens()[0]]
    site = Site(jaxplain.open_store(path), chosen=runs.neurons()[:1])
    assert found(site, token="</title>*", where="anywhere") == []
    zarr.open(path, mode="r+")["train/max/sequence"][0, 0] = [0, runs.SEQUENCES - 1, -1, -1]
    site = Site(jaxplain.open_store(path), chosen=runs.neurons()[:1])
    assert found(site, token="</title>*", where="anywhere") == [tuple(runs.neurons()[0])]


def test_tokens_anywhere_in_exemplars_of_some_neurons_of_a_mixture(mixture):
    store = jaxplain.open_store(mixture)
    names = runs.neurons(experts=[0, 4])[::3]
    wanted = {n for n, word in enumerate(runs.WORDS) if b"script" in word}
    expected = [
        tuple(n)
        for n in names
        if any(wanted & set(e.tokens.tolist()) for e in store["train"].neuron_called(n).exemplars())
    ]
    assert 0 < len(expected) < len(names)
    assert found(Site(store, chosen=names), token="*script*", where="anywhere") == expected


def test_tokens_of_a_mixture(mixture):
    site = Site(jaxplain.open_store(mixture))
    names = runs.neurons(experts=[0, 4])
    expected = [tuple(n) for n in names if peak_words(mixture, n, "max") & {b" dog"}]
    assert 0 < len(expected) < len(names)
    assert found(site, token="dog") == expected


def test_an_index_made_in_small_blocks_is_the_same(run, tmp_path, monkeypatch):
    store = jaxplain.open_store(run)
    monkeypatch.setattr(peaks, "_BLOCK_BYTES", 1)
    peaks.build_index(store, tmp_path / "again", progress_bars(enabled=False))
    for split, kind in itertools.product(store.splits, ("max", "min")):
        name = f"{split}.{kind}.npy"
        assert (tmp_path / "again" / name).read_bytes() == (run / peaks.FOLDER / name).read_bytes()


def test_without_an_index_the_page_says_how_to_make_one(tmp_path):
    runs.write_store(tmp_path / "exemplars.zarr")
    page = parse(client_of(tmp_path).get("/search.html?token=cat").text)
    assert "python -m jaxplain.view --index" in page.one("p", class_="error").text
    assert page.one("p", class_="found").text == "0 neurons"


def test_an_index_that_is_made_meanwhile_is_found(tmp_path):
    store = jaxplain.open_store(runs.write_store(tmp_path / "exemplars.zarr"))
    site = Site(store)
    assert site.peaks is None
    peaks.build_index(store, tmp_path / peaks.FOLDER, progress_bars(enabled=False))
    assert site.peaks is not None


def test_an_index_of_another_store_is_not_used(tmp_path, run):
    runs.write_store(tmp_path / "exemplars.zarr", corpora=["another", "one"])
    shutil.copytree(run / peaks.FOLDER, tmp_path / peaks.FOLDER)
    assert Site(jaxplain.open_store(tmp_path)).peaks is None
    assert Site(jaxplain.open_store(run), index=tmp_path / peaks.FOLDER).peaks is not None


def test_a_failing_index_leaves_the_old_one(tmp_path, monkeypatch):
    runs.write_store(tmp_path / "exemplars.zarr")
    store = jaxplain.open_store(tmp_path)
    folder = tmp_path / peaks.FOLDER
    peaks.build_index(store, folder, progress_bars(enabled=False))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peaks, "_write_kind", full)
    with pytest.raises(JaxplainError, match="No space left on device; name another folder"):
        peaks.build_index(store, folder, progress_bars(enabled=False))
    assert peaks.open_index(store, folder) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exemplars.zarr", peaks.FOLDER]


def test_an_address_says_the_whole_query():
    query = Query(
        split="valid",
        words="a & b",
        token="é",
        where="anywhere",
        kind="min",
        layer=0,
        expert=3,
        index=7,
        ranges=(
            Range(column="mean", low=0.1, high=None),
            Range(column="score|x|y", low=None, high=1 / 3),
        ),
        sort="kurtosis",
        descending=False,
        page=3,
    )
    assert query_of(parse_qsl(query.address(), keep_blank_values=True), "train") == query
    assert query_of([], "train") == Query(split="train")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"layer": "x"}, "layer is 'x'; give a whole number"),
        ({"layer": "9" * 30}, "give a whole number"),
        ({"layer": "\u0663"}, "give a whole number"),
        ({"by": "mean", "from": "<b>"}, "from is '<b>', which is no number."),
        ({"by": "mean", "to": "nan"}, "which is no number."),
        ({"by": "nothing", "from": "1"}, "'nothing' is neither a statistic nor a score"),
        ({"sort": "<script>"}, "'<script>' is neither"),
        ({"kind": "random"}, "kind is 'random'; give max or min."),
        ({"words": "w" * 501}, "words is longer than 500 characters."),
        ({"split": "../train"}, "has no split '../train'"),
    ],
)
def test_what_cannot_be_asked(run, asked, says):
    answer = client_of(run).get(f"/search.html?{urlencode(asked)}")
    page = parse(answer.text)
    assert_harmless(page)
    assert answer.status_code == 404
    assert says in page.one("p", class_="error").text


def test_the_form_shows_what_was_asked(client):
    query = Query(
        split="valid",
        words="<b>\"'",
        layer=3,
        ranges=(Range(column="mean", low=0.25, high=None),),
        sort="skewness",
        descending=False,
    )
    page = parse(client.get(f"/search.html?{query.address()}").text)
    form = page.one("form", id="search")
    given = [(e.attributes["name"], e.attributes.get("value", "")) for e in form.all("input")]
    for select in form.all("select"):
        chosen = [o for o in select.all("option") if "selected" in o.attributes] or select.all("option")[:1]
        given.append((select.attributes["name"], chosen[0].attributes.get("value", chosen[0].text)))
    assert query_of(sorted(given, key=lambda pair: pair[0] not in ("by", "from", "to")), "train") == query


def head_of(page, label):
    (head,) = [a for a in page.one("thead").all("a") if a.text.startswith(label)]
    return head


def test_results_lead_to_neurons_and_sort_by_their_heads(client, site):
    page = parse(client.get("/search.html?words=cat*").text)
    rows = page.one("tbody").all("tr")
    names = [NeuronId(runs.neurons()[place]) for place in (0, 1)]
    assert sorted(row.one("a").attributes["href"] for row in rows) == [
        f"neuron/train/{n.layer}.{n.index}.html" for n in names
    ]
    kurtosis = head_of(page, "kurtosis")
    assert kurtosis.text == "kurtosis"
    once = parse(client.get(f"/search.html{kurtosis.attributes['href']}").text)
    assert head_of(once, "kurtosis").text == "kurtosis ↓"
    twice = parse(client.get(f"/search.html{head_of(once, 'kurtosis').attributes['href']}").text)
    assert head_of(twice, "kurtosis").text == "kurtosis ↑"
    assert twice.one("form", id="search").one("input", name="words").attributes["value"] == "cat*"
