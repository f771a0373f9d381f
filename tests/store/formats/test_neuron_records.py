"""Trees of NeuronRecords: ours, and such as other tools write."""

import json
import math

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.explain import main as explain
from jaxplain.export import main as export
from jaxplain.ingest import main as ingest
from jaxplain.show import main as show
from jaxplain.store.merging import merge_stores
from tests.store import slices
from tests.store.formats import stores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.write(tmp_path_factory.mktemp("run") / "exemplars.zarr")


@pytest.fixture(scope="module")
def tree(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "tree"
    export([store.zarr_path, "--format", "neuron-records", str(out), "--quiet"])
    return out


def read(tree, layer, index):
    return json.loads((tree / "neurons" / str(layer) / f"{index}.json").read_text("utf-8"))


def record(tokens, activations):
    return {"dataclass_name": "ActivationRecord", "tokens": tokens, "activations": activations}


def write(tree, layer, index, strongest=(), random=(), **fields):
    """A file as neuron-explainer writes it."""
    contents = {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": layer, "neuron_index": index},
        "random_sample": [record(*one) for one in random],
        "random_sample_by_quantile": None,
        "quantile_boundaries": None,
        "mean": 0.25,
        "variance": 2.0,
        "skewness": None,
        "kurtosis": None,
        "most_positive_activation_records": [record(*one) for one in strongest],
    } | fields
    folder = tree / "neurons" / str(layer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index}.json").write_text(json.dumps(contents), "utf-8")


def imported(*arguments):
    ingest([*map(str, arguments)])
    out = arguments[[str(a).startswith("--") for a in [*arguments, "--"]].index(True) - 1]
    return jaxplain.open_store(out)


def test_files_are_where_the_tool_lists_them(store, tree):
    # It takes every numeric name in neurons/ for a layer, and every numeric stem in that for a neuron.
    found = {
        (int(layer.name), int(path.stem))
        for layer in (tree / "neurons").iterdir()
        for path in layer.iterdir()
    }
    assert found == {tuple(name) for name in stores.names(store["train"])}
    assert stores.MISSING not in found
    assert [path.name for path in tree.iterdir()] == ["neurons"]


def test_records_have_all_fields_and_every_value(store, tree):
    split = store["train"]
    for layer, index in stores.names(split):
        neuron, found = split.neuron(layer, index), read(tree, layer, index)
        assert list(found) == [
            "dataclass_name",
            "neuron_id",
            "random_sample",
            "random_sample_by_quantile",
            "quantile_boundaries",
            "mean",
            "variance",
            "skewness",
            "kurtosis",
            "most_positive_activation_records",
        ]
        assert found["neuron_id"] == {
            "dataclass_name": "NeuronId",
            "layer_index": layer,
            "neuron_index": index,
        }
        for moment in ("mean", "variance", "skewness", "kurtosis"):
            assert found[moment] == pytest.approx(getattr(neuron.stats, moment), rel=1e-6)
        for kind, field in (("max", "most_positive_activation_records"), ("random", "random_sample")):
            exemplars = neuron.exemplars(kind)
            assert len(found[field]) == len(exemplars) > 0
            for one, exemplar in zip(found[field], exemplars, strict=True):
                assert one["dataclass_name"] == "ActivationRecord"
                held = ~np.isnan(exemplar.activations)
                assert one["activations"] == exemplar.activations[held].tolist()
                texts = [text for text, counts in zip(exemplar.token_strings, held, strict=True) if counts]
                assert one["tokens"] == texts
                assert "<s>" not in one["tokens"], "its activation is not known"
        assert found["quantile_boundaries"] == list(stores.STRATA)
        samples = found["random_sample_by_quantile"]
        highest = [max(sample[0]["activations"]) for sample in samples]
        assert len(samples) == 3
        assert highest == sorted(highest), "weakest stratum first"


def test_what_is_exported_and_imported_is_the_same(store, tree, tmp_path, capsys):
    back = imported(tree, tmp_path / "back", "--subject", "made-up", "--activation-dtype", "float32")
    assert "7 neurons and" in capsys.readouterr().out
    old, new = store["train"], back["train"]
    assert stores.names(new) == stores.names(old)
    assert new.kinds == ("max", "random", "quantile")
    assert new.strata == old.strata
    for layer, index in stores.names(old):
        ours, theirs = old.neuron(layer, index), new.neuron(layer, index)
        for kind in ("max", "random"):
            for mine, other in zip(ours.exemplars(kind), theirs.exemplars(kind), strict=True):
                assert other.activations.tolist() == stores.counted(old, mine)[1]
                assert other.score == mine.score or (kind == "random" and math.isnan(other.score))
        samples = [
            sorted((e.stratum, e.score, stores.counted(split, e)[1]) for e in neuron.exemplars("quantile"))
            for split, neuron in ((old, ours), (new, theirs))
        ]
        assert samples[0] == samples[1]
        assert theirs.stats.mean == pytest.approx(ours.stats.mean, rel=1e-6)
        assert theirs.stats.kurtosis == pytest.approx(ours.stats.kurtosis, rel=1e-6)
        assert theirs.stats.count == 0, "no record tells it"
        assert math.isnan(theirs.stats.fraction_active)


def test_an_imported_store_says_what_it_does_not_know(tree, tmp_path):
    back = imported(tree, tmp_path / "back")
    told = back.attributes["imported"]
    assert told["format"] == "neuron-records"
    assert told["sources"] == [str(tree)]
    assert "exemplars of kind min" in told["not_known"]
    assert any("count" in one for one in told["not_known"])
    with pytest.raises(JaxplainError, match="holds no exemplars of kind 'min'"):
        back["train"].neuron(1, 2).exemplars("min")
    assert math.isnan(back["train"].neuron(1, 2).quantile(0.999))


def test_trees_of_the_older_extractor(tmp_path):
    # Its tokens are those of the byte-level tokenizer, and it knows no higher moments and no quantiles.
    write(
        tmp_path / "old",
        3,
        11,
        strongest=[(["\u0120the", "\u0120cat", "\u010a"], [0.5, 4.0, -1.0]), (["\u00c3\u00a9"], [1.5])],
        random=[(["a"], [-0.5])],
    )
    split = imported(tmp_path / "old", tmp_path / "out")["train"]
    neuron = split.neuron(3, 11)
    first, second = neuron.exemplars("max")
    assert first.text == " the cat\n"
    assert second.text == "é"
    assert first.activations.tolist() == [0.5, 4.0, -1.0]
    assert (first.score, second.score) == (4.0, 1.5)
    assert neuron.exemplars("random")[0].text == "a"
    assert (neuron.stats.mean, neuron.stats.variance) == (0.25, 2.0)
    assert math.isnan(neuron.stats.kurtosis)


def test_token_form_can_be_told(tmp_path):
    write(tmp_path / "old", 0, 0, strongest=[(["\u0120the"], [1.0])])
    split = imported(tmp_path / "old", tmp_path / "out", "--token-form", "text")["train"]
    assert split.neuron(0, 0).exemplars()[0].text == "\u0120the"


def test_published_trees_without_the_folder_neurons(tmp_path):
    write(tmp_path / "old", 0, 0, strongest=[(["a"], [1.0])])
    split = imported(tmp_path / "old" / "neurons", tmp_path / "out")["train"]
    assert split.neuron(0, 0).exemplars()[0].text == "a"


def test_several_trees_are_merged(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 0, 0, [(["x", "y"], [1.0, 5.0]), (["z"], [2.0])], [(["r"], [0.0]), (["s"], [0.0])])
    write(b, 0, 0, [(["w"], [3.0]), (["z"], [2.0])], [(["t"], [0.0])])
    write(b, 2, 1, [(["q"], [1.0])])
    split = imported(a, b, tmp_path / "out")["train"]
    neuron = split.neuron(0, 0)
    assert [e.text for e in neuron.exemplars("max")] == ["xy", "w"], "the strongest of both, each once"
    assert [e.text for e in neuron.exemplars("random")] == ["r", "t"], "in turn"
    assert math.isnan(neuron.stats.mean), "how many tokens each mean is of is not known"
    assert split.neuron(2, 1).stats.mean == 0.25
    assert stores.names(split) == [(0, 0), (2, 1)]


def test_moments_of_several_trees_are_pooled_where_their_tokens_are_known(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 0, 0, [(["x"], [1.0])], mean=1.0, variance=0.5, skewness=0.0)
    write(b, 0, 0, [(["y"], [1.0])], mean=4.0, variance=1.0)
    stats = imported(a, b, tmp_path / "out", "--tokens-seen", 100, 200)["train"].neuron(0, 0).stats
    assert stats.count == 300
    assert stats.mean == pytest.approx(3.0)
    assert stats.variance == pytest.approx((100 * (0.5 + 4) + 200 * (1 + 1)) / 300)
    assert math.isnan(stats.skewness), "one tree does not tell it"


def test_a_record_twice_in_a_list_is_one(tmp_path):
    # The older script that merged trees counted random records among the strongest again.
    write(tmp_path / "old", 0, 0, [(["x"], [2.0]), (["y"], [1.0]), (["x"], [2.0])])
    neuron = imported(tmp_path / "old", tmp_path / "out")["train"].neuron(0, 0)
    assert [e.text for e in neuron.exemplars()] == ["x", "y"]


def test_lists_are_sorted_and_cut(tmp_path):
    write(tmp_path / "old", 0, 0, [(["x"], [1.0]), (["y"], [3.0]), (["z"], [2.0])])
    neuron = imported(tmp_path / "old", tmp_path / "out", "--k", 2)["train"].neuron(0, 0)
    assert [e.text for e in neuron.exemplars()] == ["y", "z"]


def test_samples_by_quantile_need_levels(tmp_path):
    samples = {
        "random_sample_by_quantile": [[record(["x"], [1.0])], [record(["y"], [3.0])]],
        "quantile_boundaries": [2.5],
    }
    write(tmp_path / "old", 0, 0, [(["y"], [3.0])], **samples)
    assert imported(tmp_path / "old", tmp_path / "out")["train"].kinds == ("max",), "2.5 is no level"
    split = imported(tmp_path / "old", tmp_path / "with", "--strata", "0.9")["train"]
    assert [(e.text, e.stratum) for e in split.neuron(0, 0).exemplars("quantile")] == [
        ("y", (0.9, 1.0)),
        ("x", (0.0, 0.9)),
    ]
    with pytest.raises(JaxplainError, match="samples of 2 quantiles, but there are 2 levels"):
        imported(tmp_path / "old", tmp_path / "bad", "--strata", "0.5", "0.9")


def test_activations_that_are_not_known_do_not_count(tmp_path):
    write(tmp_path / "old", 0, 0, [(["x", "y"], [None, -3.0])])
    [exemplar] = imported(tmp_path / "old", tmp_path / "out")["train"].neuron(0, 0).exemplars()
    assert exemplar.score == -3.0
    assert np.isnan(exemplar.activations[0])


def test_hostile_texts_stay_texts(tmp_path):
    texts = ["<script>", "\x00", "\u202e", "x" * 100_000, "\ud800", ""]
    write(tmp_path / "old", 0, 0, [(texts, [1.0] * len(texts))])
    [exemplar] = imported(tmp_path / "old", tmp_path / "out")["train"].neuron(0, 0).exemplars()
    assert "".join(exemplar.token_strings[:4]) == "".join(texts[:4])


BAD = [
    ("not json", "could not be read"),
    ("[]", "is no NeuronRecord"),
    (json.dumps({"neuron_id": {"layer_index": 0, "neuron_index": 5}}), "lies where neuron 0 of layer 0"),
    (
        json.dumps(
            {
                "neuron_id": {"layer_index": 0, "neuron_index": 0},
                "most_positive_activation_records": [record(["a", "b"], [1.0])],
            }
        ),
        "2 tokens and 1 activations",
    ),
    (
        json.dumps(
            {
                "neuron_id": {"layer_index": 0, "neuron_index": 0},
                "most_positive_activation_records": [{"tokens": ["a"]}],
            }
        ),
        "must have tokens and activations",
    ),
    (json.dumps({"neuron_id": {"layer_index": 0, "neuron_index": 0}}), "holds no records of neurons"),
]


@pytest.mark.parametrize(("text", "match"), BAD)
def test_damaged_files_are_named_and_leave_no_store(tmp_path, text, match):
    folder = tmp_path / "old" / "neurons" / "0"
    folder.mkdir(parents=True)
    (folder / "0.json").write_text(text)
    with pytest.raises(JaxplainError, match=match):
        imported(tmp_path / "old", tmp_path / "out")
    with pytest.raises(JaxplainError, match=r"there is no store|incomplete"):
        jaxplain.open_store(tmp_path / "out")


def test_other_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(JaxplainError, match="holds nothing that can be imported"):
        imported(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(JaxplainError, match="is no folder"):
        imported(tmp_path / "none", tmp_path / "out")
    write(tmp_path / "old", 0, 0, [(["x"], [1.0])])
    with pytest.raises(JaxplainError, match="which lies in"):
        imported(tmp_path / "old", tmp_path / "old" / "out")
    with pytest.raises(JaxplainError, match="OUT is gs://bucket/run; name a folder on a local disk"):
        imported(tmp_path / "old", "gs://bucket/run")
    with pytest.raises(JaxplainError, match="--pad-token is for transluce"):
        imported(tmp_path / "old", tmp_path / "out", "--pad-token", 1)
    with pytest.raises(JaxplainError, match="--tokens-seen has 2 numbers, but 1 folders"):
        imported(tmp_path / "old", tmp_path / "out", "--tokens-seen", 1, 2)


def test_a_store_is_replaced_only_where_asked_for(tmp_path):
    write(tmp_path / "old", 0, 0, [(["x"], [1.0])])
    imported(tmp_path / "old", tmp_path / "out")
    with pytest.raises(JaxplainError, match="exists already"):
        imported(tmp_path / "old", tmp_path / "out")
    write(tmp_path / "old", 0, 0, [(["new"], [1.0])])
    split = imported(tmp_path / "old", tmp_path / "out", "--overwrite")["train"]
    assert split.neuron(0, 0).exemplars()[0].text == "new"


def test_many_chunks_and_scattered_neurons(tmp_path, monkeypatch):
    from jaxplain.store.formats import neuron_record_source

    monkeypatch.setattr(neuron_record_source, "_NEURONS_AT_ONCE", 2)
    for layer, index in ((0, 9), (0, 100), (0, 3), (7, 9), (7, 4)):
        write(tmp_path / "old", layer, index, [([f"{layer}.{index}"], [float(index)])])
    split = imported(tmp_path / "old", tmp_path / "out")["train"]
    assert stores.names(split) == [(0, 3), (0, 9), (0, 100), (7, 4), (7, 9)]
    for layer, index in stores.names(split):
        assert [e.text for e in split.neuron(layer, index).exemplars()] == [f"{layer}.{index}"]


def test_export_takes_layers_and_ranks(store, tmp_path):
    export(
        [
            store.zarr_path,
            str(tmp_path / "out"),
            "--format",
            "neuron-records",
            "--layers",
            "4",
            "--limit",
            "2",
        ]
    )
    assert [path.name for path in (tmp_path / "out" / "neurons").iterdir()] == ["4"]
    assert len(read(tmp_path / "out", 4, 0)["most_positive_activation_records"]) == 2


def test_export_in_small_blocks(store, tree, tmp_path, monkeypatch):
    from jaxplain.store.formats import neurons

    monkeypatch.setattr(neurons, "_MOST_NEURONS", 1)
    export([store.zarr_path, str(tmp_path / "out"), "--format", "neuron-records"])
    for layer, index in stores.names(store["train"]):
        assert read(tmp_path / "out", layer, index) == read(tree, layer, index)


def test_imported_stores_are_not_merged_but_told_apart_and_shown(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path / name, 0, 0, [([name], [1.0])])
    one, other = (imported(tmp_path / name, tmp_path / f"out-{name}") for name in ("a", "b"))
    assert one.fingerprint != other.fingerprint
    own = slices.write(tmp_path / "own.zarr", slices.run([(1, 0, 0)]))
    for stores_ in ([one.zarr_path, other.zarr_path], [own, other.zarr_path]):
        with pytest.raises(
            JaxplainError, match="was imported from neuron-records, which does not tell what merging"
        ):
            merge_stores(str(tmp_path / "merged"), stores_, stores.SILENT)
    capsys.readouterr()
    show([str(tmp_path / "out-a"), "--layer", "0", "--neuron", "0"])
    assert "over a number of tokens that is not known: mean 0.250" in capsys.readouterr().out


def test_an_imported_neuron_can_be_explained(tmp_path):
    write(
        tmp_path / "old",
        0,
        0,
        [([" a", " cat"], [0.0, 5.0]), ([" my", " cat"], [0.0, 4.0])],
        [([" a"], [0.0])],
    )
    store = imported(tmp_path / "old", tmp_path / "out")
    explain(
        [
            *("--store", str(tmp_path / "out"), "--signs", "[max]"),
            *("--explainer.provider", "token_table", "--prompt.tokens", "1"),
        ]
    )
    [explanation] = store["train"].neuron(0, 0).explanations()
    assert "cat" in explanation.text
