"""What a notebook shows."""

import numpy as np
import pytest

import jaxplain
from tests.viewer import runs
from tests.viewer.reading import parse


@pytest.fixture(scope="module")
def split(run):
    return jaxplain.open_store(run)["train"]


def fragment(thing):
    """The HTML, which runs nothing and whose style is for itself alone."""
    found = parse(thing._repr_html_())
    root = found.one("div", class_="notebook")
    assert not found.all("script")
    assert not [e for e in found.all() if any(name.startswith("on") for name in e.attributes)]
    assert not [e for e in found.all() if "id" in e.attributes], "several may be in one page"
    selectors = [line.split("{")[0] for line in root.one("style").text.splitlines() if line[:1] not in " }@"]
    assert selectors
    assert all(".jaxplain" in part for line in selectors for part in line.split(",") if part.strip())
    return root


def test_a_neuron(split):
    neuron = split.neuron(0, 1)
    found = fragment(neuron)
    assert "Layer 0, neuron 1" in found.text
    assert runs.TEXTS[0] in found.text
    assert [len(several.all("li")) for several in found.all("ol")] == [4, 4, 4]
    peaks = [peak.text for peak in found.all("ol")[1].all("span", class_="peak")]
    assert peaks == [f"{e.score:.4g}" for e in neuron.exemplars("min")]


@pytest.mark.parametrize("kind", ["max", "min"])
def test_exemplars(split, kind):
    exemplars = split.neuron(3, 8).exemplars(kind)
    assert isinstance(exemplars, list)
    shown = fragment(exemplars).all("li")
    assert [one.one("span", class_="peak").text for one in shown] == [f"{e.score:.4g}" for e in exemplars]
    for one, exemplar in zip(shown, exemplars, strict=True):
        values = [
            float(cell.attributes["title"])
            for cell in one.one("div", class_="text").all("span")
            if "cut" not in cell.classes and "x" not in cell.classes
        ]
        assert values == pytest.approx(exemplar.activations[1:].tolist(), rel=1e-3)


def test_one_exemplar_and_none(split):
    assert len(fragment(split.neuron(3, 8).exemplars("random")[1]).all("li")) == 1
    assert fragment(split.neuron(3, 8).exemplars(limit=0)).all("li") == []


def test_a_long_list_is_cut(split):
    exemplars = split.neuron(3, 8).exemplars()
    many = type(exemplars)(exemplars * 6)
    found = fragment(many)
    assert len(found.all("li")) == 20
    assert "and 4 more" in found.text


def test_hostile_text_stays_text(split):
    text = "".join(fragment(split.neuron_called(name)).text for name in runs.neurons())
    assert runs.HOSTILE[0].decode() in text
    assert "[U+202E]gnp.exe" in text
    assert "\0" not in text


def test_explanations_of_another_store_do_not_hide_the_neuron(tmp_path, run):
    runs.write_store(tmp_path / "exemplars.zarr", corpora=["another", "one"])
    (tmp_path / "explanations.sqlite").write_bytes((run / "explanations.sqlite").read_bytes())
    found = fragment(jaxplain.open_store(tmp_path)["train"].neuron(0, 1))
    assert len(found.all("ol")) == 3
    assert runs.TEXTS[0] not in found.text


def test_of_which_kind_an_exemplar_is_its_score_says(split):
    for kind in ("max", "min"):
        exemplar = split.neuron(0, 2).exemplars(kind)[0]
        peak = np.nanargmax(exemplar.activations) if kind == "max" else np.nanargmin(exemplar.activations)
        cells = [
            c for c in fragment(exemplar).one("div", class_="text").all("span") if "cut" not in c.classes
        ]
        assert "far" not in cells[int(peak)].classes
        assert cells[int(peak)].classes == {"p8" if kind == "max" else "n8"}
