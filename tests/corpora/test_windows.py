"""Windows: every token once, in order, with true provenance; mixing, splitting and shuffling."""

import collections
import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.cutting import PADDING
from jaxplain.corpora.hashing import lottery, split_of, text_hash
from jaxplain.corpora.packaged import _conversations
from jaxplain.corpora.sources import Source, open_source
from jaxplain.corpora.windows import windows_of_split
from jaxplain.errors import JaxplainError
from tests import tiny
from tests.corpora.makers import config, documents_of_rows, rows_of, source, windows


def test_every_token_once_and_in_order(tokenizer):
    texts = tiny.documents(20)
    found = windows([source(texts)], config(), tokenizer)
    expected = {text_hash(t): [*tokenizer(t, add_special_tokens=False)["input_ids"], 1] for t in texts}
    stream = np.concatenate([w.tokens_T for w in found])
    stream = stream[stream != PADDING]
    order = list(dict.fromkeys(w.document for w in found))
    documents = [expected.pop(document) for document in order]
    rest = len(stream) - sum(map(len, documents))
    # A document shorter than a window may begin none; all the others stand in the order found.
    assert rest == sum(len(tokens) for tokens in expected.values())
    assert collections.Counter(stream.tolist()) == collections.Counter(
        itertools.chain(*documents, *expected.values())
    )
    assert [w.length for w in found[:-1]] == [16] * (len(found) - 1)
    assert 0 < found[-1].length <= 16
    assert (found[-1].tokens_T[found[-1].length :] == PADDING).all()


def test_provenance_finds_the_first_token(tokenizer):
    texts = {text_hash(t): t for t in tiny.documents(20)}
    for window in windows([source(texts.values())], config(separator=False), tokenizer):
        tokens = tokenizer(texts[window.document], add_special_tokens=False)["input_ids"]
        shown = min(len(tokens) - window.start, window.length)
        assert shown >= 1
        np.testing.assert_array_equal(window.tokens_T[:shown], tokens[window.start :][:shown])


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_stride_sets_the_distance_of_windows(tokenizer, stride):
    text = tiny.documents(1)[0] * 3
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    found = windows([source([text])], config(stride=stride), tokenizer)
    assert [w.start for w in found] == [i * stride for i in range(len(found))]
    for window in found:
        expected = tokens[window.start : window.start + 16]
        assert window.tokens_T[: window.length].tolist() == expected
    assert found[-1].start + found[-1].length == len(tokens), "the tail is shown"
    assert len(found) < 2 or found[-2].start + found[-2].length < len(tokens), "and only once"


def test_bos_leads_every_window_where_the_tokenizer_begins_with_it(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    texts = tiny.documents(5)
    found = windows([source(texts)], config(), with_bos)
    assert all(w.tokens_T[0] == 0 and w.tokens_T[1] != 0 for w in found)
    assert found[0].length == 15
    text_tokens = [w.tokens_T[1:] for w in found]
    plain = [w.tokens_T for w in windows([source(texts)], config(), tokenizer)]
    stream, expected = np.concatenate(text_tokens), np.concatenate(plain)
    np.testing.assert_array_equal(stream[stream >= 0], expected[expected >= 0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.8)])
def test_mix_is_the_ratio_at_every_point(tokenizer, weights):
    """Documents of very different lengths: the ratio is of sequences, not of documents."""
    long = source([" ".join(tiny.documents(8, seed=i)) for i in range(30)], "long", weights[0])
    short = source(tiny.documents(900, seed=99), "short", weights[1])
    found = windows([long, short], config(), tokenizer)
    first = np.cumsum([w.corpus == 0 for w in found])
    share = weights[0] / sum(weights)
    assert len(found) > 200
    assert np.abs(first - share * np.arange(1, len(found) + 1)).max() <= 1


def test_mix_stops_when_a_source_runs_out(tokenizer):
    few, many = source(tiny.documents(2), "few"), source(tiny.documents(50, seed=1), "many")
    found = windows([few, many], config(), tokenizer)
    alone = windows([few], config(), tokenizer)
    assert sum(w.corpus == 0 for w in found) == len(alone)
    assert len(found) <= 2 * len(alone) + 1


def test_splits_share_no_document_and_have_their_shares(tokenizer):
    texts = tiny.documents(400)
    splits = {"train": 0.5, "valid": 0.25, "test": 0.25}
    found = {
        split: {w.document for w in windows([source(texts)], config(splits=splits), tokenizer, split)}
        for split in splits
    }
    assert not found["train"] & found["valid"]
    assert not found["train"] & found["test"]
    assert not found["valid"] & found["test"]
    counts = collections.Counter(split_of(text_hash(text), splits) for text in texts)
    assert abs(counts["train"] - 200) < 45, "within three deviations and a half"
    assert abs(counts["valid"] - 100) < 35


def test_splits_do_not_depend_on_the_seed_and_may_leave_out():
    ids = [text_hash(str(i)) for i in range(2000)]
    kept = [i for i in ids if split_of(i, {"only": 0.1}) == "only"]
    assert 120 < len(kept) < 290
    assert {split_of(i, {"only": 0.1}) for i in ids} == {"only", None}
    assert {split_of(i, {"a": 0.1, "b": 0.2, "c": 0.7}) for i in ids} == {"a", "b", "c"}


def test_same_seed_same_windows_and_another_seed_another_order(tokenizer):
    texts = tiny.documents(30)
    once, again, other = (windows([source(texts)], config(seed=seed), tokenizer) for seed in (3, 3, 4))
    assert [w.tokens_T.tolist() for w in once] == [w.tokens_T.tolist() for w in again]
    assert [w.document for w in once] != [w.document for w in other]
    order = [text_hash(text) for text in texts]
    assert list(dict.fromkeys(w.document for w in once)) != [
        d for d in order if d in {w.document for w in once}
    ]


def test_iterator_state_resumes_midway(tokenizer):
    whole = [w.tokens_T.tolist() for w in windows([source(tiny.documents(20))], config(stride=7), tokenizer)]
    assert len(whole) > 66
    made = windows_of_split([source(tiny.documents(20))], config(stride=7), "train", tokenizer)
    made.size = 11
    iterator = iter(made)
    for taken in range(1, 6):
        next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = iter(made)
        resumed.set_state(state)
        rest = [w.tokens_T.tolist() for w in rows_of(resumed)]
        assert rest == whole[11 * taken :]


def test_lottery_is_uniform_and_tied_to_the_window():
    document_N, start_N = np.arange(20000) % 5000, np.arange(20000) // 5000
    drawn = lottery(0, document_N, start_N)
    assert drawn.dtype == np.float32
    assert drawn.min() > 0
    assert drawn.max() < 1
    histogram = np.histogram(drawn, 10, (0, 1))[0]
    assert np.abs(histogram - 2000).max() < 200
    np.testing.assert_array_equal(lottery(0, document_N[7:9], start_N[7:9]), drawn[7:9])
    assert not np.array_equal(lottery(1, document_N, start_N), drawn)


def write(path, lines):
    path.write_text(lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "text"])
def test_local_files_of_every_format(kind, tokenizer, tmp_path):
    texts = ["first document", "second, with a comma"]
    fields = {"dataset": kind, "text_column": "words"}
    if kind == "json":
        file = write(tmp_path / "a.jsonl", '{"words": "first document"}\n{"words": "second, with a comma"}\n')
    elif kind == "csv":
        file = write(tmp_path / "a.csv", 'words\nfirst document\n"second, with a comma"\n')
    elif kind == "tsv":
        file = write(tmp_path / "a.tsv", "id\twords\n1\tfirst document\n2\tsecond, with a comma\n")
        fields |= {"dataset": "csv", "delimiter": "\t"}
    elif kind == "parquet":
        import pandas

        pandas.DataFrame({"words": texts}).to_parquet(tmp_path / "a.parquet")
        file = str(tmp_path / "a.parquet")
    else:
        file = write(tmp_path / "a.txt", "first document\nsecond, with a comma\n")
        fields["text_column"] = "text"
    opened = open_source(SourceConfig(**fields, data_files=file), tokenizer)
    assert [document.text for document in documents_of_rows(opened, tokenizer, range(2))] == texts


def test_chat_column_goes_through_the_template(tokenizer, tmp_path):
    file = tiny.write_corpus(tmp_path / "chats.jsonl", 3)
    opened = open_source(
        SourceConfig(dataset="json", data_files=str(file), chat_column="messages"), tokenizer
    )
    text = documents_of_rows(opened, tokenizer, [0])[0].text
    assert text.startswith("<|user|>0: ")
    assert text.endswith("<|end|>")
    assert "<|end|><|assistant|>" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "nothing"}, "preset is 'nothing'; known are chitchat, fineweb, lmsys"),
        ({"dataset": "json", "data_files": "/nowhere/*.jsonl"}, "no such file: /nowhere/"),
        ({"dataset": "json"}, "needs corpus.sources.data_files"),
        (
            {"dataset": "json", "data_files": "DOCS", "text_column": "body"},
            "no column 'body'; it has text, messages",
        ),
        ({"dataset": "json", "data_files": "BROKEN"}, "could not be read"),
        ({"dataset": "csv", "data_files": "EMPTY"}, "could not be read|holds no documents"),
        ({"dataset": "json", "data_files": "EMPTY"}, "could not be read|holds no documents"),
        ({"dataset": "text", "data_files": "EMPTY"}, "could not be read|holds no documents"),
        ({"dataset": "some-one/no-such-set"}, "'some-one/no-such-set' could not be f"),
    ],
)
def test_bad_sources_in_one_sentence(fields, message, tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {
        "DOCS": str(tiny.write_corpus(tmp_path / "docs.jsonl", 3)),
        "BROKEN": write(tmp_path / "broken.jsonl", '{"text": "a"}\n{"text": \n'),
        "EMPTY": write(tmp_path / "empty.csv", ""),
    }
    fields = {name: files.get(value, value) for name, value in fields.items()}
    with pytest.raises(JaxplainError, match=message) as caught:
        open_source(SourceConfig(**fields), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", 5, "column 'text' of made-up holds ints, not text .row 0: 5."),
        ("chat", "hello", r"must hold lists of \{role, content\}, but row 0 is 'hello'"),
        ("chat", [{"role": "user"}], "must hold lists of"),
        ("chat", 7, "must hold lists of"),
    ],
)
def test_rows_of_the_wrong_kind(column, value, message, tokenizer):
    records = [{"text": value}]
    opened = Source(name="made-up", weight=1.0, records=records, column="text", layout=column)
    with pytest.raises(JaxplainError, match=message) as caught:
        windows([opened], config(), tokenizer)
    assert "\n" not in str(caught.value)


def test_null_is_no_text(tokenizer):
    assert windows([source([None, "", "one document"])], config(), tokenizer)[0].length > 2
    assert windows([source([None])], config(), tokenizer) == []


def test_chat_data_needs_a_chat_template(tmp_path):
    tiny.write_tokenizer(tmp_path, chat=False)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    file = tiny.write_corpus(tmp_path / "chats.jsonl", 3)
    with pytest.raises(JaxplainError, match=r"is chat data, but .* no chat template; use a") as caught:
        open_source(SourceConfig(dataset="json", data_files=str(file), chat_column="messages"), plain)
    assert "\n" not in str(caught.value)


def test_successive_messages_of_one_person_are_one_turn():
    def message(sender, text):
        return {"sender": sender, "text": text, "timestamp": ""}

    long = "x" * 400
    contents = {
        "kept": {
            "messages": [
                [message("a", "hi"), message("a", "there")],
                [message("b", long)],
                [message("b", "ok")],
            ]
        },
        "short": {"messages": [[message("a", "hi")]]},
        "empty": {"messages": []},
    }
    assert list(_conversations(contents)) == [
        {
            "messages": [
                {"role": "user", "content": "hi there"},
                {"role": "assistant", "content": f"{long} ok"},
            ]
        }
    ]
