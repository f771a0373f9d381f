"""A run over a GGUF file: the store of the same model's folder, and the tokenizer that was named."""

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.extract import main
from jaxplain.simulators.readout import require_tokenizer_of
from jaxplain.subjects.tokenizers import with_added_tokens
from tests import gguf_files, tiny
from tests.subjects.test_gguf_tokenizer import tokenizer_of


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder, a GGUF file of its model whose tokenizer is not read, and a corpus."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny.write_model(folder / "model")
    metadata = gguf_files.byte_level(folder / "model", tiny.LLAMA, pre="tekken")
    gguf_files.write(folder / "model.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA), tokenizer=metadata)
    tiny.write_corpus(folder / "docs.jsonl", 100)
    return folder


def extract(workspace, output, *subject):
    arguments = [
        *("--corpus.sources", f"[{{dataset: json, data_files: {workspace / 'docs.jsonl'}}}]"),
        *("--corpus.sequence_length", "20", "--corpus.max_sequences", "24", "--exemplars.k", "5"),
        *("--exemplars.splits", "[train]", "--run.batch_size", "8", "--run.progress", "false"),
    ]
    main([*arguments, "--output", str(output), *subject])
    return jaxplain.open_store(output)


@pytest.fixture(scope="module")
def store(workspace):
    options = ["--subject.id", str(workspace / "model.gguf"), "--subject.tokenizer", str(workspace / "model")]
    return extract(workspace, workspace / "run", *options)


def test_the_store_is_that_of_the_models_folder(store, workspace, tmp_path):
    other = extract(workspace, tmp_path, "--subject.id", str(workspace / "model"))
    assert store.attributes["tokenizer_hash"] == other.attributes["tokenizer_hash"]
    assert store.attributes["subject"]["architecture"] == other.attributes["subject"]["architecture"]
    for layer in range(3):
        names = ("max/sequence", "max/score", "stats/mean")
        ours, theirs = (s["train"].layer_arrays(layer, *names) for s in (store, other))
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
        np.testing.assert_allclose(ours[2], theirs[2], atol=1e-6)


def test_the_tokenizer_is_recorded_where_it_was_named(store, workspace, tmp_path):
    assert store.config["subject"]["tokenizer"] == str(workspace / "model")
    other = extract(workspace, tmp_path, "--subject.id", str(workspace / "model"))
    assert "tokenizer" not in other.config["subject"], "as in stores from before there was the field"


def test_a_simulator_is_held_to_the_tokenizer_that_was_named(store, workspace):
    own = tokenizer_of(workspace / "model")
    require_tokenizer_of(store, with_added_tokens(own, ["<|new|>"]), what="simulator.model")
    metadata = gguf_files.byte_level(workspace / "model", tiny.LLAMA, pre="qwen2")
    weights = tiny.tensors(tiny.LLAMA)
    other = tokenizer_of(gguf_files.write(workspace / "other.gguf", tiny.LLAMA, weights, tokenizer=metadata))
    with pytest.raises(JaxplainError, match=r"simulator\.model needs"):
        require_tokenizer_of(store, other, what="simulator.model")
