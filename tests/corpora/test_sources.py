"""Sources as the real `datasets` library reads them: folders with splits, slices, streams, compression."""

import bz2
import gzip
import json
import lzma

import datasets
import httpx2
import huggingface_hub
import huggingface_hub.errors
import pandas
import pytest
import zstandard

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.hashing import text_hash
from jaxplain.corpora.sources import open_source
from jaxplain.corpora.windows import windows_of_split
from jaxplain.errors import JaxplainError
from tests import tiny
from tests.corpora.makers import config, documents, rows_of, windows

RECORDS = {"train": 53, "test": 7}
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
dataset_info:
  features: [{name: text, dtype: string}]
  splits:
  - {name: train, num_examples: 53, num_bytes: 1}
  - {name: test, num_examples: 7, num_bytes: 1}
---
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of two splits, whose card states how many records each has."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    for split, count in RECORDS.items():
        table = pandas.DataFrame({"text": [f"{split} {i}" for i in range(count)]})
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def texts_of(opened, tokenizer, seed=0):
    return [document.text for document in documents(opened, tokenizer, seed)]


def stream(tokenizer, **fields):
    return open_source(SourceConfig(streaming=True, **{"shuffle_buffer": 0} | fields), tokenizer)


SPLITS = [
    ("train", [f"train {i}" for i in range(53)]),
    ("train[10%:20%]", [f"train {i}" for i in range(5, 11)]),
    ("train[:-50]+test[5:]", ["train 0", "train 1", "train 2", "test 5", "test 6"]),
    ("train[95%:]", ["train 50", "train 51", "train 52"]),
    ("test[-2:]", ["test 5", "test 6"]),
    ("test[3:5]+test[:1]", ["test 3", "test 4", "test 0"]),
    ("train[51:1000]", ["train 51", "train 52"]),
    ("train+test[:10%]", [*(f"train {i}" for i in range(53)), "test 0"]),
]


@pytest.mark.parametrize(("split", "expected"), SPLITS)
@pytest.mark.parametrize("streaming", [False, True])
def test_split_expressions_mean_the_same_streamed_or_not(folder, tokenizer, split, expected, streaming):
    fields = {"dataset": str(folder), "split": split, "shuffle_buffer": 0}
    opened = open_source(SourceConfig(streaming=streaming, **fields), tokenizer)
    found = texts_of(opened, tokenizer)
    assert found == expected if streaming else sorted(found) == sorted(expected)


def test_percent_of_a_stream_that_does_not_state_its_size_is_refused(tokenizer, tmp_path):
    file = str(tiny.write_corpus(tmp_path / "docs.jsonl", 20))
    for split in ("train[10%:20%]", "train[-3:]"):
        with pytest.raises(JaxplainError, match=r"give counts from the start, such as train\[1000:2000\]"):
            stream(tokenizer, dataset="json", data_files=file, split=split)
    counted = stream(tokenizer, dataset="json", data_files=file, split="train[4:6]")
    assert texts_of(counted, tokenizer) == tiny.documents(20)[4:6]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "text"])
def test_compressed_files(tokenizer, tmp_path, kind, extension, streaming):
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(extension)
    if compress is None:
        compress = zstandard.ZstdCompressor().compress
    content = {
        "json": '{"text": "one, two"}\n{"text": "three"}\n',
        "csv": 'text,id\n"one, two",1\nthree,2\n',
        "tsv": "id\ttext\n1\tone, two\n2\tthree\n",
        "text": "one, two\nthree\n",
    }[kind]
    file = tmp_path / f"docs.{kind}.{extension}"
    file.write_bytes(compress(content.encode()))
    fields = {"dataset": "csv", "delimiter": "\t"} if kind == "tsv" else {"dataset": kind}
    opened = open_source(SourceConfig(data_files=str(file), streaming=streaming, **fields), tokenizer)
    assert sorted(texts_of(opened, tokenizer)) == ["one, two", "three"]


@pytest.mark.parametrize("streaming", [False, True])
def test_globs_take_every_file(tokenizer, tmp_path, streaming):
    (tmp_path / "deep").mkdir()
    for name in ("a", "b", "deep/c"):
        pandas.DataFrame({"text": [name]}).to_parquet(tmp_path / f"{name}.parquet")
    for pattern, expected in (("*.parquet", ["a", "b"]), ("**/*.parquet", ["a", "b", "deep/c"])):
        given = SourceConfig(dataset="parquet", data_files=str(tmp_path / pattern), streaming=streaming)
        assert sorted(texts_of(open_source(given, tokenizer), tokenizer)) == expected


def test_a_stream_is_shuffled_by_the_seed_as_far_as_its_buffer_goes(folder, tokenizer):
    everything = [f"train {i}" for i in range(53)]
    shuffled = stream(tokenizer, dataset=str(folder), shuffle_buffer=20)
    once, again, other = (texts_of(shuffled, tokenizer, seed) for seed in (1, 1, 2))
    assert once == again != other
    assert once != everything
    assert sorted(once) == sorted(everything)
    assert all(int(text.split()[1]) < place + 20 for place, text in enumerate(once))


@pytest.mark.parametrize("buffer", [0, 7])
def test_a_stream_gives_every_document_to_its_split_and_resumes(tokenizer, tmp_path, buffer):
    file = str(tiny.write_corpus(tmp_path / "docs.jsonl", 60))
    opened = stream(tokenizer, dataset="json", data_files=file, shuffle_buffer=buffer)
    splits = {"train": 0.5, "valid": 0.5}
    shared = config(windows="head", splits=splits)
    found = {split: [w.document for w in windows([opened], shared, tokenizer, split)] for split in splits}
    assert sorted(found["train"] + found["valid"]) == sorted(map(text_hash, tiny.documents(60)))
    made = windows_of_split([opened], config(), "train", tokenizer)
    made.size = 1
    iterator = iter(made)
    for _ in range(61):
        next(iterator)
    state = iterator.get_state()
    expected = [w.tokens_T.tolist() for w in rows_of(iterator)]
    assert expected
    resumed = iter(made)
    resumed.set_state(state)
    assert [w.tokens_T.tolist() for w in rows_of(resumed)] == expected


def test_a_streamed_chat_goes_through_the_template(tokenizer, tmp_path):
    file = str(tiny.write_corpus(tmp_path / "chats.jsonl", 3))
    opened = stream(tokenizer, dataset="json", data_files=file, chat_column="messages")
    assert all(text.startswith("<|user|>") for text in texts_of(opened, tokenizer))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "nope"}, r"could not be read: .*\['train', 'test'\]"),
        ({"split": "train[60:70]"}, r"holds no documents in split 'train\[60:70\]'; check the files, or"),
        ({"split": "train[20%:20%]"}, r"holds no documents in split 'train\[20%:20%\]'"),
        ({"text_column": "body"}, "has no column 'body'; it has text. Set text_column or chat_column"),
        ({"chat_column": "text"}, r"must hold lists of \{role, content\}"),
    ],
)
def test_bad_sources_in_one_sentence(folder, tokenizer, fields, message, streaming):
    given = SourceConfig(dataset=str(folder), streaming=streaming, **fields)
    with pytest.raises(JaxplainError, match=message) as caught:
        texts_of(open_source(given, tokenizer), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train[10", "train[1:2:3]", "train[:5.5%]", "", "train++test"])
def test_split_expressions_that_are_none(folder, tokenizer, split):
    with pytest.raises(JaxplainError, match="write a split's name, or slices such as"):
        stream(tokenizer, dataset=str(folder), split=split)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tsv_without_the_column_or_with_the_wrong_delimiter(tokenizer, tmp_path, streaming):
    file = tmp_path / "arguments.tsv"
    file.write_text("Argument ID\tConclusion\nA1\tcats are good\n")
    fields = {"dataset": "csv", "data_files": str(file), "streaming": streaming, "text_column": "Premise"}
    message = (
        r"has no column 'Premise'; it has Argument ID, Conclusion. Set text_column or chat_column, or the"
    )
    with pytest.raises(JaxplainError, match=message):
        open_source(SourceConfig(**fields, delimiter="\t"), tokenizer)
    with pytest.raises(JaxplainError, match=r"it has Argument ID\\tConclusion. Set .* or the delimiter"):
        open_source(SourceConfig(**fields), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_chat_is_known_by_its_messages(tokenizer, tmp_path, streaming):
    """However the keys of a message are ordered in the file."""
    lines = ['{"role": "user", "content": "hi"}', '{"role": "user", "content": "ho"}']
    lines.append('{"content": "hi", "role": "user"}')
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f'{{"messages": [{line}]}}\n' for line in lines))
    given = SourceConfig(
        dataset="json",
        data_files=str(file),
        chat_column="messages",
        streaming=streaming,
        shuffle_buffer=0,
    )
    ids = [document.id for document in documents(open_source(given, tokenizer), tokenizer)]
    assert (len(ids), len(set(ids))) == (3, 2)


def test_the_rows_of_a_stream_are_counted_through_its_blocks(tokenizer, tmp_path, monkeypatch):
    """From whatever block on: a record that is no text is named by its row."""
    monkeypatch.setattr("jaxplain.corpora.records.BLOCK", 4)
    opened = stream(tokenizer, dataset="json", data_files=str(tiny.write_corpus(tmp_path / "docs.jsonl", 10)))
    for first in (0, 1, 2):
        blocks = list(opened.blocks(seed=0, first=first))
        assert [block.rows for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]][first:]
        assert [text for block in blocks for text in block.values] == tiny.documents(10)[4 * first :]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_texts_are_no_documents(tokenizer, tmp_path, streaming):
    (tmp_path / "docs.jsonl").write_text('{"text": "the cat"}\n{"text": ""}\n{"text": null}\n')
    given = SourceConfig(dataset="json", data_files=str(tmp_path / "docs.jsonl"), streaming=streaming)
    (found,) = documents(open_source(given, tokenizer), tokenizer)
    assert found.text == "the cat"


def test_a_stream_that_breaks_midway_in_one_sentence(tokenizer, tmp_path):
    whole = str(tiny.write_corpus(tmp_path / "whole.jsonl", 20))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(("".join(json.dumps({"text": t}) + "\n" for t in "abc")).encode())[:-12])
    opened = stream(tokenizer, dataset="json", data_files=[whole, str(torn)])
    found = documents(opened, tokenizer)
    assert [next(found).text for _ in range(20)] == tiny.documents(20)
    with pytest.raises(JaxplainError, match="could not be read: Compressed file ended") as caught:
        next(found)
    assert "\n" not in str(caught.value)


def refusal(kind, status):
    request = httpx2.Request("GET", "https://huggingface.co/datasets/some/set")
    return kind("refused", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (
            huggingface_hub.errors.GatedRepoError,
            401,
            "'some/set' needs an access token: accept its terms on https://huggingface.co/datasets/some/set",
        ),
        (huggingface_hub.errors.GatedRepoError, 403, "needs an access token: accept its terms"),
        (
            huggingface_hub.errors.RevisionNotFoundError,
            404,
            "'some/set' has no revision 'v7'; give a branch, tag or commit of it",
        ),
        (
            huggingface_hub.errors.RepositoryNotFoundError,
            404,
            r"'some/set' could not be found: .*\(if it is private, log in with `hf auth login`\)",
        ),
    ],
)
def test_what_the_hub_refuses(tokenizer, monkeypatch, tmp_path, kind, status, message, streaming):
    """The hub's answer comes where `datasets` asks for the dataset's card; the rest is the real library."""

    asked = []

    def refuse(*arguments, **options):
        asked.append(options["revision"])
        raise refusal(kind, status)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", refuse)
    given = SourceConfig(dataset="some/set", revision="v7", streaming=streaming)
    with pytest.raises(JaxplainError, match=message) as caught:
        open_source(given, tokenizer)
    assert "\n" not in str(caught.value)
    assert set(asked) == {"v7"}
