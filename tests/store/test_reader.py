"""The reader, and the same store through other Zarr readers."""

import json
import shutil

import numpy as np
import pytest
import xarray
import zarr

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.store.exemplar import Vocabulary
from jaxplain.store.writer import SequenceBlock, StoreWriter

K, TOKENS = 3, 4
WORDS = [b"<s>", b"the", b" cat", "é".encode()[:1], "é".encode()[1:], b""]


def write_store(path, *, finish=True, neurons=(2, 5, 9)):
    """A hand-made store: two layers, three neurons, four sequences, one empty rank."""
    config = {"exemplars": {"splits": ["train"], "kinds": ["max"], "k": K}}
    writer = StoreWriter(path, {"config": config, "subject": {"id": "made-up"}, "corpora": ["one", "two"]})
    writer.write_vocabulary(WORDS)
    blocks = [
        SequenceBlock(
            token_NT=np.array(tokens, np.int32),
            corpus_N=np.array([0, 1], np.int32),
            document_N=np.array([2**62 + 5, 7]),
            start_N=np.array([0, 96], np.int32),
            length_N=np.array([4, 2], np.int32),
        )
        for tokens in ([[0, 1, 2, 3], [4, 1, -1, -1]], [[1, 3, 4, 2], [2, 2, -1, -1]])
    ]
    assert writer.write_sequences("train", blocks, tokens=TOKENS) == 4
    split = writer.create_split(
        "train",
        layers=np.array([4, 6]),
        neurons=np.array(neurons),
        kinds=["max"],
        k=K,
        tokens=TOKENS,
        activation_dtype="float16",
    )
    columns = np.array([0, 2])
    for layer in range(2):
        activation = np.arange(2 * K * TOKENS, dtype=np.float16).reshape(2, K, TOKENS) + 100 * layer
        split.write_exemplars(
            "max",
            layer,
            columns,
            score_NR=np.array([[9.0, 8.0, np.nan], [7.0, 6.0, 5.0]], np.float32),
            sequence_NR=np.array([[2, 1, -1], [0, 1, 3]], np.int32),
            activation_NRT=activation,
        )
        split.write_statistics(
            layer,
            columns,
            count=np.array([10, 10]),
            mean=np.array([0.5, -1.0]),
            variance=np.array([4.0, 1.0]),
            skewness=np.array([0.125, -2.0]),
            kurtosis=np.array([3.0, 9.0]),
            fraction_active=np.array([0.25, 1.0]),
        )
    if finish:
        writer.finish()
    return path


@pytest.fixture
def path(tmp_path):
    return write_store(tmp_path / "exemplars.zarr")


def test_neuron_reads_back(path):
    neuron = jaxplain.open_store(path)["train"].neuron(layer=6, index=9)
    first, second, third = neuron.exemplars("max")
    assert (first.rank, first.score, first.sequence) == (0, 7.0, 0)
    assert first.tokens.tolist() == [0, 1, 2, 3]
    assert first.token_strings == ["<s>", "the", " cat", "\ufffd"]
    assert first.text == "".join(first.token_strings)
    assert first.activations.tolist() == [112.0, 113.0, 114.0, 115.0]
    assert first.activations.dtype == np.float32
    assert (first.corpus, first.document, first.start) == ("one", 2**62 + 5, 0)
    assert second.tokens.tolist() == [4, 1], "padding is cut off"
    assert second.activations.tolist() == [116.0, 117.0]
    assert (second.corpus, second.start) == ("two", 96)
    assert third.sequence == 3
    assert neuron.stats == jaxplain.NeuronStatistics(
        count=10, mean=-1.0, variance=1.0, skewness=-2.0, kurtosis=9.0, fraction_active=1.0
    )


def test_empty_ranks_are_left_out_and_limit_holds(path):
    neuron = jaxplain.open_store(path)["train"].neuron(4, 2)
    assert [e.score for e in neuron.exemplars()] == [9.0, 8.0]
    assert [e.score for e in neuron.exemplars(limit=1)] == [9.0]
    assert neuron.exemplars(limit=0) == []


def test_characters_split_over_tokens_are_whole_in_the_text(path):
    exemplar = jaxplain.open_store(path)["train"].neuron(4, 2).exemplars()[0]
    assert exemplar.text == "theé cat"
    assert exemplar.token_strings == ["the", "", "é", " cat"]


def test_run_folder_opens_as_well(path):
    assert jaxplain.open_store(path.parent).splits == ("train",)
    assert "made-up" in repr(jaxplain.open_store(path.parent))


def test_zarr_python_reads_it(path):
    group = zarr.open_group(path, mode="r")
    assert group.attrs["format"] == "jaxplain.exemplars"
    assert group.attrs["complete"] is True
    score = group["train/max/score"]
    assert score.metadata.dimension_names == ("layer", "neuron", "rank")
    assert score[1, 2].tolist() == [7.0, 6.0, 5.0]
    assert np.isnan(score[0, 1]).all(), "a neuron that was not asked for is empty"
    assert group["train/max/activation"].dtype == np.float16
    assert group["train/max/activation"][0, 0, 1].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert group["train/sequences/token"][:].tolist()[3] == [2, 2, -1, -1]
    assert group["train/sequences/document"][0] == 2**62 + 5
    assert sorted(group["train/stats"].array_keys()) == [
        "count",
        "fraction_active",
        "kurtosis",
        "mean",
        "skewness",
        "variance",
    ]


def test_xarray_reads_it_by_label(path):
    tree = jaxplain.open_store(path)["train"].to_xarray()
    assert isinstance(tree, xarray.DataTree)
    best = tree["max"]["score"].sel(layer=6, neuron=9)
    assert best.dims == ("rank",)
    assert best.values.tolist() == [7.0, 6.0, 5.0]
    assert tree["stats"]["mean"].sel(layer=4).values[[0, 2]].tolist() == [0.5, -1.0]
    assert tree["sequences"]["token"].dims == ("sequence", "token")
    assert tree["sequences"]["token"].shape == (4, TOKENS)


def test_one_neuron_is_one_chunk(path):
    metadata = json.loads((path / "train/max/activation/zarr.json").read_text())
    sharding = metadata["codecs"][0]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 1, K, TOKENS]
    assert sharding["configuration"]["codecs"][-1]["name"] == "zstd"


def test_incomplete_and_foreign_stores_are_refused(tmp_path):
    with pytest.raises(JaxplainError, match="there is no store at"):
        jaxplain.open_store(tmp_path)
    write_store(tmp_path / "torn.zarr", finish=False)
    with pytest.raises(JaxplainError, match="is incomplete"):
        jaxplain.open_store(tmp_path / "torn.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(JaxplainError, match="not a store of jaxplain's"):
        jaxplain.open_store(tmp_path / "foreign.zarr")
    write_store(tmp_path / "new.zarr")
    root = tmp_path / "new.zarr" / "zarr.json"
    root.write_text(root.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(JaxplainError, match="store of version 2"):
        jaxplain.open_store(tmp_path / "new.zarr")
    with pytest.raises(JaxplainError, match="not a path or URL"):
        jaxplain.open_store("gopher://somewhere/store")


def test_what_the_store_lacks_is_named(path):
    store = jaxplain.open_store(path)
    with pytest.raises(JaxplainError, match="no split 'test'; it has train"):
        store["test"]
    with pytest.raises(JaxplainError, match="layer 5 is not in the store, which holds 2 layers from 4 to 6"):
        store["train"].neuron(5, 2)
    with pytest.raises(JaxplainError, match="neuron 3 is not in the store"):
        store["train"].neuron(4, 3)
    with pytest.raises(JaxplainError, match="neuron 5 of layer 4 was not among those extracted"):
        store["train"].neuron(4, 5)
    with pytest.raises(JaxplainError, match="no exemplars of kind 'min'; it holds max"):
        store["train"].neuron(4, 2).exemplars("min")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "zarr.json").write_text("{"), "could not be read: "),
        (lambda p: shutil.rmtree(p / "train" / "max"), "could not be read: NOT_FOUND"),
        (lambda p: shutil.rmtree(p / "train"), "could not be read: NOT_FOUND"),
        (lambda p: truncate(p / "train" / "max" / "activation"), "could not be read: "),
        (lambda p: shutil.rmtree(p / "train" / "sequences" / "token" / "c"), "has no tokens"),
        (lambda p: drop_attribute(p / "zarr.json", "config"), "damaged: its attributes lack config"),
    ],
)
def test_damaged_stores_in_one_sentence(path, damage, message):
    from jaxplain.show import main

    damage(path)
    with pytest.raises(JaxplainError, match=message) as caught:
        main([str(path), "--layer", "6", "--neuron", "9"])
    assert "\n" not in str(caught.value)


def truncate(folder):
    for shard in (folder / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:7])


def drop_attribute(root, name):
    contents = json.loads(root.read_text())
    del contents["attributes"][name]
    root.write_text(json.dumps(contents))


def test_a_new_store_takes_the_place_of_an_old_one_only_when_complete(path):
    write_store(path, finish=False, neurons=(1, 2, 3))
    assert jaxplain.open_store(path)["train"].neurons.tolist() == [2, 5, 9]
    write_store(path, neurons=(1, 2, 3))
    assert jaxplain.open_store(path)["train"].neurons.tolist() == [1, 2, 3]
    assert [p.name for p in path.parent.iterdir()] == ["exemplars.zarr"]


def test_paths_with_unusual_characters(tmp_path):
    path = write_store(tmp_path / "a b%20ü#x" / "exemplars.zarr")
    store = jaxplain.open_store(path.parent)
    assert store["train"].to_xarray()["max"]["score"].shape == (2, 3, 3)


def test_vocabulary_of_padding_is_nothing():
    vocabulary = Vocabulary(np.frombuffer(b"ab", np.uint8), np.array([1, 2, 2]))
    assert vocabulary.strings(np.array([0, 1, 2, -1])) == ["a", "b", "", ""]


def test_shown_in_a_terminal(path, capsys):
    from jaxplain.show import main

    main([str(path), "--layer", "6", "--neuron", "9", "--limit", "2"])
    shown = capsys.readouterr().out
    assert "layer 6, neuron 9" in shown
    assert "the cat\u00ab\ufffd\u00bb" in shown, "without colours the peak is marked"
    assert "115.00" in shown, "the peak activation, not the score of these made-up arrays"
    assert shown.count("\n") == 3, "a line of statistics, and two excerpts"


@pytest.mark.parametrize(("kind", "peak"), [("min", "b"), ("max", "a"), ("random", "a")])
def test_the_peak_is_never_a_token_that_does_not_count(kind, peak):
    from jaxplain.store.exemplar import Exemplar
    from jaxplain.viewer.terminal import _excerpt

    exemplar = Exemplar(
        rank=0,
        score=1.0,
        sequence=0,
        tokens=np.arange(3, dtype=np.int32),
        activations=np.array([np.nan, 3.0, 1.0], np.float32),
        corpus="made-up",
        document=0,
        start=0,
        vocabulary=Vocabulary(np.frombuffer(b"xab", np.uint8), np.array([1, 2, 3])),
    )
    assert f"\u00ab{peak}\u00bb" in _excerpt(exemplar, kind, marked=True).plain
