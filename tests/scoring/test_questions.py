"""Detection and fuzzing: which questions are asked, and in what words."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.explainers.excerpts import unescape
from jaxplain.explainers.prompts import Message
from jaxplain.scoring.judging import detection_questions, fuzzing_questions, judging_messages
from jaxplain.store.exemplar import Exemplar, Vocabulary

WORDS = 400
VOCABULARY = Vocabulary(
    np.frombuffer("".join(f" w{n:03d}" for n in range(WORDS)).encode(), np.uint8),
    np.arange(1, WORDS + 1) * 5,
)


def exemplar(sequence, activations, *, vocabulary=VOCABULARY, tokens=None):
    """Its tokens begin with that of its sequence's number, so that texts tell where they are from."""
    activations = np.array(activations, np.float32)
    tokens = [sequence, *range(WORDS - len(activations) + 1, WORDS)] if tokens is None else tokens
    return Exemplar(
        rank=0,
        score=0.0,
        sequence=sequence,
        tokens=np.array(tokens, np.int32),
        activations=activations,
        corpus="made-up",
        document=sequence,
        start=0,
        vocabulary=vocabulary,
    )


def firing_exemplars(count, length=8):
    """The n-th has its strongest activation, 100 - n, in some place, and half of it in the next."""
    found = []
    for n in range(count):
        activations = np.full(length, 0.25)
        place = n % (length - 1)
        activations[place : place + 2] = 100 - n, (100 - n) / 2
        found.append(exemplar(n, activations))
    return found


def silent_exemplars(count, length=8):
    """Those with an even number stay below 1, the others reach 2."""
    return [
        exemplar(200 + n, np.where(np.arange(length) == n % length, 2.0 * (n % 2), 0.5)) for n in range(count)
    ]


EVERYTHING = {"threshold": 1.0, "quantiles": 5, "per_quantile": 3, "silent": 10, "pieces": None}


def marked(question):
    """The highlighted tokens of a question, by their text."""
    return [w for run in re.findall(r"\{\{(.*?)\}\}", question.text) for w in re.findall(r" w\d+", run)]


def test_detection_asks_of_all_strengths_and_of_silent_ones():
    firing = firing_exemplars(50)
    random.Random(1).shuffle(firing)
    questions = detection_questions(firing, silent_exemplars(40), "max", **EVERYTHING, seed=0)
    asked = [q for q in questions if q.truth]
    assert Counter(q.quantile for q in asked) == dict.fromkeys(range(5), 3)
    assert all(q.sequence // 10 == q.quantile for q in asked), "the strongest are the first tenth of 50"
    silent = [q for q in questions if not q.truth]
    assert len(silent) == 10
    assert all(q.sequence >= 200 and q.sequence % 2 == 0 and q.quantile is None for q in silent)
    assert len({q.sequence for q in questions}) == 25
    assert all(q.text.startswith(f" w{q.sequence:03d}") for q in questions)
    truths = "".join(str(int(q.truth)) for q in questions)
    assert "01" in truths
    assert "10" in truths
    assert "1" * 10 not in truths


def test_draws_depend_on_the_seed_alone():
    def drawn(seed, make):
        firing, silent = firing_exemplars(50), silent_exemplars(40)
        return [(q.sequence, q.truth, q.text) for q in make(firing, silent, "max", **EVERYTHING, seed=seed)]

    for make in (detection_questions, fuzzing_questions):
        first, second = drawn(0, make), drawn(1, make)
        assert first == drawn(0, make)
        for truth in (True, False):
            numbers = [{n for n, is_true, _ in found if is_true == truth} for found in (first, second)]
            assert numbers[0] != numbers[1], "not only the order"


def test_too_few_exemplars_are_all_asked():
    questions = detection_questions(firing_exemplars(3), silent_exemplars(4), "max", **EVERYTHING, seed=0)
    assert sorted(q.sequence for q in questions) == [0, 1, 2, 200, 202]
    assert sorted(q.quantile for q in questions if q.truth) == [0, 1, 2]
    assert detection_questions([], [], "max", **EVERYTHING, seed=0) == []
    assert fuzzing_questions([], silent_exemplars(4), "max", **EVERYTHING, seed=0) == []


def test_a_sequence_is_asked_about_once():
    firing, silent = firing_exemplars(3) * 2, silent_exemplars(4) * 2
    questions = detection_questions(firing, silent, "max", **EVERYTHING, seed=0)
    assert sorted(q.sequence for q in questions) == [0, 1, 2, 200, 202]


def test_the_threshold_decides_what_fires():
    weak = [exemplar(0, [0.5, 3.0, 0.5]), exemplar(1, [0.5, 2.9, 0.5]), exemplar(2, [np.nan, 3.5, 9.0])]
    limits = EVERYTHING | {"threshold": 3.0}
    questions = detection_questions(weak, weak, "max", **limits, seed=0)
    assert {q.sequence: q.truth for q in questions} == {0: True, 1: False, 2: True}


def test_tokens_that_do_not_count_neither_fire_nor_are_highlighted():
    odd = [exemplar(0, [np.nan, 0.0, 5.0, np.nan])]
    silent = [exemplar(n, [np.nan, 0.0, np.nan, np.nan]) for n in range(1, 9)]
    questions = fuzzing_questions(odd, silent, "max", **EVERYTHING, seed=0)
    assert len(questions) == 9
    for question in questions:
        assert marked(question) == ([" w398"] if question.truth else [" w397"])
    nothing = [exemplar(9, [np.nan, np.nan])]
    assert detection_questions(nothing, [], "max", **EVERYTHING, seed=0) == []


def test_min_looks_at_the_other_sign():
    both = [exemplar(0, [0.0, 7.0, -7.0]), exemplar(1, [0.0, 7.0, 0.0]), exemplar(2, [0.0, 0.0, -7.0])]
    for sign, fires in (("max", {0, 1}), ("min", {0, 2})):
        questions = fuzzing_questions(both, both, sign, **EVERYTHING, seed=0)
        assert {q.sequence for q in questions if q.truth} == fires
        assert {q.sequence for q in questions if not q.truth} == {0, 1, 2} - fires
        right = " w398" if sign == "max" else " w399"
        assert all(marked(q) == [right] for q in questions if q.truth)


def test_fuzzing_highlights_what_fires_and_as_many_that_do_not():
    # The weaker of the two marked tokens counts where it reaches the share.
    for share, count in ((0.3, 2), (0.5, 2), (0.51, 1)):
        questions = fuzzing_questions(
            firing_exemplars(50), silent_exemplars(40), "max", **EVERYTHING, share=share, seed=0
        )
        assert Counter(q.truth for q in questions) == {True: 15, False: 10}
        assert all(len(marked(q)) == count for q in questions)
        for question in questions:
            if question.truth:
                n = question.sequence
                first = n % 7
                words = [f" w{n:03d}", *(f" w{w}" for w in range(393, 400))]
                assert marked(question) == words[first : first + count]
    places = Counter(word for q in questions if not q.truth for word in marked(q))
    assert len(places) > 3, "wrong ones stand anywhere"


def test_as_many_wrong_highlights_as_right_ones():
    """Not one number for all of them, but the same numbers."""
    lengths = [1, 2, 3, 4, 5]
    firing = [exemplar(n, np.where(np.arange(10) < n, 5.0, 0.0)) for n in lengths]
    questions = fuzzing_questions(firing, silent_exemplars(9, 10), "max", **EVERYTHING, seed=3)
    counts = {truth: sorted(len(marked(q)) for q in questions if q.truth == truth) for truth in (True, False)}
    assert counts == {True: lengths, False: lengths}


def test_what_is_below_the_threshold_is_no_right_highlight_whatever_its_share():
    limits = EVERYTHING | {"threshold": 5.0}
    (question,) = fuzzing_questions([exemplar(0, [0.0, 4.0, 9.0, 5.0])], [], "max", **limits, seed=0)
    assert marked(question) == [" w398", " w399"]


def test_fuzzing_in_firing_excerpts_highlights_what_does_not_fire():
    questions = fuzzing_questions(
        firing_exemplars(50), silent_exemplars(40), "max", **EVERYTHING, wrong_in="firing", share=0.9, seed=0
    )
    right = {q.sequence: marked(q) for q in questions if q.truth}
    wrong = {q.sequence: marked(q) for q in questions if not q.truth}
    assert right.keys() == wrong.keys()
    assert len(questions) == 30
    for sequence, words in wrong.items():
        n = sequence
        tokens = [f" w{n:03d}", *(f" w{w}" for w in range(393, 400))]
        fires = tokens[n % 7 : n % 7 + 2]
        assert len(words) == len(right[sequence]) == 1
        assert words[0] not in fires, "nor on the one that fires below the share"
    everywhere = [exemplar(0, [5.0, 5.0])]
    (only,) = fuzzing_questions(everywhere, [], "max", **EVERYTHING, wrong_in="firing", seed=0)
    assert only.truth


@pytest.mark.parametrize("make", [detection_questions, fuzzing_questions])
def test_long_exemplars_are_cut_where_nothing_is_given_away(make):
    firing = [exemplar(n, np.where(np.arange(60) == 30, 9.0, 0.0)) for n in range(100)]
    silent = [exemplar(100 + n, np.zeros(60)) for n in range(100)]
    limits = EVERYTHING | {"pieces": 10, "per_quantile": 20, "silent": 100}
    questions = make(firing, silent, "max", **limits, seed=0)
    assert len(questions) == 200
    places, silent_places = Counter(), Counter()
    for question in questions:
        words = re.findall(r" w\d+", question.text)
        assert len(words) == 10
        if not question.truth:
            silent_places[words[-1]] += 1
        if question.truth:
            places[words.index(f" w{WORDS - 60 + 30}")] += 1
    assert set(places) == set(range(10)), "the strongest is there, anywhere"
    assert max(places.values()) < 30
    assert len(silent_places) > 25, "silent ones are from anywhere"
    assert max(silent_places.values()) < 20
    short = [exemplar(0, [9.0, 0.0]), exemplar(1, [0.0, 9.0])]
    assert all(len(re.findall(r" w\d+", q.text)) == 2 for q in make(short, [], "max", **limits, seed=0))


def test_the_strongest_is_shown_wherever_it_stands():
    for place in (0, 1, 58, 59):
        firing = [exemplar(n, np.where(np.arange(60) == place, 9.0, 0.0)) for n in range(20)]
        limits = EVERYTHING | {"pieces": 10, "per_quantile": 20}
        for question in fuzzing_questions(firing, [], "max", **limits, seed=0):
            assert len(marked(question)) == 1
            assert len(re.findall(r" w\d+", question.text)) == 10


@settings(deadline=None)
@given(st.lists(st.binary(max_size=5), min_size=1, max_size=8), st.integers(0, 9))
def test_any_text_is_shown_on_a_line_and_whole(tokens, seed):
    tokens = [token or b"?" for token in tokens]
    ends = np.cumsum([len(token) for token in tokens])
    vocabulary = Vocabulary(np.frombuffer(b"".join(tokens), np.uint8), ends)
    activations = np.random.default_rng(seed).choice([0.0, 9.0], len(tokens))
    odd = exemplar(0, activations, vocabulary=vocabulary, tokens=range(len(tokens)))
    whole = b"".join(tokens).decode("utf-8", "surrogateescape")
    for question in detection_questions([odd], [odd], "max", **EVERYTHING, seed=0):
        assert unescape(question.text) == whole
        assert len(question.text.splitlines()) == 1
    for question in fuzzing_questions([odd], [odd], "max", **EVERYTHING, seed=0):
        unmarked = re.sub(r"(?<!\\)((?:\\\\)*)(\{\{|\}\})", r"\1", question.text)
        assert unescape(unmarked) == whole


# ---- words ----

DETECTION = """\
You judge explanations of single neurons of a language model. A neuron gives every token of a text a number, \
its activation, and fires where that is high. You are given an explanation of what a neuron fires on, and \
numbered excerpts of texts.

In some of the excerpts the neuron fires on at least one token, in the others on none; there may be any \
number of either. Give 1 for an excerpt in which, by the explanation, the neuron fires somewhere, and 0 for \
one in which it does not.

In the excerpts, \\n is a line break, \\t a tab, \\xe2 a byte of a broken character, and a backslash before \
any other character says that the character is part of the text.

Answer with JSON alone, of the form {"verdicts": [1, 0, ...]}, with one number for every excerpt, in the \
same order."""

FUZZING = """\
You judge explanations of single neurons of a language model. A neuron gives every token of a text a number, \
its activation, and fires where that is high. You are given an explanation of what a neuron fires on, and \
numbered excerpts of texts.

Tokens stand between {{ and }} in each. In some of the excerpts these are the tokens on which the neuron \
fires, in the others they are tokens on which it does not fire; there may be any number of either. Give 1 \
for an excerpt in which, by the explanation, the neuron fires on the tokens between {{ and }}, and 0 for \
one in which it does not.

In the excerpts, \\n is a line break, \\t a tab, \\xe2 a byte of a broken character, and a backslash before \
any other character says that the character is part of the text.

Answer with JSON alone, of the form {"verdicts": [1, 0, ...]}, with one number for every excerpt, in the \
same order."""

ODD = Vocabulary(np.frombuffer(b'a{{b}}\n \\n\xe2\x82 "c"', np.uint8), np.array([1, 6, 7, 10, 12, 16]))


@pytest.mark.parametrize(
    ("make", "test", "instructions", "line"),
    [
        (detection_questions, "detection", DETECTION, r'a{{b}}\n \\n\xe2\x82 "c"'),
        (fuzzing_questions, "fuzzing", FUZZING, r'a{{\{\{b\}\}\n}} \\n{{\xe2\x82 "c"}}'),
    ],
)
def test_the_messages(make, test, instructions, line):
    odd = exemplar(0, [0.0, 9.0, 8.0, 0.5, 9.0, 0.0], vocabulary=ODD, tokens=range(6))
    questions = make([odd], [], "max", **EVERYTHING, seed=0) * 2
    assert judging_messages(test, "odd things", questions) == [
        Message(role="system", content=instructions),
        Message(role="user", content=f"Explanation: odd things\n\nExcerpt 1: {line}\nExcerpt 2: {line}"),
    ]
