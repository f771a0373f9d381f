"""Excerpts: text that can be marked up and taken apart again, and nothing of a sequence lost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.explainers.excerpts import Excerpt, escape, excerpt_of, marked_excerpt, unescape
from jaxplain.explainers.prompts import highlight
from jaxplain.store.exemplar import Exemplar, Vocabulary

BYTES = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), BYTES, st.sampled_from('\\{}[]<>*|"ntrxu0e2\n\t\r\x85\u2028 ')
)
DELIMITER = st.text(st.one_of(st.sampled_from("{}[]<>*|"), st.characters(categories=["P", "S"])), min_size=1)
DELIMITER = DELIMITER.filter(lambda text: "\\" not in text)  # as the config has it
COUNTS = st.sampled_from([0.0, 1.0, 0.5, -1.0, np.nan])


def excerpt(pieces, activations):
    return Excerpt(pieces=tuple(pieces), activations=np.array(activations, np.float32))


def exemplar(words, activations):
    vocabulary = Vocabulary(
        np.frombuffer(b"".join(words), np.uint8), np.cumsum([len(word) for word in words], dtype=np.int64)
    )
    return Exemplar(
        rank=0,
        score=1.0,
        sequence=0,
        tokens=np.arange(len(words), dtype=np.int32),
        activations=np.array(activations, np.float32),
        corpus="made-up",
        document=0,
        start=0,
        vocabulary=vocabulary,
    )


@given(st.text(CHARACTERS), DELIMITER | st.just(""))
def test_escaping_is_undone_and_leaves_one_line(text, delimiters):
    escaped = escape(text, delimiters)
    assert unescape(escaped) == text
    assert len(escaped.splitlines()) <= 1
    escaped.encode()


@given(st.lists(st.text(CHARACTERS), max_size=5), DELIMITER, DELIMITER)
def test_no_delimiter_is_left_in_escaped_text(pieces, left, right):
    """Not even one that two pieces make together."""
    joined = "".join(escape(piece, left + right) for piece in pieces)
    bare = joined.replace("\\\\", "")
    for character in {*left, *right}:
        assert bare.count(character) == bare.count("\\" + character)


def test_delimiters_cut_in_two():
    assert escape("{", "{{}}") + escape("{", "{{}}") == r"\{\{"
    assert highlight(excerpt(["{", "{", "a"], [0, 0, 9]), 5.0, ["{{", "}}"]) == r"\{\{{{a}}"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\\n", r"a\\n"),
        ("\n\t\r", r"\n\t\r"),
        ("\x00\x1b\x7f", r"\x00\x1b\x7f"),
        ("\udce2\udcff", r"\xe2\xff"),
        ("\x85\u2028", r"\u0085\u2028"),
        ("é\U0001f642\u202e{", "é\U0001f642\u202e{"),
    ],
)
def test_escapes(text, escaped):
    assert escape(text) == escaped


def parsed(line, left, right):
    """Characters of a highlighted line, each with whether it is marked."""
    found, marked, at = [], False, 0
    escapes = {"x": 4, "u": 6}
    while at < len(line):
        delimiter = right if marked else left
        if line[at] == "\\":
            stop = at + escapes.get(line[at + 1], 2)
            found.append((unescape(line[at:stop]), marked))
        elif line.startswith(delimiter, at):
            stop, marked = at + len(delimiter), not marked
        else:
            stop = at + 1
            found.append((line[at], marked))
        at = stop
    assert not marked
    return found


@given(st.lists(st.tuples(st.text(CHARACTERS, min_size=1), COUNTS), max_size=6), DELIMITER, DELIMITER)
@settings(max_examples=200)
def test_highlighted_text_can_be_read_back(counted, left, right):
    pieces, activations = [p for p, _ in counted], [a for _, a in counted]
    line = highlight(excerpt(pieces, activations), 1.0, [left, right])
    assert parsed(line, left, right) == [(c, a == 1.0) for p, a in counted for c in p]


def test_neighbours_share_a_pair_of_delimiters():
    line = highlight(excerpt("abcde", [5, 6, 1, np.nan, 7]), 5.0, ["<", ">"])
    assert line == "<ab>cd<e>"


@given(st.text(min_size=1, max_size=12), st.data())
def test_a_cut_character_is_one_piece_as_strong_as_its_strongest_token(text, data):
    spelled = text.encode()
    inner = range(1, len(spelled))
    cuts = sorted(data.draw(st.sets(st.sampled_from(inner)))) if inner else []
    borders = [0, *cuts, len(spelled)]
    words = [spelled[a:b] for a, b in itertools.pairwise(borders)]
    strong = data.draw(st.lists(COUNTS, min_size=len(words), max_size=len(words)))
    ends = np.cumsum([0, *(len(c.encode()) for c in text)])
    whole = [border for border in borders if border in ends]
    for sign in ("max", "min"):
        found = excerpt_of(exemplar(words, strong), sign)
        assert found.pieces == tuple(spelled[a:b].decode() for a, b in itertools.pairwise(whole))
        for i, (a, b) in enumerate(itertools.pairwise(whole)):
            inside = [s for s, at in zip(strong, borders, strict=False) if a <= at < b and not np.isnan(s)]
            expected = max([s if sign == "max" else -s for s in inside], default=np.nan)
            np.testing.assert_equal(found.activations[i], np.float32(expected))


@given(st.lists(st.binary(max_size=4) | st.sampled_from([b"\xe2", b"\x82", b"\xf0\x9f", b"a"]), min_size=1))
def test_no_byte_is_dropped(words):
    found = excerpt_of(exemplar(words, np.arange(len(words))), "max")
    spelled = b"".join(word or f"<token {i}>".encode() for i, word in enumerate(words))
    assert "".join(found.pieces).encode("utf-8", "surrogateescape") == spelled
    assert len(found.pieces) == len(found.activations)
    assert all(found.pieces)
    assert found.activations.max() == len(words) - 1


def test_broken_characters_and_tokens_without_bytes_are_shown():
    found = excerpt_of(exemplar([b"\xa9a", b"", b" b", b"\xe2\x82"], [1, 2, 3, 4]), "max")
    line = highlight(found, 4.0, ["{{", "}}"])
    assert line == r"\xa9a<token 1> b{{\xe2\x82}}"


def test_what_does_not_count_is_silent():
    shown = excerpt_of(exemplar([b"a", b"b", b"c"], [np.nan, -2, 3]), "max")
    assert shown.strengths.tolist() == [0, 0, 3]
    assert shown.opposite().strengths.tolist() == [0, 2, 0]
    assert highlight(shown, 1e-9, ["<", ">"]) == "ab<c>"
    assert highlight(shown.opposite(), 1e-9, ["<", ">"]) == "a<b>c"
    assert excerpt_of(exemplar([b"a", b"b", b"c"], [np.nan, -2, 3]), "min").strengths.tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("context", "pieces"), [(None, "abcde"), (0, "d"), (1, "cde"), (2, "bcde"), (10, "abcde")]
)
def test_around_the_peak(context, pieces):
    cut = excerpt("abcde", [3, np.nan, -9, 4, 1]).around_peak(context)
    assert "".join(cut.pieces) == pieces
    np.testing.assert_equal(cut.activations[list(pieces).index("d")], np.float32(4))
    assert len(cut.activations) == len(pieces)


def test_around_a_peak_near_the_start():
    assert excerpt("abcde", [1, 2, 0, 0, 0]).around_peak(2).pieces == tuple("abcd")


def test_around_the_peak_of_the_other_sign():
    cut = excerpt("abcde", [9, 1, -9, 4, 1]).opposite().around_peak(1)
    assert cut.pieces == ("b", "c", "d")
    assert cut.activations.tolist() == [-1, 9, -4]


def test_marked_by_hand():
    shown = marked_excerpt("I'm  at{{ 9:30|10}}{{!|-3}}\n    (a{b} c_d)")
    assert shown.pieces == (
        *("I", "'", "m", "  ", "at", " 9:30", "!", "\n    ", "("),
        "a",
        *"{b}",
        " c_d",
        ")",
    )
    assert dict(zip(shown.pieces, shown.activations.tolist(), strict=True)) == dict.fromkeys(
        shown.pieces, 0.0
    ) | {" 9:30": 10.0, "!": -3.0}


@given(st.text(st.characters(exclude_characters="{}|")))
def test_words_without_marks_are_kept_as_they_are(text):
    shown = marked_excerpt(text)
    assert "".join(shown.pieces) == text
    assert not shown.activations.any()
