"""What tests of the simulator without log-probabilities ask, and a model that answers it."""

import json
import math
import random
import re

import numpy as np

from jaxplain.explainers.replies import Reply
from jaxplain.simulators.logprob_free import (
    LogprobFreeSimulator,
    simulation_messages,
)
from jaxplain.simulators.simulation import Job, Simulator
from jaxplain.store.exemplar import Vocabulary

TEXTS = [" the", " dog", "\n", '"', "\\n", " "]
"""The tokens of most tests here, in order."""


def vocabulary_of(tokens):
    """A vocabulary of tokens, given as bytes or text."""
    spelled = [t if isinstance(t, bytes) else t.encode("utf-8", "surrogateescape") for t in tokens]
    return Vocabulary(
        np.frombuffer(b"".join(spelled), np.uint8), np.cumsum([len(t) for t in spelled], dtype=np.int64)
    )


def job_of(*sequences, explanation="animals", layer=3, index=7, sign="max"):
    tokens = [np.array(sequence, np.int32) for sequence in sequences]
    return Job(layer=layer, index=index, sign=sign, explanation=explanation, sequences=tokens)


WHOLE = job_of(range(len(TEXTS)))


def shown_in(prompt):
    """The tokens as a prompt writes them, read from its numbered lines."""
    lines = re.findall(r"^(\d+): (.*)$", prompt, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    return [json.loads(token) for _, token in lines]


def level(prompt, place):
    """What the models here take for a token's activation: something else for every prompt and place."""
    return random.Random(f"{prompt.split('Explanation: ')[1]}/{place}").randint(0, 10)


def levels_for(explanation, texts):
    prompt = simulation_messages(explanation, texts)[1].content
    return [level(prompt, place) for place in range(len(texts))]


def entries_for(prompt):
    return [
        {"token": token, "activation": level(prompt, place)} for place, token in enumerate(shown_in(prompt))
    ]


def written(entries):
    return json.dumps({"activations": entries})


def right_answer(prompt):
    return written(entries_for(prompt))


class FakeModel:
    """Answers from a request's last message, and in any order, a few requests at a time."""

    def __init__(self, answer=right_answer, *, at_once=3, keep=lambda request: True):
        self.answer, self.at_once, self.keep = answer, at_once, keep
        self.asked = []

    def answers(self, requests):
        shuffled = random.Random(0)
        waiting = []
        for request in requests:
            self.asked.append(request)
            waiting.append(request)
            if len(waiting) >= self.at_once:
                yield self.answered(waiting.pop(shuffled.randrange(len(waiting))))
        for request in waiting:
            if self.keep(request):
                yield self.answered(request)

    def answered(self, request):
        answer = self.answer(request.messages[-1].content)
        return request, answer if isinstance(answer, Reply) else Reply(outcome="answered", text=answer)


def simulate(model, *jobs, tokens=TEXTS):
    """Outcomes by job."""
    simulator = LogprobFreeSimulator(model, vocabulary_of(tokens))
    assert isinstance(simulator, Simulator)
    finished = list(simulator.simulate(iter(jobs)))
    assert len(finished) == len(jobs)
    outcomes = {id(job): found for job, found in finished}
    return [outcomes[id(job)] for job in jobs]


def outcome_of(answer):
    """What comes of a reply about TEXTS."""
    ((outcome,),) = simulate(FakeModel(answer), WHOLE)
    return outcome


def changed(place, **change):
    """An answer with something else in one entry."""

    def answer(prompt):
        entries = entries_for(prompt)
        entries[place] = {k: v for k, v in (entries[place] | change).items() if v != "absent"}
        return written(entries)

    return answer


def respelled(pattern, replacement):
    """An answer whose text is changed."""
    return lambda prompt: re.sub(pattern, lambda _: replacement, right_answer(prompt), count=1)


WRONG = {
    "another token": (changed(1, token=" the"), "entry 2 is ' the' where the sequence has ' dog'"),
    "another case": (changed(1, token=" Dog"), "entry 2 is ' Dog' where the sequence has ' dog'"),
    "more whitespace": (changed(1, token="  dog"), "entry 2 is '  dog' where the sequence has ' dog'"),
    "with its number": (changed(1, token="2:  dog"), "entry 2 is '2:  dog' where the sequence has ' dog'"),
    "a lost line break": (changed(2, token=""), r"entry 3 is '' where the sequence has '\n'"),
    "a lost space": (changed(5, token=""), "entry 6 is '' where the sequence has ' '"),
    "a lost backslash": (changed(4, token="\\n"), r"entry 5 is '\n' where the sequence has '\\n'"),
    "half a surrogate": (changed(1, token="\ud83d"), r"entry 2 is '\ud83d' where the sequence has ' dog'"),
    "no token": (changed(1, token="absent"), "entry 2 has no token"),
    "a number for a token": (changed(1, token=5), "entry 2 has no token"),
    "entry of no object": (lambda p: '{"activations": [3]}', "entry 1 has no token"),
    "no activation": (changed(1, activation="absent"), "entry 2 (' dog') has no activation"),
    "null": (changed(1, activation=None), "entry 2 (' dog') has no activation"),
    "text": (changed(1, activation="7"), "entry 2 (' dog') has no activation"),
    "truth": (changed(1, activation=True), "entry 2 (' dog') has no activation"),
    "too high": (changed(1, activation=11), "entry 2 (' dog') has activation 11, not one from 0 to 10"),
    "just too high": (
        changed(1, activation=10.001),
        "entry 2 (' dog') has activation 10.001, not one from 0 to 10",
    ),
    "negative": (changed(1, activation=-1), "entry 2 (' dog') has activation -1, not one from 0 to 10"),
    "huge": (
        changed(1, activation=10**400),
        f"entry 2 (' dog') has activation 1{'0' * 19}, not one from 0 to 10",
    ),
    "infinite": (
        respelled(r'"activation": \d+', '"activation": 1e999'),
        "entry 1 (' the') has activation inf, not one from 0 to 10",
    ),
    "NaN": (changed(1, activation=math.nan), "the reply is not JSON (NaN is no number)"),
    "Infinity": (changed(1, activation=math.inf), "the reply is not JSON (Infinity is no number)"),
    "two activations": (
        respelled('"activation": ', '"activation": 0, "activation": '),
        "the reply is not JSON (a key of token, activation comes twice)",
    ),
    "missing at the end": (
        lambda p: written(entries_for(p)[:-1]),
        "there are 5 entries, and the sequence has 6 tokens",
    ),
    "missing in the middle": (
        lambda p: written(entries_for(p)[:1] + entries_for(p)[2:]),
        r"entry 2 is '\n' where the sequence has ' dog'",
    ),
    "none": (lambda p: written([]), "there are 0 entries, and the sequence has 6 tokens"),
    "one too many": (
        lambda p: written([*entries_for(p), {"token": "", "activation": 0}]),
        "there are 7 entries, and the sequence has 6 tokens",
    ),
    "a bare list": (lambda p: json.dumps(entries_for(p)), 'the reply has no list "activations"'),
    "another key": (lambda p: '{"activation": []}', 'the reply has no list "activations"'),
    "an object": (lambda p: '{"activations": {}}', 'the reply has no list "activations"'),
    "words": (lambda p: "I cannot say.", "the reply is not JSON (Expecting value"),
    "nothing": (lambda p: "", "the reply is not JSON (Expecting value"),
    "words before": (lambda p: f"Here it is: {right_answer(p)}", "the reply is not JSON (Expecting value"),
    "words after": (lambda p: f"{right_answer(p)} Good luck!", "the reply is not JSON (Extra data"),
    "too deep": (lambda p: "[" * 100_000, "the reply is not JSON ("),
    "an open fence": (lambda p: f"```json\n{right_answer(p)}", "the reply is not JSON (Expecting value"),
}
"""Answers that are no simulation of TEXTS, and what is said of each."""
