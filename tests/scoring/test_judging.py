"""Detection and fuzzing: which questions are asked, in what words, and what verdicts are worth."""

import contextlib
import json
import math
import random
import re
import ssl
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.explainers import remote
from jaxplain.explainers.excerpts import unescape
from jaxplain.explainers.models import open_model
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.replies import Reply, UnparsableError
from jaxplain.scoring.judging import (
    SCHEMA,
    Question,
    Trial,
    detection_questions,
    fuzzing_questions,
    judge,
    judged_score,
    judging_messages,
    parse_verdicts,
)
from jaxplain.simulators.simulation import Failure
from jaxplain.store.explanations import open_explanations
from jaxplain.store.reader import Exemplar, Vocabulary
from tests.explainers.faults import refused, text
from tests.explainers.remote_runs import KEYS, serve

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


# ---- questions ----


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


# ---- verdicts ----


def test_verdicts_in_every_form_that_is_one():
    assert parse_verdicts('{"verdicts": [1, 0, 1]}', 3) == [True, False, True]
    assert parse_verdicts('```json\n{"verdicts": [true, false]}\n```', 2) == [True, False]
    assert parse_verdicts('{"why": "so", "verdicts": [0]}', 1) == [False]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"verdicts": [1, 0]}', "there are 2 verdicts on 3 excerpts"),
        ('{"verdicts": [1, 0, 1, 0]}', "there are 4 verdicts on 3 excerpts"),
        ('{"verdicts": [1, 2, 0]}', "verdict 2 is '2', which is neither 0 nor 1"),
        ('{"verdicts": [1, -1, 0]}', "verdict 2 is '-1', which is neither 0 nor 1"),
        ('{"verdicts": [1, 0.5, 0]}', "verdict 2 is '0.5', which is neither 0 nor 1"),
        ('{"verdicts": [1, null, 0]}', "verdict 2 is 'None', which is neither 0 nor 1"),
        ('{"verdicts": ["1", "0", "0"]}', "verdict 1 is '1', which is neither 0 nor 1"),
        ('{"verdicts": [[1], 0, 0]}', "verdict 1 is '[1]', which is neither 0 nor 1"),
        ('{"verdicts": [NaN, 0, 0]}', "the reply is not JSON (NaN is no number)"),
        ('{"verdicts": [1, 0, 0], "verdicts": [0, 0, 0]}', "the reply is not JSON (a key of verdicts"),
        ('{"verdicts": {"1": 1}}', 'the reply has no list "verdicts"'),
        ('{"verdict": [1, 0, 0]}', 'the reply has no list "verdicts"'),
        ("[1, 0, 0]", 'the reply has no list "verdicts"'),
        ("1 0 0", "the reply is not JSON"),
        ("", "the reply is not JSON"),
        ('Sure: {"verdicts": [1, 0, 0]}', "the reply is not JSON"),
    ],
)
def test_what_is_no_verdict(reply, said):
    with pytest.raises(UnparsableError) as raised:
        parse_verdicts(reply, 3)
    assert str(raised.value).startswith(said)


# ---- judging ----


def shown_in(prompt):
    return re.findall(r"^Excerpt \d+: (.*)$", prompt, re.MULTILINE)


def explanation_in(prompt):
    return re.findall(r"^Explanation: (.*)$", prompt, re.MULTILINE)[0]


def verdict_on(prompt, shown):
    """What the models here think: something else for each explanation and excerpt."""
    return random.Random(explanation_in(prompt) + shown).randint(0, 1)


def right_answer(prompt):
    return json.dumps({"verdicts": [verdict_on(prompt, shown) for shown in shown_in(prompt)]})


class FakeModel:
    """Answers the last request first."""

    def __init__(self, answer=right_answer):
        self.answer = answer
        self.asked = []

    def answers(self, requests):
        self.asked = list(requests)
        for request in reversed(self.asked):
            answer = self.answer(request.messages[-1].content)
            yield request, answer if isinstance(answer, Reply) else Reply(outcome="answered", text=answer)


def trial(count, explanation="animals", test="detection", index=7):
    questions = [
        Question(text=f"text {n}", truth=n % 2 == 0, sequence=n, quantile=None) for n in range(count)
    ]
    return Trial(layer=3, index=index, sign="min", test=test, explanation=explanation, questions=questions)


def expected(one):
    (prompt,) = (m.content for m in judging_messages(one.test, one.explanation, []) if m.role == "user")
    return [bool(verdict_on(prompt, question.text)) for question in one.questions]


def judged(model, *trials, **options):
    found = {id(one): verdicts for one, verdicts in judge(model, iter(trials), **options)}
    return [found[id(one)] for one in trials]


@pytest.mark.parametrize("at_once", [1, 3, 5, 20])
def test_verdicts_come_back_to_their_questions(at_once):
    trials = [trial(12), trial(7, "verbs"), trial(12, test="fuzzing"), trial(0), trial(5, index=8)]
    model = FakeModel()
    found = judged(model, *trials, at_once=at_once)
    assert found == [expected(one) for one in trials]
    assert found[0][:7] != found[1]
    assert len(model.asked) == sum(-(-len(one.questions) // at_once) for one in trials)
    assert max(len(shown_in(r.messages[-1].content)) for r in model.asked) == min(at_once, 12)


def test_requests_say_what_they_are_about():
    model, other = FakeModel(), FakeModel()
    judged(model, trial(7), trial(3, index=8), at_once=5)
    about = [(r.layer, r.index, r.sign, r.sample) for r in model.asked]
    assert about == [(3, 7, "min", 0), (3, 7, "min", 1), (3, 8, "min", 0)]
    assert all(r.schema == SCHEMA for r in model.asked)
    assert len({r.seed for r in model.asked}) == 3
    judged(other, trial(7), trial(3, index=8), at_once=5, seed=1)
    assert not {r.seed for r in model.asked} & {r.seed for r in other.asked}


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (Reply(outcome="answered", text='{"verdicts": [1]}'), "there are 1 verdicts on 3 excerpts"),
        (
            Reply(outcome="refused", text="No.", detail="finish reason SAFETY"),
            "refused: finish reason SAFETY",
        ),
        (Reply(outcome="failed", detail="503"), "failed: 503"),
        (
            Reply(outcome="answered", text='{"verdicts": [1]}', detail="it was cut short"),
            "there are 1 verdicts on 3 excerpts; it was cut short",
        ),
    ],
)
def test_failures_stay_failures(reply, detail):
    one = trial(9)
    (verdicts,) = judged(
        FakeModel(lambda p: reply if "text 4" in shown_in(p) else right_answer(p)), one, at_once=3
    )
    assert [type(verdict) for verdict in verdicts] == [bool] * 3 + [Failure] * 3 + [bool] * 3
    assert {(v.detail, v.reply) for v in verdicts[3:6]} == {(detail, reply.text or None)}
    score = judged_score(one.questions, verdicts)
    assert (score.answered, score.failed) == (6, 3)


# ---- scores ----


def score_of(pairs):
    questions = [Question(text="", truth=truth, sequence=0, quantile=None) for truth, _ in pairs]
    return judged_score(questions, [verdict for _, verdict in pairs])


def test_scores_by_hand():
    no = Failure(detail="x")
    pairs = [(True, True)] * 3 + [(True, False)] + [(False, True)] * 2 + [(False, False)] * 6
    score = score_of([*pairs, (True, no), (False, no), (False, no)])
    assert score.recall == 3 / 4
    assert score.true_negative_rate == 6 / 8
    assert score.balanced_accuracy == 3 / 4
    assert score.accuracy == 9 / 12
    assert score.precision == 3 / 5
    assert score.f1 == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert (score.answered, score.failed) == (12, 3)
    assert score.reasons == {}


def test_classes_of_unlike_size_weigh_the_same():
    pairs = [(True, True)] + [(True, False)] + [(False, False)] * 98
    score = score_of(pairs)
    assert score.balanced_accuracy == 0.75
    assert score.accuracy == 0.99


SCORES = ("balanced_accuracy", "accuracy", "precision", "recall", "true_negative_rate", "f1")


@pytest.mark.parametrize(
    ("pairs", "class_"),
    [
        ([(False, False), (False, True)], "yes"),
        ([(True, True), (True, False)], "no"),
        ([], "yes"),
        ([(True, Failure(detail="x")), (False, False)], "yes"),
        ([(True, True), (False, Failure(detail="x"))], "no"),
    ],
)
def test_an_empty_class_leaves_no_score(pairs, class_):
    score = score_of(pairs)
    assert all(math.isnan(getattr(score, name)) for name in SCORES)
    assert score.reasons == dict.fromkeys(SCORES, f"no question whose right answer is {class_} has a verdict")


def test_a_judge_who_never_says_yes_has_no_precision():
    score = score_of([(True, False), (False, False)])
    assert math.isnan(score.precision)
    assert score.reasons == {"precision": "no verdict is a yes"}
    assert (score.recall, score.f1, score.balanced_accuracy) == (0, 0, 0.5)


# ---- through the real clients ----


@pytest.fixture(params=["openai", "gemini"])
def provider(request):
    return request.param


@pytest.fixture
def opened(monkeypatch, tmp_path):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.002)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    with contextlib.ExitStack() as stack:

        def make(provider, server):
            database = stack.enter_context(
                open_explanations(tmp_path / "explanations.sqlite", fingerprint="f", subject="s")
            )
            config = ExplainerConfig(provider=provider, model="m", base_url=server.url, retries=1)
            model = open_model(
                config, SamplingConfig(), database=database, recipe=database.recipe({}, ""), stack=stack
            )
            assert model is not None
            return model

        yield make


def test_verdicts_over_the_wire(provider, opened):
    trials = [trial(12), trial(7, "verbs")]
    with serve(provider, lambda request, _: text(right_answer(request.prompt))) as server:
        assert judged(opened(provider, server), *trials) == [expected(one) for one in trials]
    assert len(server.requests) == 5
    for request in server.requests:
        if provider == "openai":
            assert request.body["response_format"]["json_schema"]["schema"] == SCHEMA
        else:
            assert request.body["generationConfig"]["responseJsonSchema"] == SCHEMA


def test_failures_over_the_wire(provider, opened):
    def plan(request, number):
        shown = shown_in(request.prompt)
        if "text 0" in shown:
            return refused()
        if "text 5" in shown:
            return text('{"verdicts": [1, 1, 1, 1]}')
        return text(right_answer(request.prompt))

    one = trial(15)
    with serve(provider, plan) as server:
        (verdicts,) = judged(opened(provider, server), one)
    assert all(verdict.detail.startswith("refused: ") for verdict in verdicts[:5])
    assert all(verdict.detail == "there are 4 verdicts on 5 excerpts" for verdict in verdicts[5:10])
    assert verdicts[10:] == expected(one)[10:]
