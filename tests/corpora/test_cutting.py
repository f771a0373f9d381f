"""Windows that are one per document, and what stands before the text of a window."""

import copy
import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from jaxplain.corpora.cutting import PADDING
from jaxplain.corpora.hashing import text_hash
from jaxplain.corpora.prefixes import chat_prefix
from jaxplain.errors import JaxplainError
from tests import tiny
from tests.corpora.makers import config, source, windows


def tokens_of(tokenizer, texts):
    return {text_hash(t): tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts}


def texts():
    return [*tiny.documents(60), "the cat", "a"]


def test_head_is_the_first_tokens_of_every_document_and_padding(tokenizer):
    expected = tokens_of(tokenizer, texts())
    found = windows([source(texts())], config(windows="head", sequence_length=40), tokenizer)
    assert sorted(w.document for w in found) == sorted(expected)
    for w in found:
        head = expected[w.document][:40]
        assert w.tokens_T.tolist() == head + [PADDING] * (40 - len(head))
        assert (w.start, w.length) == (0, len(head))
    assert {w.length for w in found} > {40}, "some are longer than a window, some are not"


def test_random_is_one_piece_of_every_document_wherever_it_is_seen(tokenizer):
    expected = tokens_of(tokenizer, texts())
    drawn = config(windows="random")
    found = windows([source(texts())], drawn, tokenizer)
    assert sorted(w.document for w in found) == sorted(expected)
    for w in found:
        piece = expected[w.document][w.start : w.start + 16]
        assert w.tokens_T.tolist() == piece + [PADDING] * (16 - len(piece))
        assert w.length == min(16, len(expected[w.document]))
    starts = {w.document: w.start for w in found}
    some = windows([source(texts()[::-2])], drawn, tokenizer)
    assert {w.document: w.start for w in some} == {w.document: starts[w.document] for w in some}
    other = windows([source(texts())], config(windows="random", seed=1), tokenizer)
    assert {w.document: w.start for w in other} != starts


def test_random_pieces_are_uniform_over_the_places_of_a_document(tokenizer):
    """Documents of one length: every start occurs, the first and the last as often as the others."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    many = [f"{x}{y}{z}" + "!" * 17 for x in letters for y in letters for z in "aeiou"]
    lengths = {document: len(tokens) for document, tokens in tokens_of(tokenizer, many).items()}
    most = max(lengths.values())
    found = windows([source(many)], config(windows="random"), tokenizer)
    starts = [w.start for w in found if lengths[w.document] == most]
    counts = np.bincount(starts, minlength=most - 15)
    assert len(counts) == most - 15 > 2
    assert len(starts) > 1000
    expected = len(starts) / len(counts)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def with_template(tokenizer, template, *, bos=False):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    if bos:
        changed.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    return changed


SYSTEM = "{{ bos_token }}<|end|>be kind. {{ date_string }}<|user|>{{ messages[0]['content'] | trim }}<|end|>"


def test_chat_prefix_is_what_the_template_puts_before_a_message(tokenizer):
    assert tokenizer.decode(chat_prefix(tokenizer)) == "<|user|>"
    system = chat_prefix(with_template(tokenizer, SYSTEM, bos=True))
    assert tokenizer.decode(system) == "<|bos|><|end|>be kind. 26 Jul 2024<|user|>"
    bare = with_template(tokenizer, "<|user|>{{ messages[0]['content'] }}", bos=True)
    assert chat_prefix(bare) == [0, 2], "BOS where the tokenizer begins with it and the template does not"


@pytest.mark.parametrize("kind", ["packed", "head", "random"])
def test_chat_prefix_leads_windows_of_text_but_not_of_chats(tokenizer, kind):
    chats = [{"text": [{"role": "user", "content": t}]} for t in tiny.documents(30, seed=5)]
    chat = dataclasses.replace(source([]), records=chats, layout="chat", name="chat")
    template = "be kind<|user|>{{ messages[0]['content'] }}"
    kind_of = with_template(tokenizer, template)
    prefix = chat_prefix(kind_of)
    assert len(prefix) > 2
    found = windows([source(texts()), chat], config(windows=kind, chat_prefix=True), kind_of)
    led = [w for w in found if w.corpus == 0]
    assert len(led) > 20
    for w in led:
        assert w.tokens_T[: len(prefix)].tolist() == prefix
        assert (w.tokens_T != PADDING).sum() - w.length == len(prefix)
        assert len(w.tokens_T) == 16
    for w in found:
        if w.corpus == 1:
            assert (w.tokens_T != PADDING).sum() == w.length
    plain = windows([source(texts())], config(windows=kind, sequence_length=16 - len(prefix)), kind_of)
    alone = windows([source(texts())], config(windows=kind, chat_prefix=True), kind_of)
    assert [w.tokens_T[len(prefix) :].tolist() for w in alone] == [w.tokens_T.tolist() for w in plain]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the subject's tokenizer has no chat template; use a chat model"),
        ("{{ messages[0]['content'] }}", "puts nothing before a user's message"),
        ("{{ raise_exception('no system role') }}", "chat template fails: no system role; set it to false"),
        (
            "the cat sees " * 9 + "{{ messages[0]['content'] }}",
            "is 16, but the subject's chat prefix alone takes",
        ),
    ],
)
def test_no_chat_prefix_in_one_sentence(tokenizer, template, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        windows([source(texts())], config(chat_prefix=True), with_template(tokenizer, template))
    assert "\n" not in str(caught.value)


def test_separator_and_stride_are_of_packed_windows(tokenizer):
    plain, separated = (
        windows([source(texts())], config(windows="head", separator=s), tokenizer) for s in (False, True)
    )
    assert [w.tokens_T.tolist() for w in plain] == [w.tokens_T.tolist() for w in separated]
    for kind in ("head", "random"):
        with pytest.raises(JaxplainError, match=f"corpus.stride is 4; {kind} windows are one per document"):
            config(windows=kind, stride=4)
