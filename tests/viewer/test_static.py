"""Pages as files: the same as those that are served, and every link leads to one of them."""

import json
import re
from urllib.parse import urlsplit

import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.viewer.site import Site
from jaxplain.viewer.static_site import write_site
from tests.viewer import runs
from tests.viewer.reading import assert_harmless, parse

QUIET = progress_bars(enabled=False)


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("static") / "site"
    files, size = write_site(Site(jaxplain.open_store(run)), folder, shown=20, progress=QUIET)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert (files, size) == (len(paths), sum(path.stat().st_size for path in paths))
    return folder


def test_every_neuron_of_every_split_has_its_page(out):
    held = {
        f"neuron/{split}/{n.layer}.{n.index}.html" for split in ("train", "valid") for n in runs.neurons()
    }
    assert {str(path.relative_to(out)) for path in (out / "neuron").rglob("*.html")} == held
    assert (out / "overview" / "valid.html").is_file()


def test_links_lead_to_files(out):
    pages = list(out.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        page = parse(path.read_text(encoding="utf-8"))
        assert_harmless(page)
        for element in page.all():
            for name in ("href", "src", "action"):
                address = urlsplit(element.attributes.get(name) or "")
                if address.scheme == "data" or not address.path:
                    continue
                target = (path.parent / address.path).resolve()
                assert target.is_file(), f"{path.name} leads to {address.path}"
                assert target.is_relative_to(out.resolve())
        policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
        assert "default-src 'none'" in policy
        assert "http" not in policy


@pytest.mark.parametrize("name", ["0.1", "0.5", "3.8"])
def test_a_neurons_file_says_what_its_page_says(out, client, name):
    served = parse(client.get(f"/neuron/train/{name}.html").text).one("main")
    written = parse((out / "neuron" / "train" / f"{name}.html").read_text(encoding="utf-8")).one("main")
    assert served.text == written.text


def test_only_the_chosen_neurons(run, tmp_path):
    chosen = [runs.neurons()[1], runs.neurons()[4]]
    site = Site(jaxplain.open_store(run), chosen=chosen)
    write_site(site, tmp_path / "out", shown=1, progress=QUIET)
    assert sorted(path.name for path in (tmp_path / "out" / "neuron" / "train").iterdir()) == [
        "0.2.html",
        "0.8.html",
    ]
    page = parse((tmp_path / "out" / "neuron" / "train" / "0.2.html").read_text(encoding="utf-8"))
    ends = [a.attributes["href"] for a in page.all("a", rel="next")]
    assert ends == ["../../neuron/train/0.8.html"]
    assert len(page.one("section", id="max").all("li")) == 1
    overview = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"neurons on these pages</th><td>2<", overview)


def test_what_the_search_of_files_knows(out, run):
    text = (out / "assets" / "neurons.js").read_text(encoding="utf-8")
    known = json.loads(text.removeprefix("window.jaxplainNeurons = ").removesuffix(";\n"))
    assert len(known["rows"]) == 2 * len(runs.neurons())
    first = known["rows"][0]
    assert first["name"] == list(runs.neurons()[0])
    assert first["explanations"] == [["max", runs.TEXTS[0]]]
    values = dict(zip(known["columns"], first["values"], strict=True))
    assert values["mean"] == pytest.approx(float(runs.statistics(0)["mean"][0]), rel=1e-7)
    unknown = known["rows"][2]
    assert dict(zip(known["columns"], unknown["values"], strict=True))["kurtosis"] is None


def test_a_folder_that_is_there_is_kept(run, tmp_path):
    site = Site(jaxplain.open_store(run), chosen=runs.neurons()[:1])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(JaxplainError, match="exists already"):
        write_site(site, out, shown=1, progress=QUIET)
    assert (out / "mine.txt").read_text() == "mine"
    write_site(site, out, shown=1, progress=QUIET, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "index.html").is_file()


def test_pages_that_fail_leave_nothing(run, tmp_path, monkeypatch):
    from jaxplain.viewer import static_site

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(static_site, "_peak_tokens", full)
    with pytest.raises(JaxplainError, match="No space left on device"):
        write_site(Site(jaxplain.open_store(run)), tmp_path / "out", shown=1, progress=QUIET)
    assert list(tmp_path.iterdir()) == []
