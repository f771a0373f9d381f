"""Detection and fuzzing: verdicts, from replies and over the wire, and what they are worth."""

import json
import math
import random
import re

import pytest

from jaxplain.explainers.replies import Reply, UnparsableError
from jaxplain.scoring.judging import (
    SCHEMA,
    Question,
    Trial,
    judge,
    judged_score,
    judging_messages,
    parse_verdicts,
)
from jaxplain.simulators.simulation import Failure
from tests.explainers.faults import refused, text
from tests.explainers.remote_runs import serve

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
