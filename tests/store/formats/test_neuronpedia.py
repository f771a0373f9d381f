"""Neuronpedia's batches: ours, and such as Neuronpedia exports."""

import gzip
import json
import math

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.export import main as export
from jaxplain.ingest import main as ingest
from jaxplain.store.formats import neuronpedia
from tests.store.formats import stores

MODEL = "made-up-instruct"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = stores.write(tmp_path_factory.mktemp("run") / "exemplars.zarr")
    stores.explain(store)
    return store


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export([store.zarr_path, str(out), "--format", "neuronpedia", "--quiet"])
    return out / MODEL


def lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def imported(source, out, *arguments):
    ingest([str(source), str(out), "--quiet", *arguments])
    return jaxplain.open_store(out)


def test_files_and_tables_are_neuronpedias(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["1", "4"], "a layer's neurons are its number"
    assert sorted(path.relative_to(folder / "1").as_posix() for path in (folder / "1").rglob("*.jsonl*")) == [
        "activations/batch-0.jsonl.gz",
        "explanations/batch-0.jsonl.gz",
        "features/batch-0.jsonl.gz",
        "model.jsonl",
        "release.jsonl",
        "source.jsonl",
        "sourceset.jsonl",
    ]
    [model], [source], [release], [sourceset] = (
        lines(folder / "4" / f"{name}.jsonl") for name in ("model", "source", "release", "sourceset")
    )
    assert (model["id"], model["layers"], model["neuronsPerLayer"]) == (MODEL, 6, 7)
    assert (source["id"], source["modelId"], source["setName"]) == ("4", MODEL, "neurons")
    assert source["num_prompts"] == stores.SEQUENCES
    assert sourceset["releaseName"] == release["name"]
    assert {row["creatorId"] for row in (model, source, release, sourceset)} == {neuronpedia.DEFAULT_CREATOR}


def test_features_and_activations_have_every_value(store, folder):
    split = store["train"]
    for layer in stores.LAYERS:
        features = lines(folder / str(layer) / "features" / "batch-0.jsonl.gz")
        activations = lines(folder / str(layer) / "activations" / "batch-0.jsonl.gz")
        names = [name for name in stores.names(split) if name.layer == layer]
        assert [row["index"] for row in features] == [str(name.index) for name in names]
        assert len({row["id"] for row in activations}) == len(activations)
        for name, feature in zip(names, features, strict=True):
            neuron = split.neuron_called(name)
            assert (feature["modelId"], feature["layer"]) == (MODEL, str(layer))
            assert feature["frac_nonzero"] == pytest.approx(neuron.stats.fraction_active)
            assert feature["maxActApprox"] == max(0, neuron.exemplars("max")[0].score)
            mine = [row for row in activations if row["index"] == str(name.index)]
            both = [(kind, e) for kind in ("max", "min") for e in neuron.exemplars(kind)]
            for row, (kind, exemplar) in zip(mine, both, strict=True):
                values = np.nan_to_num(exemplar.activations).tolist()
                assert row["dataIndex"] == f"{kind}/{exemplar.rank}"
                assert row["dataSource"] == exemplar.corpus
                assert row["tokens"] == exemplar.token_strings
                assert row["values"] == values
                assert (row["maxValue"], row["minValue"]) == (max(values), min(values))
                assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
                assert row["values"][0] == 0, "a token that does not count"


def test_explanations_are_lines(folder):
    up, down = lines(folder / "1" / "explanations" / "batch-0.jsonl.gz")
    assert up["description"] == 'words that "rise" <b>'
    assert (up["layer"], up["index"], up["authorId"]) == ("1", "2", neuronpedia.DEFAULT_CREATOR)
    assert [json.loads(row["notes"])["sign"] for row in (up, down)] == ["max", "min"]
    assert not (folder / "4" / "explanations").exists()


@pytest.mark.parametrize("experts", [None, 2])
def test_what_is_exported_and_imported_is_the_same(tmp_path, experts):
    store = stores.write(tmp_path / "run" / "exemplars.zarr", experts=experts)
    stores.explain(store, experts=experts is not None)
    export([store.zarr_path, str(tmp_path / "out"), "--format", "neuronpedia", "--quiet"])
    if experts:
        places = sorted(path.name for path in (tmp_path / "out" / MODEL).iterdir())
        assert places == [f"{layer}-neurons__expert{e}" for layer in stores.LAYERS for e in range(2)]
    back = imported(tmp_path / "out", tmp_path / "back")
    assert back.attributes["subject"]["id"] == MODEL
    old, new = store["train"], back["train"]
    assert stores.names(new) == stores.names(old)
    for name in stores.names(old):
        ours, theirs = old.neuron_called(name), new.neuron_called(name)
        for kind in ("max", "min"):
            # What does not count has become a 0, which may be the extreme, so order is not compared.
            mine, others = (
                sorted((e.text, np.nan_to_num(e.activations).tolist()) for e in neuron.exemplars(kind))
                for neuron in (ours, theirs)
            )
            assert others == mine
        assert theirs.stats.fraction_active == pytest.approx(ours.stats.fraction_active)
        assert math.isnan(theirs.stats.mean)
        found = [
            [(e.sign, e.text, e.provider, e.model, e.style) for e in n.explanations()] for n in (ours, theirs)
        ]
        assert found[0] == found[1]


def test_neuronpedias_own_exports(tmp_path):
    # Features come in the order of their indices as texts, and rows have columns that mean nothing here.
    source = tmp_path / "gpt2-small" / "6-res-jb"
    write(
        source / "features" / "batch-0.jsonl.gz",
        [
            {
                "modelId": "gpt2-small",
                "layer": "6-res-jb",
                "index": index,
                "frac_nonzero": 0.5,
                "pos_str": ["a"],
            }
            for index in ("1", "10", "2")
        ],
    )
    tokens = ["\u2581the", "\u2581cat"]
    write(
        source / "activations" / "batch-0.jsonl.gz",
        [
            {"id": "c1", "index": "10", "tokens": tokens, "values": [0, 2], "dataIndex": None, "binMin": -1},
            {"id": "c2", "index": "1", "tokens": tokens, "values": [3.5, 0]},
            {"id": "c3", "index": "10", "tokens": ["\u2581a"], "values": [9]},
        ],
    )
    write(
        source / "explanations" / "batch-0.jsonl.gz",
        [
            {"id": "e1", "index": "10", "description": "cats", "typeName": "np_max-act", "authorId": "x"},
            {"id": "e2", "index": "10", "description": "pets", "typeName": "np_max-act", "notes": "by hand"},
        ],
    )
    split = imported(source, tmp_path / "out")["train"]
    assert [(name.layer, name.index) for name in stores.names(split)] == [(6, 1), (6, 2), (6, 10)]
    neuron = split.neuron(6, 10)
    assert [(e.text, e.score) for e in neuron.exemplars()] == [(" a", 9.0), (" the cat", 2.0)]
    assert split.neuron(6, 2).exemplars() == []
    assert neuron.stats.fraction_active == 0.5
    assert [(e.text, e.provider, e.style, e.sample) for e in neuron.explanations()] == [
        ("cats", "neuronpedia", "np_max-act", 0),
        ("pets", "neuronpedia", "np_max-act", 1),
    ]


def test_explanations_in_any_order_and_without_text(tmp_path, capsys):
    source = tmp_path / "tiny" / "6-np"
    write(source / "features" / "batch-0.jsonl.gz", [{"index": "1"}, {"index": "2"}])
    write(
        source / "activations" / "batch-0.jsonl.gz",
        [{"index": i, "tokens": ["a", "b"], "values": [0, 2]} for i in ("1", "2")],
    )
    first = [{"index": "1", "description": "one"}, {"index": "2", "description": "two"}]
    second = [{"index": "1", "description": text} for text in ("again", "  ", None)]
    write(source / "explanations" / "batch-0.jsonl.gz", first)
    write(source / "explanations" / "batch-1.jsonl.gz", second)
    ingest([str(source), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "3 explanations are beside the store" in said
    assert "2 explanations had no text and were left out" in said
    split = jaxplain.open_store(tmp_path / "out")["train"]
    assert [(e.text, e.sample) for e in split.neuron(6, 1).explanations()] == [("one", 0), ("again", 1)]
    assert [e.text for e in split.neuron(6, 2).explanations()] == ["two"]


def test_explanations_that_are_there_are_not_replaced_unasked(folder, tmp_path):
    (tmp_path / "explanations.sqlite").write_text("paid for")
    with pytest.raises(JaxplainError, match=r"explanations.sqlite exists already; .* --overwrite"):
        imported(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["explanations.sqlite"]
    assert imported(folder, tmp_path, "--overwrite")["train"].neuron(1, 2).explanations()


def test_batches_have_so_many_neurons(store, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_NEURONS_PER_BATCH", 3)
    export([store.zarr_path, str(tmp_path), "--format", "neuronpedia", "--model", "other", "--layers", "1"])
    place = tmp_path / "other" / "1"
    batches = [lines(place / "features" / f"batch-{number}.jsonl.gz") for number in range(2)]
    assert [[row["index"] for row in batch] for batch in batches] == [["0", "2", "3"], ["5"]]
    whole = lines(folder / "1" / "activations" / "batch-0.jsonl.gz")
    parts = [row for number in range(2) for row in lines(place / "activations" / f"batch-{number}.jsonl.gz")]
    assert [row["values"] for row in parts] == [row["values"] for row in whole]
    back = imported(tmp_path / "other", tmp_path / "back")["train"]
    assert [name.index for name in stores.names(back)] == [0, 2, 3, 5]


def test_what_does_not_fit_is_refused(store, tmp_path):
    with pytest.raises(JaxplainError, match="--model is 'A B'"):
        export([store.zarr_path, str(tmp_path / "out"), "--format", "neuronpedia", "--model", "A B"])
    row = {"index": "1", "tokens": ["a"], "values": [1]}
    write(tmp_path / "m" / "6-res-jb" / "activations" / "batch-0.jsonl.gz", [row])
    write(tmp_path / "m" / "6-att-kk" / "activations" / "batch-0.jsonl.gz", [row])
    with pytest.raises(JaxplainError, match="sets of sources att-kk, res-jb; import them one by one"):
        imported(tmp_path / "m", tmp_path / "out")
    write(tmp_path / "n" / "first" / "activations" / "batch-0.jsonl.gz", [row])
    with pytest.raises(JaxplainError, match="does not begin with a layer's number"):
        imported(tmp_path / "n", tmp_path / "out")
    write(tmp_path / "k" / "6" / "activations" / "batch-0.jsonl.gz", [row])
    write(tmp_path / "k" / "6" / "activations" / "batch-1.jsonl.gz", [row])
    with pytest.raises(JaxplainError, match="layer 6, neuron 1 is in the source twice"):
        imported(tmp_path / "k", tmp_path / "out")
    torn = tmp_path / "k" / "6" / "activations" / "batch-1.jsonl.gz"
    torn.write_bytes(torn.read_bytes()[:-12])
    with pytest.raises(JaxplainError, match=r"batch-1.jsonl.gz could not be read"):
        imported(tmp_path / "k", tmp_path / "out")
