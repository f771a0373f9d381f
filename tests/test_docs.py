"""The pages under docs/: what they say of the code is so, their links lead somewhere, their code runs."""

import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

import jaxplain.configs
from jaxplain.store import schema
from tests.store import slices

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]

IDENTIFIER = re.compile(r"^::: (\S+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
MODULE = re.compile(r"`((?:jaxplain|tests|launch|benchmarks|configs|docs)/[\w./-]+)`")


def name_of(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    return BLOCK.sub("", text)


def anchors(page):
    """What a page's headings are called in links, as the table of contents names them."""
    titles = HEADING.findall(without_code(page.read_text()))
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_module_of_configs_is_on_a_page():
    """Reference pages are made of docstrings: what is not named on one of them is nowhere."""
    shown = {name for page in PAGES for name in IDENTIFIER.findall(page.read_text())}
    public = {m.name for m in pkgutil.iter_modules(jaxplain.configs.__path__, "jaxplain.configs.")}
    assert public, "the package of configs is where it was"
    assert public <= shown


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        if isinstance(entry, dict):
            return [leaf for value in entry.values() for leaf in leaves(value)]
        return [leaf for value in entry for leaf in leaves(value)] if isinstance(entry, list) else [entry]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(leaves(config["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    for name in MODULE.findall(page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a small made-up store where the pages have theirs."""
    folder = tmp_path_factory.mktemp("workspace")
    slices.write(
        folder / "runs/smollm2" / schema.STORE_NAME,
        slices.run([(document, 0, 0) for document in range(8)]),
    )
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_runs(page, workspace, monkeypatch):
    """All blocks of a page one after the other, as a reader would run them."""
    monkeypatch.chdir(workspace)
    names = {"__name__": "__main__"}
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, name_of(page), "exec"), names)


def stated_arrays():
    """Arrays in the schema's table: axes, dtype and fill by name."""
    rows = re.findall(r"^\| `([^`]+)` \| \[([^]]+)\] \| (\w+) \| (\S+) \|", page_of_schema(), re.MULTILINE)
    return {name: (axes.split(", "), dtype, fill) for name, axes, dtype, fill in rows}


def page_of_schema():
    return (DOCS / "store-schema.md").read_text()


@pytest.mark.parametrize("experts", [None, 3])
def test_the_schema_on_the_page_is_that_of_the_code(experts):
    """Every array that the writer makes is in the table, with its axes, dtype and fill; and no other."""
    sizes = {"layers": 2, "neurons": 5, "experts": experts}
    kind = {"k": 3, "tokens": 4, "activation_dtype": "float16"}
    axes = ["layer", "neuron"] if experts is None else ["layer", "expert", "neuron"]
    made = {f"vocabulary/{n}": s for n, s in schema.vocabulary_arrays(tokens=6, characters=9).items()}
    groups = {
        "": {
            "layer": schema.vector("layer", 2, "int32"),
            "neuron": schema.vector("neuron", 5, "int32"),
            "quantile": schema.vector("quantile", 3, "float64"),
        }
        | (
            {}
            if experts is None
            else {
                "expert": schema.vector("expert", experts, "int32"),
                "shared": schema.shared_array(layers=2, experts=experts),
            }
        ),
        "sequences/": schema.sequence_arrays(sequences=7, tokens=4),
        "<kind>/": schema.kind_arrays(**sizes, **kind),
        "quantile_sample/": schema.kind_arrays(**sizes, **kind, strata=2),
        "stats/": schema.statistics_arrays(**sizes, quantiles=3),
        "sample/": schema.sample_arrays(**sizes, tokens=6, activation_dtype="float16"),
        "token_table/": schema.token_table_arrays(neurons=2, tokens=3, has_experts=experts is not None),
    }
    made |= {f"<split>/{group}{n}": s for group, specs in groups.items() for n, s in specs.items()}
    stated = stated_arrays()
    named = set()
    for name, spec in made.items():
        row = re.sub(r"token_table/(max|min)/", "token_table/<sign>/", name)
        row = row.replace("chosen_expert", "chosen_layer")
        if row not in stated:  # kind quantile has what all kinds have
            row = row.replace("quantile_sample/", "<kind>/")
        stated_axes, dtype, fill = stated[row]
        named.add(row)
        expected = [a for axis in stated_axes for a in (axes if axis == "…" else [axis])]
        if "…" in stated_axes:
            expected.remove("neuron")
        assert list(spec.dimensions) == expected, name
        assert spec.dtype == dtype.replace("F16", "float16"), name
        assert str(spec.fill) == fill, name
    assert named == {
        row for row in stated if experts is not None or row.split("/")[1] not in ("expert", "shared")
    }


def test_a_store_has_the_arrays_on_the_page(workspace):
    """And nothing else: what the writer leaves is what zarr-python finds."""
    stated = stated_arrays()
    root = zarr.open_group(workspace / "runs/smollm2" / schema.STORE_NAME, mode="r")
    found = [name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Array)]
    assert len(found) > 20
    for name in found:
        row = name if name.startswith("vocabulary/") else re.sub(r"^[^/]+/", "<split>/", name)
        row = re.sub(r"/(max|min|random)/", "/<kind>/", row)
        assert row in stated, name
        array = root[name]
        fill = array.fill_value
        assert stated[row][2] == ("NaN" if np.isnan(fill) else str(int(fill))), name
        assert dict(array.attrs) == {}
    for attribute in root.attrs:
        assert f"| `{attribute}` |" in page_of_schema(), attribute
