"""A simulator that is an ordinary language model: all activations of a sequence are read off one pass.

The sequence is laid out with a placeholder after each of its tokens; at each of those the probabilities of
the digits are the prediction, although none of them is ever written (the all-at-once simulator that
followed Bills et al., 2023). The solved examples that come before are read once for all.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxplain.configs.explanation import LocalModelConfig, PromptConfig
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.configs.scoring import PromptedConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.chat import ChatTokenizer
from jaxplain.explainers.evidence import solved_examples
from jaxplain.explainers.excerpts import Excerpt, escape
from jaxplain.explainers.prompts import Message
from jaxplain.mesh import make_mesh
from jaxplain.simulators.level_reader import Asked, LevelReader
from jaxplain.simulators.simulation import LEVELS, Failure, Job, Simulation
from jaxplain.store.exemplar import Vocabulary
from jaxplain.subjects.subject import open_subject

_INSTRUCTIONS = (
    "You predict the behaviour of single neurons of a language model. A neuron gives every token of a text "
    "a number from 0 to {highest}, its activation: 0 where it is silent, which is at most tokens, and "
    "{highest} where it fires as strongly as it ever does. You are given an explanation of what a neuron "
    "fires on. Then comes a text, one token a line, each followed by a tab and its activation; {unknown} "
    "stands for an activation that is not known."
)


class PromptedSimulator:
    """Expected levels at every token. Where "10" is not one token, levels go up to 9, and are stretched."""

    def __init__(self, model: str, config: PromptedConfig, local: LocalModelConfig, vocabulary: Vocabulary):
        subject = open_subject(
            SubjectConfig(id=model, revision=local.revision, dtype=local.dtype), field="simulators.model"
        )
        self._vocabulary, self._unknown = vocabulary, config.unknown
        self._chat = ChatTokenizer(subject.tokenizer, model, escape=local.escape)
        digits = [self._chat.text(str(level)) for level in range(LEVELS)]
        self._levels = LEVELS if len(digits[-1]) == 1 else LEVELS - 1
        if any(len(digit) != 1 for digit in digits[: self._levels]):
            raise JaxplainError(
                f"simulators.model is {model!r}, to which digits are no single tokens; choose another model."
            )
        self._tab, self._rest = self._chat.text("\t"), self._chat.text(f"{config.unknown}\n")
        self._solved = prompted_messages(config, levels=self._levels)
        shared = _common_start(*(self._prompt(explanation) for explanation in ("A", "the")))
        self._shared = len(shared)
        mesh = make_mesh(local.mesh, batch_size=local.batch_size, mlp_width=subject.arch.neurons)
        self._reader = LevelReader(
            subject.load(mesh, with_head=True),
            mesh,
            np.array(digits[: self._levels], np.int32)[:, 0],
            batch_size=local.batch_size,
            shared=shared,
        )

    def simulate(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Simulation | Failure]]]:
        """Jobs with their simulations, some batches at a time."""

        def asked() -> Iterator[Asked]:
            for job in jobs:
                laid_out, places = zip(*map(self._laid_out, job.sequences), strict=True)
                prompt = self._prompt(job.explanation)[self._shared :]
                yield Asked((job, places), prompt, laid_out)

        level_L = np.arange(self._levels, dtype=np.float32) * ((LEVELS - 1) / (self._levels - 1))
        for (job, places), probabilities in self._reader.read(asked()):
            yield (
                job,
                [
                    Simulation(
                        expected=p_TL[place] @ level_L,
                        probabilities=p_TL[place] if self._levels == LEVELS else None,
                    )
                    for place, p_TL in zip(places, probabilities, strict=True)
                ],
            )

    def _prompt(self, explanation: str) -> list[int]:
        return self._chat.tokens([*self._solved, _question(explanation)])

    def _laid_out(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A sequence with placeholders, and the place after which each of its activations would stand."""
        ids: list[int] = []
        places: list[int] = []
        for token in sequence.tolist():
            piece = escape(self._vocabulary.bytes_of(token).decode("utf-8", "surrogateescape"))
            ids += self._chat.text(piece) + self._tab
            places.append(len(ids) - 1)
            ids += self._rest
        return np.array(ids, np.int32), np.array(places)


def prompted_messages(config: PromptedConfig, *, levels: int) -> list[Message]:
    """The instructions, and solved examples as turns."""
    instructions = _INSTRUCTIONS.format(highest=levels - 1, unknown=config.unknown)
    messages = [Message(role="system", content=instructions)]
    if config.few_shot == 0:
        return messages
    prompt = PromptConfig(style="highlighted", few_shot_count=config.few_shot)
    for example in solved_examples(prompt):
        messages += [
            _question(example.explanation),
            Message(role="assistant", content=_solved(example.shown.excerpts[0], config.unknown, levels)),
        ]
    return messages


def _question(explanation: str) -> Message:
    return Message(role="user", content=f"Explanation: {explanation}")


def _solved(excerpt: Excerpt, unknown: str, levels: int) -> str:
    """Activations are unknown until shortly before the first that is not 0."""
    shown_N = np.rint(excerpt.strengths * ((levels - 1) / (LEVELS - 1))).astype(int)
    known_from = max(int(np.argmax(shown_N > 0)) - 1, 0)
    lines = [
        f"{escape(piece)}\t{unknown if place < known_from else level}\n"
        for place, (piece, level) in enumerate(zip(excerpt.pieces, shown_N.tolist(), strict=True))
    ]
    return "".join(lines)


def _common_start(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """What two prompts begin with."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return list(one[:place])
    return list(one[: min(len(one), len(other))])
