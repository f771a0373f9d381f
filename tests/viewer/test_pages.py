"""What pages show, against the store, and that text stays text whatever it says."""

import re

import numpy as np
import pytest
from starlette.testclient import TestClient

import jaxplain
from jaxplain.store.explanations import Sample, open_explanations
from jaxplain.viewer.app import make_app
from jaxplain.viewer.excerpts import LONGEST_TOKEN
from jaxplain.viewer.site import Site
from tests.viewer import runs
from tests.viewer.conftest import client_of
from tests.viewer.reading import assert_harmless, parse


def page(client, path, *, status=200):
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    found = parse(answer.text)
    assert_harmless(found)
    return found


def exemplars(found, kind):
    return found.one("section", id=kind).all("li", class_="exemplar")


def cells_of(exemplar):
    return [cell for cell in exemplar.one("div", class_="text").all("span") if "cut" not in cell.classes]


@pytest.mark.parametrize("kind", runs.KINDS)
def test_tokens_have_their_activations_and_the_shade_of_their_sign(client, run, kind):
    neuron = jaxplain.open_store(run)["train"].neuron(3, 5)
    found = exemplars(page(client, "/neuron/train/3.5.html"), kind)
    held = {k: neuron.exemplars(k) for k in runs.KINDS}
    everything = np.concatenate([e.activations for several in held.values() for e in several])
    for shown, exemplar in zip(found, held[kind], strict=True):
        cells = cells_of(shown)
        assert len(cells) == len(exemplar.tokens)
        for cell, value in zip(cells, exemplar.activations.tolist(), strict=True):
            shades = cell.classes - {"far"}
            if np.isnan(value):
                assert (cell.attributes["title"], shades) == ("does not count", {"x"})
                continue
            assert float(cell.attributes["title"]) == pytest.approx(value, rel=1e-3)
            end = np.nanmax(everything) if value > 0 else np.nanmin(everything)
            step = round(8 * value / end)
            assert shades == ({f"{'p' if value > 0 else 'n'}{step}"} if step else set())


def test_an_excerpt_is_about_the_peak_and_the_rest_is_there(client, run):
    exemplar = jaxplain.open_store(run)["train"].neuron(0, 1).exemplars("max")[0]
    shown = exemplars(page(client, "/neuron/train/0.1.html"), "max")[0]
    peak = int(np.nanargmax(exemplar.activations))
    cells = cells_of(shown)
    near = [at for at, cell in enumerate(cells) if "far" not in cell.classes]
    assert peak in near
    assert near == list(range(near[0], near[-1] + 1))
    assert len(near) < len(cells)
    assert shown.one("span", class_="peak").text == f"{exemplar.activations[peak]:.4g}"
    assert shown.one("label", class_="more").all("input", type="checkbox")


def test_where_an_exemplar_comes_from(client, run):
    exemplar = jaxplain.open_store(run)["train"].neuron(0, 1).exemplars("max")[1]
    shown = exemplars(page(client, "/neuron/train/0.1.html"), "max")[1]
    line = shown.one("div", class_="from").text
    assert exemplar.corpus in line
    assert f"document {exemplar.document & (2**64 - 1):016x} from token 96" in line
    assert f"sequence {exemplar.sequence}" in line
    assert shown.attributes["id"] == "max-1"
    assert shown.all("a", href="#max-1")[0].text == "#2"


def test_statistics_and_quantiles(client):
    found = page(client, "/neuron/train/3.5.html")
    values = runs.statistics(1)
    at = runs.NEURONS.tolist().index(5)
    table = {row.one("th").text: row.one("td").text for row in found.one("table", class_="numbers").all("tr")}
    assert table["tokens counted"] == "500"
    assert float(table["mean"]) == pytest.approx(values["mean"][at], rel=1e-3)
    assert float(table["deviation"]) == pytest.approx(values["variance"][at] ** 0.5, rel=1e-3)
    assert float(table["skewness"]) == pytest.approx(values["skewness"][at], rel=1e-3)
    assert table["kurtosis"] == "-", "which is NaN for this one"
    assert float(table["above zero"][:-1]) == pytest.approx(100 * values["fraction_active"][at], rel=1e-3)
    levels, quantiles = found.one("table", class_="quantiles").all("tr")
    assert [float(cell.text) for cell in levels.all("th")[1:]] == list(runs.LEVELS)
    shown = [float(cell.text) for cell in quantiles.all("td")]
    assert shown == pytest.approx(values["quantile"][at].tolist(), rel=1e-3)


def test_explanations_with_scores(client):
    one = page(client, "/neuron/train/0.1.html").one("article")
    assert one.one("p", class_="words").text == "+ names of cats and other small animals"
    assert "by gemini, model '\", <i>style</i>, sample 0" in one.text
    score = one.one("span", class_="score")
    assert score.text == "correlation by sim <b> in train 0.75"
    assert score.attributes["title"] == "0.5 to 0.9"
    other = page(client, "/neuron/train/0.2.html").one("article")
    assert other.one("span", class_="sign").text == "\N{MINUS SIGN}"
    assert other.one("span", class_="score").attributes["title"] == "all <i>equal</i>"
    assert other.one("span", class_="score").one("b").text == "-"


@pytest.mark.parametrize(("index", "kind", "letter"), [(1, "max", "p"), (2, "min", "n")])
def test_real_against_simulated(client, run, index, kind, letter):
    held = jaxplain.open_store(run)["train"].neuron(0, index).exemplars(kind)
    first, second = page(client, f"/neuron/train/0.{index}.html").all("div", class_="strip")
    real, simulated = first.all("div", class_="text")
    values = [float(c.attributes["title"]) for c in real.all("span")[1:]]
    assert values == pytest.approx(held[0].activations[1:].tolist(), rel=1e-3)
    levels = np.linspace(0, 10, len(held[0].tokens)).astype(np.float16)
    titles = [c.attributes["title"] for c in simulated.all("span")]
    assert titles == [f"level {level:.3g}" for level in levels.tolist()]
    assert simulated.all("span")[-1].classes - {"far"} == {f"{letter}8"}
    assert first.all("b")[1].text == "sim <b>"
    assert second.all("div", class_="text")[1].text == "the reply <b>broke</b> off"


def test_nothing_of_another_splits_simulations(client):
    assert not page(client, "/neuron/valid/0.1.html").all("div", class_="strip")


def test_neighbours_and_other_splits(client):
    names = [".".join(map(str, name)) for name in runs.neurons()]
    assert "3.7" not in names
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        found = page(client, f"/neuron/train/{name}.html")
        links = [a.attributes for a in found.all("a")]
        ends = [(link["rel"], link["href"]) for link in links if "rel" in link]
        expected = [("prev", before), ("next", after)]
        assert ends == [(rel, f"../../neuron/train/{n}.html") for rel, n in expected if n is not None]
        assert found.one("a", href=f"../../neuron/valid/{name}.html").text == "the same in valid"


def test_more_exemplars_are_shown_where_they_are_asked_for(client, run):
    assert len(exemplars(page(client, "/neuron/train/0.1.html?show=1"), "max")) == 1
    assert len(exemplars(page(client, "/neuron/train/0.1.html?show=3"), "min")) == 3
    first = page(client, "/neuron/train/0.1.html?show=3").one("section", id="min")
    assert first.one("a", href="?show=4#min").text == "show all"
    for wrong in ("0", "-1", "x", "99999999999", "1e3"):
        assert "show is" in page(client, f"/neuron/train/0.1.html?show={wrong}", status=404).text


def test_overview(client):
    found = page(client, "/")
    assert found.one("h1").text == "made-up <b>model</b>"
    for said in ("plain", runs.CORPORA[1], "9", "12 sequences of up to 48 tokens", "4 max, 4 min, 4 random"):
        assert said in found.text
    assert re.search(r"gemini, model '\", <i>style</i>\s*4 explained", found.text)
    assert re.search(
        r"gemini, model '\", <i>style</i>\s*1 refused|gemini, <i>style</i>\s*1 refused", found.text
    )
    headings = [h.text for h in found.all("h2")[-3:]]
    assert headings[0].startswith("correlation by sim <b> (top+random of train) 1 neurons")
    assert headings[1].startswith("fraction active 9 neurons")
    assert headings[2].startswith("kurtosis 7 neurons"), "two have none"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_bar_leads_to_the_neurons_behind_it(client, split):
    charts = page(client, f"/overview/{split}.html").all("section", class_="distribution")
    assert len(charts) == 3
    for chart in charts:
        by_figure = []
        for figure in chart.all("svg"):
            numbers = []
            for bar in figure.all("a"):
                said = int(re.search(r"([\d,]+) neurons$", bar.one("title").text)[1].replace(",", ""))
                answer = page(client, bar.attributes["href"].replace("../", "/"))
                assert answer.one("p", class_="found").text.startswith(f"{said} neurons")
                numbers.append(said)
            by_figure.append(sum(numbers))
        assert by_figure[0] == int(re.search(r"(\d+) neurons", chart.one("h2").text)[1])
        assert sum(by_figure[1:]) == by_figure[0], "layers add up to the whole"


PAGES = ["/", "/overview/valid.html", "/search.html", "/search.html?words=say", "/search.html?token=cat"]


@pytest.mark.parametrize("path", [*PAGES, *(f"/neuron/train/{n[0]}.{n[1]}.html" for n in runs.neurons())])
def test_hostile_text_stays_text(client, path):
    found = page(client, path)
    assert {s.attributes["src"].split("/")[-1] for s in found.all("script")} == {"view.js"}
    assert found.all("b") == [
        b for b in found.all("b") if b.text in ("all", "real  whole", "0.75", "-", "sim <b>")
    ]


def test_hostile_tokens_are_shown_as_they_are(client):
    shown = "".join(page(client, f"/neuron/train/{n[0]}.{n[1]}.html").text for n in runs.neurons())
    for token in runs.HOSTILE[:4] + runs.HOSTILE[6:7]:
        assert token.decode() in shown
    assert "[U+202E]gnp.exe[U+202C]" in shown
    assert "nul\u2400nul\u241b[31m" in shown
    assert "w" * LONGEST_TOKEN + "\N{HORIZONTAL ELLIPSIS} (100,000 characters)" in shown
    assert "w" * (LONGEST_TOKEN + 1) not in shown


def test_a_long_hostile_explanation(client):
    words = page(client, "/neuron/train/0.5.html").one("p", class_="words").text
    assert words.startswith('+ say "<script>window.hacked = 1</script>" & <b>[U+202E]left</b> \u2400 vvv')
    assert words.endswith(f"v\N{HORIZONTAL ELLIPSIS} ({len(runs.HOSTILE_TEXT):,} characters)")
    row = page(client, "/search.html?words=say").one("tbody")
    assert len(row.text) < 1000


def test_pages_stay_small_whatever_tokens_there_are(client):
    assert max(len(client.get(f"/neuron/train/{n[0]}.{n[1]}.html").text) for n in runs.neurons()) < 120_000


@pytest.mark.parametrize(
    "path",
    [
        "/neuron/train/3.7.html",
        "/neuron/train/1.1.html",
        "/neuron/train/0.99999.html",
        "/neuron/train/0.0.1.html",
        "/neuron/nowhere/0.1.html",
        "/overview/nowhere.html",
        "/search.html?split=nowhere",
        "/neuron/train/x.html",
        "/neuron/train/-1.1.html",
        "/neuron/train/0.1",
        "/nowhere",
    ],
)
def test_what_is_not_there(client, path):
    if path.endswith("0.1"):
        path = "/neuron/train/0.1.2.3.html"
    found = page(client, path, status=404)
    assert found.one("p", class_="error").text.endswith(".")


def test_mixtures_of_experts(mixture_client, mixture):
    neuron = jaxplain.open_store(mixture)["train"].neuron(3, 5, expert=4)
    found = page(mixture_client, "/neuron/train/3.4.5.html")
    assert found.one("h1").text.startswith("Layer 3, expert 4, neuron 5")
    assert exemplars(found, "max")[0].one("span", class_="peak").text == f"{neuron.exemplars()[0].score:.4g}"
    assert page(mixture_client, "/neuron/train/3.5.html", status=404)
    said = page(mixture_client, "/search.html?expert=4&layer=3").one("p", class_="found").text
    assert said == "4 neurons"
    assert "names of cats" in page(mixture_client, "/neuron/train/0.0.1.html").one("article").text
    assert (
        page(mixture_client, "/search.html?words=cafe").one("tbody").one("a").text
        == "layer 0, expert 0, neuron 7"
    )


def test_a_store_without_explanations(tmp_path):
    runs.write_store(tmp_path / "exemplars.zarr")
    client = client_of(tmp_path)
    assert "python -m jaxplain.explain makes some" in page(client, "/").text
    assert "No explanations of this neuron." in page(client, "/neuron/train/0.1.html").text
    assert "There are no explanations yet" in page(client, "/search.html?words=cat").text


def test_exemplars_of_strata(tmp_path):
    runs.write_store(tmp_path / "exemplars.zarr", strata=(0.75,))
    found = page(client_of(tmp_path), "/neuron/train/0.1.html")
    lines = [one.one("div", class_="from").text for one in exemplars(found, "quantile")]
    assert ["from 0.75 to 1 of all sequences" in line for line in lines] == [True, True, False, False]
    assert ["from 0 to 0.75 of all sequences" in line for line in lines] == [False, False, True, True]
    assert "of all sequences" not in found.one("section", id="max").text


def test_a_store_that_says_little_of_itself(run):
    store = jaxplain.open_store(run)
    store.attributes["subject"] = {"id": "made-up"}
    for block in ("corpus", "statistics"):
        store.attributes["config"].pop(block)
    client = TestClient(make_app(Site(store)), base_url="http://localhost")
    assert page(client, "/").one("h1").text == "made-up"
    assert page(client, "/neuron/train/0.1.html").all("li")


def test_explanations_of_another_store(tmp_path, run):
    runs.write_store(tmp_path / "exemplars.zarr", corpora=["another", "one"])
    (tmp_path / "explanations.sqlite").write_bytes((run / "explanations.sqlite").read_bytes())
    found = page(client_of(tmp_path), "/")
    assert "holds explanations of another store" in found.one("p", class_="error").text
    assert not page(client_of(tmp_path), "/neuron/train/0.1.html").all("article")
    with pytest.raises(jaxplain.JaxplainError, match="another store"):
        client_of(tmp_path, explanations=tmp_path)


def test_new_explanations_and_scores_appear(tmp_path):
    runs.write_store(tmp_path / "exemplars.zarr")
    client = client_of(tmp_path)
    assert "correlation" not in page(client, "/").text
    runs.write_explanations(tmp_path / "exemplars.zarr")
    assert "correlation by sim" in page(client, "/").text
    assert page(client, "/neuron/train/0.1.html").all("article")
    fingerprint = jaxplain.open_store(tmp_path).fingerprint
    path = tmp_path / "explanations.sqlite"
    with open_explanations(path, fingerprint=fingerprint, subject="made-up") as database:
        one = Sample(sign="max", sample=0, status="explained", text="new")
        database.finish(1, runs.neurons()[6], [one])
    assert re.search(r"model '\", <i>style</i>\s*4 explained", page(client, "/").text)
    assert re.search(r"gemini, <i>style</i>\s*1 explained", page(client, "/").text)
