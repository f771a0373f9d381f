"""What is refused because it is no slice of the same run, by the name of what differs and both values."""

import re

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.store.merging import merge_stores
from tests.store import slices


def merge(out, *paths):
    merge_stores(str(out), paths, progress_bars(enabled=False))
    return jaxplain.open_store(out)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two slices that can be merged."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        slices.write(folder / f"{name}.zarr", slices.run([(document, 0, 0), (document + 1, 0, 0)]))
        for name, document in (("a", 1), ("b", 3))
    ]


def refusal(tmp_path, *paths):
    with pytest.raises(JaxplainError) as caught:
        merge(tmp_path / "out", *paths)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "refused before anything is written"
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("subject.weight_hash", "xyz", ("'abc'", "'xyz'")),
        ("subject.architecture", {"layers": 6}, ("{'layers': 5}", "{'layers': 6}")),
        ("tokenizer_hash", "ghi", ("'def'", "'ghi'")),
        ("tokenizer_hash", None, ("'def'", "its default")),
        ("config.subject.dtype", "bfloat16", ("'float32'", "'bfloat16'")),
        ("config.corpus.sequence_length", 5, ("4", "5")),
        ("config.corpus.windows", "head", ("its default", "'head'")),
        ("config.corpus.stride", 2, ("None", "2")),
        ("config.corpus.separator", False, ("True", "False")),
        ("config.corpus.chat_prefix", True, ("its default", "True")),
        ("config.corpus.deduplicate", True, ("its default", "True")),
        ("config.corpus.exclude.first", 1, ("0", "1")),
        ("config.corpus.exclude.special", False, ("True", "False")),
        ("config.corpus.exclude.tokens", [5], ("[]", "[5]")),
        ("config.corpus.splits", {"train": 0.5}, ("[('train', 1.0)]", "[('train', 0.5)]")),
        ("config.corpus.seed", 4, ("3", "4")),
        ("config.exemplars.k", 4, ("3", "4")),
        ("config.exemplars.kinds", ["max", "min"], ("['max', 'min', 'random']", "['max', 'min']")),
        ("config.exemplars.splits", ["train", "valid"], ("['train']", "['train', 'valid']")),
        ("config.exemplars.activation_dtype", "float32", ("'float16'", "'float32'")),
        ("config.statistics.active_above", 1.0, ("0.0", "1.0")),
        ("config.statistics.quantiles", [0.5], ("[0.0, 0.1, 0.5, 0.9, 1.0]", "[0.5]")),
        ("config.statistics.sampled_tokens", 7, ("6", "7")),
        ("config.corpus.something_new", 1, ("its default", "1")),
    ],
)
def test_a_field_that_differs_is_named_with_both_values(stores, tmp_path, field, value, shown):
    a, b = stores
    other = slices.changed(b, tmp_path / "other.zarr", field, value)
    name = field.removeprefix("config.")
    ours, theirs = shown
    assert refusal(tmp_path, a, other).startswith(
        f"{name} is {ours} in {a} and {theirs} in {other}; only stores that agree in it can be merged"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject.id", "the/same/elsewhere"),
        ("subject.revision", "main"),
        ("config.subject.id", "the/same/elsewhere"),
        ("config.subject.revision", "main"),
        ("config.output", "elsewhere"),
        ("config.run.batch_size", 64),
        ("config.run.mesh", {"data": 8, "model": 1}),
        ("config.corpus.max_sequences", 7),
        ("config.corpus.expected_sequences", 7),
        ("config.corpus.when_exhausted", "continue"),
        ("config.corpus.valueeval_dir", "here"),
        ("config.neurons.layers", [1, 4]),
        ("config.exemplars.kinds", ["random", "min", "max"]),
        ("jaxplain_version", "0.0"),
    ],
)
def test_what_slices_may_differ_in(stores, tmp_path, field, value):
    a, b = stores
    merged = merge(tmp_path / "out", a, slices.changed(b, tmp_path / "other.zarr", field, value))
    assert merged["train"].sequence_count == 4


def test_the_seed_matters_only_where_something_is_drawn(tmp_path):
    plain = {"exemplars": {"kinds": ["max", "min"]}, "statistics": {"quantiles": []}}
    arrays = slices.run([(1, 0, 0)])
    a = slices.write(tmp_path / "a.zarr", arrays, changes=slices.config(**plain))
    b = slices.changed(a, tmp_path / "b.zarr", "config.corpus.seed", 4)
    merge(tmp_path / "out", a, b)
    for number, changes in enumerate(
        (
            {"exemplars": {"kinds": ["max", "random"]}, "statistics": {"quantiles": []}},
            {"exemplars": {"kinds": ["max"]}},
            plain | {"corpus": {"windows": "random"}},
        )
    ):
        a = slices.write(tmp_path / f"a{number}.zarr", arrays, changes=slices.config(**changes))
        b = slices.changed(a, tmp_path / f"b{number}.zarr", "config.corpus.seed", 4)
        with pytest.raises(JaxplainError, match=r"corpus\.seed is 3 in .* and 4 in"):
            merge(tmp_path / "refused", a, b)


def test_the_order_of_a_corpus_s_splits_matters(stores, tmp_path):
    """A document's split is found by adding up the shares in order."""
    shares = {"train": 0.5, "valid": 0.5}
    a, b = (
        slices.changed(path, tmp_path / path.name, "config.corpus.splits", value)
        for path, value in zip(stores, (shares, dict(reversed(shares.items()))), strict=True)
    )
    assert "corpus.splits is [('train', 0.5), ('valid', 0.5)] in" in refusal(tmp_path, a, b)


def test_other_vocabularies(stores, tmp_path):
    arrays = slices.run([(7, 0, 0)])
    b = slices.write(tmp_path / "b.zarr", arrays, words=[*slices.WORDS[:3], b"X", *slices.WORDS[4:]])
    assert f"token 3 of the vocabulary is b'c' in {stores[0]} and b'X' in {b}" in refusal(
        tmp_path, stores[0], b
    )
    longer = slices.write(tmp_path / "c.zarr", arrays, words=[*slices.WORDS, b"more"])
    assert "token 6 of the vocabulary is None in" in refusal(tmp_path, stores[0], longer)


def test_other_neurons(stores, tmp_path, monkeypatch):
    arrays = slices.run([(7, 0, 0)])
    asked = [[0, 1, 2, 3, 4], [0, 1, 3, 4]]
    lacking = slices.write(tmp_path / "lacking.zarr", arrays, asked=asked)
    said = f"neuron 3 of layer 4 was extracted in {stores[0]} but not in {lacking} (split 'train')"
    assert said in refusal(tmp_path, stores[0], lacking)
    assert said in refusal(tmp_path, lacking, stores[0])
    with monkeypatch.context() as patch:
        patch.setattr(slices, "NEURONS", np.array([0, 2, 3, 4, 9]))
        others = slices.write(tmp_path / "others.zarr", arrays)
    assert (
        f"the neurons of split 'train' are 0, 2-3, 7, 9 in {stores[0]} and 0, 2-4, 9 in {others}"
        in refusal(tmp_path, stores[0], others)
    )
    with monkeypatch.context() as patch:
        patch.setattr(slices, "LAYERS", np.array([1, 2]))
        others = slices.write(tmp_path / "layers.zarr", arrays)
    assert f"the layers of split 'train' are 1, 4 in {stores[0]} and 1-2 in" in refusal(
        tmp_path, stores[0], others
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config.exemplars.kinds", ["max", "strata"], "exemplars.kinds of .* has strata, which cannot be"),
        ("config.exemplars.samples", 3, "exemplars.samples of .* is 3, which cannot be merged"),
        ("config.statistics.tokens", "all", "statistics.tokens of .* is 'all', which cannot be merged"),
    ],
)
def test_what_merging_does_not_know_is_never_dropped(stores, tmp_path, field, value, message):
    paths = [slices.changed(path, tmp_path / path.name, field, value) for path in stores]
    assert re.match(message, refusal(tmp_path, *paths))


def test_the_config_of_a_merged_store(stores, tmp_path):
    paths = []
    for path, limit, file in zip(stores, (5, 7), ("x.jsonl", "y.jsonl"), strict=True):
        sources = [{"dataset": "json", "data_files": name} for name in ("both.jsonl", file)]
        changed = slices.changed(path, tmp_path / f"1{path.name}", "config.corpus.sources", sources)
        paths.append(slices.changed(changed, tmp_path / path.name, "config.corpus.max_sequences", limit))
    attributes = merge(tmp_path / "out", *paths).attributes
    corpus = attributes["config"]["corpus"]
    assert [source["data_files"] for source in corpus["sources"]] == ["both.jsonl", "x.jsonl", "y.jsonl"]
    assert corpus["max_sequences"] == 12
    assert attributes["config"]["output"] == str(tmp_path / "out")
    assert [part["config"]["corpus"]["max_sequences"] for part in attributes["merged"]] == [5, 7]
    assert [part["sequences"] for part in attributes["merged"]] == [{"train": 2}] * 2
    assert [part["jaxplain_version"] for part in attributes["merged"]] == ["0", "0"]
    assert attributes["jaxplain_version"] == jaxplain.__version__
    unlimited = slices.changed(paths[0], tmp_path / "all.zarr", "config.corpus.max_sequences", 0)
    merged = merge(tmp_path / "out2", unlimited, paths[1])
    assert merged.config["corpus"]["max_sequences"] == 0, "no limit"
    assert merged.fingerprint not in {jaxplain.open_store(path).fingerprint for path in paths}
