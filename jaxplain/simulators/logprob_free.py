"""A simulator that asks any language model for numbers and needs no log-probabilities of it.

One request gives the activations of a whole sequence, after the variant of Bills et al.'s (2023) simulator
that OpenAI published for models without log-probabilities; wording and checks are our own. The model writes
every token once more beside its number, so that a reply that slips out of step is noticed.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxplain.explainers.excerpts import escape, unescape
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.replies import (
    LanguageModel,
    Reply,
    Request,
    UnparsableError,
    answer_in,
    parse_json,
    replies_by_item,
)
from jaxplain.simulators.simulation import LEVELS, Failure, Job, Simulation
from jaxplain.store.exemplar import Vocabulary
from jaxplain.store.neuron_id import neuron_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "activations": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"token": {"type": "string"}, "activation": {"type": "integer"}},
                "required": ["token", "activation"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["activations"],
    "additionalProperties": False,
}
"""JSON schema of a reply; bounds are checked here, since not all providers know them."""

_INSTRUCTIONS = (
    "You predict the behaviour of single neurons of a language model. A neuron gives every token of a text a "
    "number, its activation. You are given an explanation of what a neuron fires on, and a text cut into "
    "tokens. Say how strongly the neuron fires on each token, going by the explanation, the token, and the "
    "tokens before it.\n\n"
    f"Activations are whole numbers from 0, where the neuron is silent, to {LEVELS - 1}, where it fires as "
    "strongly as it ever does. A neuron is silent on most tokens, so give 0 where the explanation gives no "
    "reason for more.\n\n"
    "The tokens are numbered and written as JSON strings. Many are parts of words. In them, \\\\n is a line "
    "break, \\\\t a tab, and \\\\xe2 a byte of a character that several tokens make up together.\n\n"
    'Answer with JSON alone, of the form {"activations": [{"token": " a", "activation": 0}, ...]}, with one '
    "entry for every token, in the same order. Copy each token exactly as it is written, spaces and "
    "backslashes included, and leave out its number."
)


class LogprobFreeSimulator:
    """Simulates with any language model.

    A reply has about 20 tokens for each token of the sequence; sampling.max_tokens must allow for them.
    """

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary, *, seed: int = 0):
        """`vocabulary` is that of the store that the sequences are from; `seed` that of the replies."""
        self._model, self._vocabulary, self._seed = model, vocabulary, seed

    def simulate(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Simulation | Failure]]]:
        """Jobs with what came of each of their sequences, in the order in which they are finished.

        Raises JaxplainError where the model does.
        """
        asked = ((job, self._requests(job)) for job in jobs)
        for job, replies in replies_by_item(self._model, asked):
            outcomes = zip(job.sequences, replies, strict=True)
            yield job, [self._outcome(tokens_T, reply) for tokens_T, reply in outcomes]

    def _requests(self, job: Job) -> list[Request]:
        """One for every sequence of a job; `sample` is the sequence's number."""
        draw = (self._seed, *neuron_of(job), int(job.sign == "min"))
        return [
            Request(
                layer=job.layer,
                expert=job.expert,
                index=job.index,
                sign=job.sign,
                sample=number,
                messages=simulation_messages(job.explanation, token_texts(tokens_T, self._vocabulary)),
                seed=int(np.random.SeedSequence((*draw, number)).generate_state(1)[0] >> 1),
                schema=SCHEMA,
            )
            for number, tokens_T in enumerate(job.sequences)
        ]

    def _outcome(self, tokens_T: Int[np.ndarray, "T"], reply: Reply) -> Simulation | Failure:
        texts = token_texts(tokens_T, self._vocabulary)
        try:
            return Simulation(expected=answer_in(reply, lambda text: parse_activations(text, texts)))
        except UnparsableError as error:
            return Failure(detail=str(error), reply=reply.text or None)


def token_texts(tokens_T: Int[np.ndarray, "T"], vocabulary: Vocabulary) -> list[str]:
    """The text of each token by itself; bytes of a partial character are surrogates, as in excerpts."""
    return [
        (vocabulary.bytes_of(token) or f"<token {token}>".encode()).decode("utf-8", "surrogateescape")
        for token in tokens_T.tolist()
    ]


def simulation_messages(explanation: str, texts: Sequence[str]) -> list[Message]:
    """The messages that ask for the activations of tokens."""
    lines = [f"{number}: {_written(text)}" for number, text in enumerate(texts, 1)]
    asked = "\n".join((f"Explanation: {explanation}", "", f"The text has {len(texts)} tokens:", *lines))
    return [Message(role="system", content=_INSTRUCTIONS), Message(role="user", content=asked)]


def _written(text: str) -> str:
    """A token as the model sees it and is to write it."""
    return json.dumps(escape(text), ensure_ascii=False)


def parse_activations(text: str, texts: Sequence[str]) -> Float[np.ndarray, "T"]:
    """The activations in a reply about tokens of these texts, from 0 to 10, float32 [T].

    Whitespace that is missing at either end of a token is let pass, as long as it is missing altogether and
    the token is more than whitespace: some models trim strings, and what is left still tells tokens apart.

    Raises UnparsableError that names the first entry that is not as it should be.
    """
    reply = parse_json(text)
    entries = reply.get("activations") if isinstance(reply, dict) else None
    if not isinstance(entries, list):
        raise UnparsableError('the reply has no list "activations"')
    activations_T = np.full(len(texts), np.nan, np.float32)
    for place, (entry, token) in enumerate(zip(entries, texts, strict=False)):
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            raise UnparsableError(f"entry {place + 1} has no token")
        echo = unescape(entry["token"])
        if echo not in _echoes(token):
            raise UnparsableError(f"entry {place + 1} is {echo!r} where the sequence has {token!r}")
        activation = entry.get("activation")
        if isinstance(activation, bool) or not isinstance(activation, int | float):
            raise UnparsableError(f"entry {place + 1} ({token!r}) has no activation")
        if not 0 <= activation <= LEVELS - 1:
            said = str(activation)[:20]
            raise UnparsableError(
                f"entry {place + 1} ({token!r}) has activation {said}, not one from 0 to 10"
            )
        activations_T[place] = activation
    if len(entries) != len(texts):
        raise UnparsableError(f"there are {len(entries)} entries, and the sequence has {len(texts)} tokens")
    return activations_T


def _echoes(token: str) -> set[str]:
    """How a token may come back."""
    trimmed = {token.strip(), token.lstrip(), token.rstrip()}
    return {token, *trimmed} if token.strip() else {token}
