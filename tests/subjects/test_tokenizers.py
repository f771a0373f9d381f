"""Whether tokenizers are the same, and what they call added tokens."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxplain.errors import JaxplainError
from jaxplain.subjects.tokenizers import (
    remapped_special_tokens,
    require_same_tokenizer,
    with_added_tokens,
)
from tests import tiny


def read(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def subject(tmp_path):
    """The subject's tokenizer, read from `tmp_path`/subject."""
    (tmp_path / "subject").mkdir()
    tiny.write_tokenizer(tmp_path / "subject")
    return read(tmp_path / "subject")


def edited(tmp_path, change):
    """The subject's tokenizer after `change(definition)`, definition being its tokenizer.json."""
    file = tmp_path / "subject" / "tokenizer.json"
    definition = json.loads(file.read_text())
    change(definition)
    file.write_text(json.dumps(definition))
    return read(tmp_path / "subject")


def test_a_copy_with_added_tokens_is_the_same(subject, tmp_path):
    grown = with_added_tokens(subject, ["<|new|>"])
    assert len(grown) == len(subject) + 1
    for copy in (read(tmp_path / "subject"), grown):
        require_same_tokenizer(copy, subject, what="simulator.model")  # raises where they differ


def swap_tokens(definition):
    vocab = definition["model"]["vocab"]
    vocab["the"], vocab["\u0120the"] = vocab["\u0120the"], vocab["the"]


def swap_merges(definition):
    merges = definition["model"]["merges"]
    merges[6], merges[7] = merges[7], merges[6]


def drop_last(definition):
    definition["model"]["merges"].pop()
    vocab = definition["model"]["vocab"]
    del vocab[max(vocab, key=vocab.get)]


def drop_merge(definition):
    definition["model"]["merges"].pop()


def longer_model(definition):
    """A token of the model itself, not an added one."""
    vocab = definition["model"]["vocab"]
    vocab["zzz"] = max(vocab.values()) + 1


def lower_case(definition):
    definition["normalizer"] = {"type": "Lowercase"}


def prefix_space(definition):
    definition["pre_tokenizer"]["add_prefix_space"] = True


def ignore_merges(definition):
    definition["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (swap_tokens, r"token \d+ is '(Ġ?)the' where the subject has '(?!\1the)Ġ?the';"),
        (swap_merges, r"merge 6 is '(.+)' '(.+)' where the subject has '(?!\1' '\2').+' '.+';"),
        (drop_last, r"token \d+ is nothing where the subject has '.+';"),
        (drop_merge, r"merge \d+ is nothing where the subject has '.+' '.+';"),
        (longer_model, r"token \d+ is 'zzz' where the subject has nothing;"),
        (lower_case, r'the normalizer is {"type": "Lowercase"} where the subject has null;'),
        (prefix_space, r'the pre_tokenizer is .*"add_prefix_space": true.* "add_prefix_space": false'),
        (ignore_merges, r'the model is .*"ignore_merges": true.* has .*"ignore_merges": false'),
    ],
)
def test_names_the_first_difference(change, difference, subject, tmp_path):
    with pytest.raises(JaxplainError, match=f"^simulator.model needs .* {difference}") as caught:
        require_same_tokenizer(edited(tmp_path, change), subject, what="simulator.model")
    assert "\n" not in str(caught.value)


def test_the_subject_may_not_have_more_tokens(subject):
    with pytest.raises(JaxplainError, match=r"is nothing where the subject has '<\|new\|>';"):
        require_same_tokenizer(subject, with_added_tokens(subject, ["<|new|>"]), what="it")


def test_an_added_token_in_another_place_is_a_difference(subject):
    a, b = (with_added_tokens(subject, names) for names in (["<|a|>", "<|b|>"], ["<|b|>", "<|a|>"]))
    with pytest.raises(JaxplainError, match=r"is '<\|a\|>' where the subject has '<\|b\|>';"):
        require_same_tokenizer(a, b, what="it")


def fast(model, special=(), **names):
    backend = Tokenizer(model)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_scores_of_unigram_pieces_count():
    a, b = (fast(models.Unigram([("a", -1.0), ("b", score)], unk_id=0)) for score in (-2.0, -3.0))
    with pytest.raises(JaxplainError, match=r"piece 1 is 'b' -2\.0 where the subject has 'b' -3\.0;"):
        require_same_tokenizer(a, b, what="it")


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|im_start|>", "<|im_end|>"], ["<||im_start||>", "<||im_end||>"]),
        (["<s>", "</s>"], ["<|s|>", "<|/s|>"]),
        (["[INST]", "[/INST]"], ["[|INST|]", "[|/INST|]"]),
        (["EOT", "<"], ["<|EOT|>", "<|<|>"]),
        (["<s>", "<|s|>", "<||s||>"], ["<|||s|||>", "<||||s||||>", "<|||||s|||||>"]),
    ],
)
def test_special_tokens_get_names_of_their_own(special, expected):
    tokenizer = fast(models.BPE({"a": 0, "b": 1}, []), special)
    assert remapped_special_tokens(tokenizer) == dict(zip(special, expected, strict=True))


def test_a_name_of_the_plain_vocabulary_is_not_taken():
    tokenizer = fast(models.BPE({"a": 0, "<|s|>": 1}, []), ["<s>"])
    assert remapped_special_tokens(tokenizer) == {"<s>": "<||s||>"}


def test_only_tokens_that_do_more_than_pad_are_remapped():
    names = {"pad_token": "<pad>", "eos_token": "<e>"}
    tokenizer = fast(models.BPE({"a": 0}, []), ["<pad>", "<e>"], **names)
    assert remapped_special_tokens(tokenizer) == {"<e>": "<|e|>"}
    tokenizer = fast(models.BPE({"a": 0}, []), ["<e>"], **names | {"pad_token": "<e>"})
    assert remapped_special_tokens(tokenizer) == {"<e>": "<|e|>"}


def test_added_tokens_that_are_not_special_stay(subject):
    tokenizer = with_added_tokens(subject, [])
    tokenizer.add_tokens(["<think>"])
    assert remapped_special_tokens(tokenizer) == {
        "<|bos|>": "<||bos||>",
        "<|end|>": "<||end||>",
        "<|user|>": "<||user||>",
        "<|assistant|>": "<||assistant||>",
    }


def test_added_tokens_follow_the_last_one(subject):
    size, last = len(subject), max(subject.get_vocab().values())
    grown = with_added_tokens(subject, ["<|a|>", "<|b|>"])
    assert grown.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [last + 1, last + 2]
    assert grown.encode("a<|a|>b<|b|>") == [*subject.encode("a"), last + 1, *subject.encode("b"), last + 2]
    assert grown.added_tokens_decoder[last + 1].special
    assert grown.decode([last + 1], skip_special_tokens=True) == ""
    assert len(subject) == size, "the tokenizer given stays as it is"


def test_refuses_names_that_are_tokens(subject):
    for names, number in ((["<|end|>"], 1), (["<|a|>", "<|a|>"], max(subject.get_vocab().values()) + 1)):
        with pytest.raises(JaxplainError, match=rf"has it already \(its id is {number}\); choose another"):
            with_added_tokens(subject, names)


def test_refuses_ids_that_would_not_follow():
    with pytest.raises(JaxplainError, match=r"tokens x cannot be added with ids from 6 on, .* gaps"):
        with_added_tokens(fast(models.BPE({"a": 0, "b": 5}, [])), ["x"])
