"""What tests of the simulator without log-probabilities ask, and a model that answers it."""

import json
import random
import re

import numpy as np

from jaxplain.explainers.replies import Reply
from jaxplain.simulators.logprob_free import (
    LogprobFreeSimulator,
    simulation_messages,
)
from jaxplain.simulators.simulation import Job, Simulator
from jaxplain.store.reader import Vocabulary

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
