"""The simulator without log-probabilities: a fake model for any tokens."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.errors import JaxplainError
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.replies import Reply, UnparsableError, parse_json
from jaxplain.simulators.logprob_free import (
    SCHEMA,
    LogprobFreeSimulator,
    parse_activations,
    simulation_messages,
    token_texts,
)
from jaxplain.simulators.simulation import Failure, Simulation
from tests.simulators.asked import (
    TEXTS,
    WRONG,
    FakeModel,
    entries_for,
    job_of,
    levels_for,
    outcome_of,
    right_answer,
    shown_in,
    simulate,
    vocabulary_of,
    written,
)

TOKENS = st.one_of(
    st.binary(max_size=4),
    st.text(max_size=4).map(str.encode),
    st.sampled_from(
        [b"\t", b"\n", b"\r", b'"', b"\\", b"\\n", b" ", b"", b"\xe2\x80", b"\x99", b"\x7f", b"\x00", b"```"]
    )
    | st.sampled_from([s.encode() for s in ("\u2028", "\x85", "\ud7ff", "\U0001f642", "\\xe2", "1: ", "{")]),
)


@settings(deadline=None)
@given(st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=4), st.booleans())
def test_any_tokens_come_back_with_their_activations(sequences, ascii_only):
    tokens = [token for sequence in sequences for token in sequence]
    ids = iter(range(len(tokens)))
    jobs = [job_of([next(ids) for _ in sequence]) for sequence in sequences]
    model = FakeModel(
        lambda prompt: json.dumps({"activations": entries_for(prompt)}, ensure_ascii=ascii_only)
    )
    for job, (outcome,) in zip(jobs, simulate(model, *jobs, tokens=tokens), strict=True):
        texts = token_texts(job.sequences[0], vocabulary_of(tokens))
        assert isinstance(outcome, Simulation), outcome
        assert outcome.expected.dtype == np.float32
        assert outcome.expected.tolist() == levels_for("animals", texts)
        assert outcome.probabilities is None


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=8))
def test_tokens_may_come_back_without_escapes(tokens):
    """A model that writes a line break as JSON does, rather than as it was shown, is right too."""
    texts = token_texts(np.arange(len(tokens)), vocabulary_of(tokens))
    for raw in texts:
        # What looks like an escape of ours is read as one, so such tokens must be written as shown.
        if "\\" not in raw:
            reply = written([{"token": raw, "activation": 4}])
            assert parse_activations(reply, [raw]).tolist() == [4]


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=2, max_size=8, unique=True), st.data())
def test_replies_out_of_step_are_failures(tokens, data):
    job = job_of(range(len(tokens)))
    texts = token_texts(job.sequences[0], vocabulary_of(tokens))
    kind = data.draw(st.sampled_from(["left out", "twice", "swapped"]))
    place = data.draw(st.integers(0, len(tokens) - 2))

    def answer(prompt):
        entries = entries_for(prompt)
        match kind:
            case "left out":
                del entries[place]
            case "twice":
                entries.insert(place, entries[place])
            case "swapped":
                entries[place : place + 2] = reversed(entries[place : place + 2])
        return written(entries)

    ((outcome,),) = simulate(FakeModel(answer), job, tokens=tokens)
    if kind == "swapped" and texts[place].strip() == texts[place + 1].strip() != "":
        return  # told apart by whitespace alone
    assert isinstance(outcome, Failure), (texts, outcome)
    assert re.match(r"entry \d+ is |there are \d+ entries", outcome.detail)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_it_should_be_is_a_failure(name):
    answer, detail = WRONG[name]
    outcome = outcome_of(answer)
    assert isinstance(outcome, Failure)
    assert outcome.detail.startswith(detail)
    prompt = simulation_messages("animals", TEXTS)[1].content
    assert outcome.reply == (answer(prompt) or None)
    outcome.detail.encode()  # can be written down


RIGHT = {
    "fenced": lambda p: f"```json\n{right_answer(p)}\n```",
    "fenced without a name": lambda p: f" ```\n{right_answer(p)}```\n",
    "in many lines": lambda p: json.dumps(json.loads(right_answer(p)), indent=2),
    "trimmed": lambda p: written([e | {"token": e["token"].strip() or e["token"]} for e in entries_for(p)]),
    "more keys": lambda p: json.dumps(
        {"text": "", "activations": [e | {"number": n} for n, e in enumerate(entries_for(p), 1)]}
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_says_the_same_is_as_good(name):
    outcome = outcome_of(RIGHT[name])
    assert isinstance(outcome, Simulation), outcome
    assert outcome.expected.tolist() == levels_for("animals", TEXTS)


def test_whitespace_may_be_trimmed_on_either_side_but_only_whole():
    token = " \n dog\t "
    for echo in (token, "dog", "dog\t ", " \n dog"):
        reply = written([{"token": echo, "activation": 2.5}])
        assert parse_activations(reply, [token]).tolist() == [2.5]
    for echo in (" dog", "dog\t", " dog ", "", "do"):
        with pytest.raises(UnparsableError, match="entry 1 is "):
            parse_activations(written([{"token": echo, "activation": 2.5}]), [token])


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (
            Reply(outcome="refused", text="No.", detail="finish reason SAFETY"),
            "refused: finish reason SAFETY",
        ),
        (Reply(outcome="failed", detail="500 (7 tries)"), "failed: 500 (7 tries)"),
        (
            Reply(outcome="answered", text="{", detail="the reply was cut short by sampling.max_tokens"),
            "the reply is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); the reply was cut short by sampling.max_tokens",
        ),
    ],
)
def test_replies_that_are_none_keep_their_reason(reply, detail):
    outcome = outcome_of(lambda prompt: reply)
    assert isinstance(outcome, Failure)
    assert outcome.detail == detail
    assert outcome.reply == (reply.text or None)


def test_a_refusal_is_one_even_where_its_text_looks_right():
    outcome = outcome_of(lambda p: Reply(outcome="refused", text=right_answer(p), detail="why"))
    assert isinstance(outcome, Failure)


def test_one_failure_leaves_the_other_sequences_alone():
    def answer(prompt):
        return "no" if shown_in(prompt) == [" dog"] else right_answer(prompt)

    (found,) = simulate(FakeModel(answer), job_of([0], [1], [2]))
    assert [type(outcome) for outcome in found] == [Simulation, Failure, Simulation]
    assert found[2].expected.tolist() == levels_for("animals", ["\n"])


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_jobs_of_one_neuron_are_kept_apart(at_once):
    jobs = [
        job_of([0, 1, 2], [1, 1, 0], [2, 0, 4], explanation=explanation)
        for explanation in ("animals", "verbs", "animals")
    ]
    jobs.append(job_of())
    found = simulate(FakeModel(at_once=at_once), *jobs)
    for job, outcomes in zip(jobs, found, strict=True):
        texts = [[TEXTS[i] for i in sequence] for sequence in job.sequences]
        assert [o.expected.tolist() for o in outcomes] == [levels_for(job.explanation, t) for t in texts]
    assert found[-1] == []


def test_jobs_are_finished_as_their_replies_come_in():
    """Not all jobs are read before the first is asked about, nor all answered before one is handed out."""
    read = []

    def jobs():
        for number in range(10):
            read.append(number)
            yield job_of([0], [1], explanation=str(number))

    simulator = LogprobFreeSimulator(FakeModel(at_once=3), vocabulary_of(TEXTS))
    finished = simulator.simulate(jobs())
    next(finished)
    assert len(read) < 6
    assert len(list(finished)) == 9


def test_what_the_model_leaves_without_an_answer_is_a_failure():
    model = FakeModel(at_once=100, keep=lambda request: request.sample != 1)
    (found,) = simulate(model, job_of([0], [1], [2]))
    assert [type(outcome) for outcome in found] == [Simulation, Failure, Simulation]
    assert found[1].detail == "failed: the model left it without an answer"


def test_errors_of_the_model_end_it_after_what_is_done():
    class Ending(FakeModel):
        def answers(self, requests):
            yield self.answered(next(requests))
            raise JaxplainError("the budget is reached")

    simulator = LogprobFreeSimulator(Ending(), vocabulary_of(TEXTS))
    finished = simulator.simulate(iter([job_of([0]), job_of([1])]))
    assert isinstance(next(finished)[1][0], Simulation)
    with pytest.raises(JaxplainError, match="budget"):
        next(finished)


def test_requests_say_what_they_are_about():
    model = FakeModel()
    jobs = [job_of([0], [1]), job_of([0], sign="min"), job_of([0], index=8), job_of([0], layer=4)]
    simulate(model, *jobs)
    about = [(r.layer, r.index, r.sign, r.sample) for r in model.asked]
    assert about == [(3, 7, "max", 0), (3, 7, "max", 1), (3, 7, "min", 0), (3, 8, "max", 0), (4, 7, "max", 0)]
    assert len({r.seed for r in model.asked}) == 5
    assert all(0 <= r.seed < 2**31 for r in model.asked)
    assert all(r.schema == SCHEMA for r in model.asked)
    again, other = FakeModel(), FakeModel()
    simulate(again, *jobs)
    assert [r.seed for r in again.asked] == [r.seed for r in model.asked]
    list(LogprobFreeSimulator(other, vocabulary_of(TEXTS), seed=1).simulate(iter(jobs)))
    assert not {r.seed for r in other.asked} & {r.seed for r in model.asked}


def test_the_messages():
    tokens = [" the", b"\xe2\x80", b"\x99", "\n", '"', "\\n", "\u00e9"]
    system, user = simulation_messages("animals", token_texts(np.arange(7), vocabulary_of(tokens)))
    assert system == Message(
        role="system",
        content=(
            "You predict the behaviour of single neurons of a language model. A neuron gives every token of "
            "a text a number, its activation. You are given an explanation of what a neuron fires on, and a "
            "text cut into tokens. Say how strongly the neuron fires on each token, going by the "
            "explanation, the token, and the tokens before it.\n"
            "\n"
            "Activations are whole numbers from 0, where the neuron is silent, to 10, where it fires as "
            "strongly as it ever does. A neuron is silent on most tokens, so give 0 where the explanation "
            "gives no reason for more.\n"
            "\n"
            "The tokens are numbered and written as JSON strings. Many are parts of words. In them, "
            r"\\n is a line break, \\t a tab, and \\xe2 a byte of a character that several tokens make up "
            "together.\n"
            "\n"
            'Answer with JSON alone, of the form {"activations": [{"token": " a", "activation": 0}, ...]}, '
            "with one entry for every token, in the same order. Copy each token exactly as it is written, "
            "spaces and backslashes included, and leave out its number."
        ),
    )
    assert user == Message(
        role="user",
        content="\n".join(
            (
                "Explanation: animals",
                "",
                "The text has 7 tokens:",
                '1: " the"',
                r'2: "\\xe2\\x80"',
                r'3: "\\x99"',
                r'4: "\\n"',
                r'5: "\""',
                r'6: "\\\\n"',
                '7: "\u00e9"',
            )
        ),
    )


def test_tokens_without_bytes_are_shown_by_number():
    assert token_texts(np.array([0, 1]), vocabulary_of(["", "a"])) == ["<token 0>", "a"]


def test_json_with_and_without_fence():
    for fenced in ("[1]", " [1]\n", "```json\n[1]\n```", "```\n[1]\n```", "\n```JSON\n[1]```\n", "```[1]```"):
        assert parse_json(fenced) == [1]
    for other in (
        "```python\n[1]\n```",
        "```json\n[1]\n``` so",
        "[1] [2]",
        "-Infinity",
        '{"a": {"b": 1, "b": 1}}',
    ):
        with pytest.raises(UnparsableError, match="the reply is not JSON"):
            parse_json(other)
