"""Puzzles: made-up neurons with a known explanation, on which any explainer can be graded.

A model run here is graded by which of four explanations, the true one and three false ones, the evidence
makes likelier than the same prompt without evidence (log-probability per token; some phrases are likely
anywhere, see Holtzman et al., 2021, on surface form competition); a remote one, whose likelihoods are out of
reach, by which of the four it picks. Chance is a quarter.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape

from jaxplain.configs.explanation import ExplainConfig, PromptConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.evidence import marked_evidence, solved_examples
from jaxplain.explainers.local import LocalModel
from jaxplain.explainers.models import open_model
from jaxplain.explainers.prompts import EXPLANATION, Message, Shown, prompt
from jaxplain.explainers.replies import Reply, Request, UnparsableError, parse_reply
from jaxplain.explainers.token_means import describe_tokens
from jaxplain.store.explanations import open_explanations

_LETTERS = "ABCD"
_MARKS = {True: "right", False: "wrong", None: "-----"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Puzzle:
    """A made-up neuron. `quiet` are excerpts on which it is silent, `decoys` explanations that are wrong."""

    name: str
    category: str
    truth: str
    decoys: Sequence[str]
    excerpts: Sequence[str]
    quiet: Sequence[str]

    @functools.cached_property
    def shown(self) -> Shown:
        """What a prompt shows of it."""
        return marked_evidence(self.excerpts, self.quiet)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grade:
    """How an explainer did. `choice` is the explanation it prefers, None where it has no preference."""

    puzzle: Puzzle
    explanation: str | None
    choice: str | None

    @property
    def right(self) -> bool | None:
        """Whether it prefers the truth."""
        return None if self.choice is None else self.choice == self.puzzle.truth


@functools.cache
def puzzles() -> tuple[Puzzle, ...]:
    """All puzzles."""
    text = (importlib.resources.files("jaxplain.explainers") / "puzzles.yaml").read_text("utf-8")
    return tuple(Puzzle(**entry) for entry in yaml.safe_load(text))


def grade_puzzles(config: ExplainConfig, console: Console) -> list[Grade]:
    """Put all puzzles to the config's explainer and print how it did."""
    if config.prompt.style == "highlighted_both_signs":
        raise JaxplainError(
            "prompt.style is 'highlighted_both_signs', but puzzles have one sign; use highlighted."
        )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(
            open_explanations(folder / "puzzles.sqlite", fingerprint="puzzles", subject="puzzles")
        )
        recipe = database.recipe({}, "")
        model = open_model(config.explainer, config.sampling, database=database, recipe=recipe, stack=stack)
        if model is None:
            grades = [
                Grade(
                    puzzle=puzzle,
                    explanation=describe_tokens(
                        [name for name, _ in puzzle.shown.tokens[: config.prompt.tokens]]
                    ),
                    choice=None,
                )
                for puzzle in puzzles()
            ]
        elif isinstance(model, LocalModel):
            explanations = _explanations(dict(model.answers(iter(_questions(config)))), config.prompt)
            grades = _graded(explanations, _likeliest(model, config))
        else:
            asked = [*_questions(config), *_choice_questions(config)]
            replies = dict(model.answers(iter(asked)))
            grades = _graded(_explanations(replies, config.prompt), _choices(replies))
    _print(grades, console)
    return grades


def _graded(explanations: dict[int, str], choices: dict[int, str]) -> list[Grade]:
    return [
        Grade(puzzle=puzzle, explanation=explanations.get(number), choice=choices.get(number))
        for number, puzzle in enumerate(puzzles())
    ]


def _messages(shown: Shown, config: ExplainConfig) -> list[Message]:
    return prompt(shown, config.prompt, solved_examples(config.prompt, config.sampling.seed))


def _questions(config: ExplainConfig) -> list[Request]:
    """One request for an explanation of each puzzle; `index` is its number, `sample` 0."""
    return [
        _request(number, 0, _messages(puzzle.shown, config), config)
        for number, puzzle in enumerate(puzzles())
    ]


def _choice_questions(config: ExplainConfig) -> list[Request]:
    """One request per puzzle to pick an explanation by its letter; `sample` is 1."""
    questions = []
    for number, puzzle in enumerate(puzzles()):
        *before, last = _messages(puzzle.shown, config)
        options = "\n".join(
            f"{letter}: {text}" for letter, text in zip(_LETTERS, _options(number), strict=True)
        )
        ask = (
            f"{last.content}\n\nThis time, do not write an explanation. One of these four is the right one:\n"
            f"{options}\nAnswer with its letter alone."
        )
        questions.append(_request(number, 1, [*before, Message(role="user", content=ask)], config))
    return questions


def _request(number: int, sample: int, messages: list[Message], config: ExplainConfig) -> Request:
    return Request(
        layer=0,
        index=number,
        sign="max",
        sample=sample,
        messages=messages,
        seed=config.sampling.seed + number,
    )


def _options(number: int) -> list[str]:
    """The four explanations in an order of their own for each puzzle."""
    puzzle = puzzles()[number]
    candidates = [puzzle.truth, *puzzle.decoys]
    return [candidates[i] for i in np.random.default_rng(number).permutation(len(candidates))]


def _explanations(replies: dict[Request, Reply], config: PromptConfig) -> dict[int, str]:
    found = {}
    for request, reply in replies.items():
        if request.sample == 0 and reply.outcome == "answered":
            with contextlib.suppress(UnparsableError):
                found[request.index] = parse_reply(reply.text, config)["max"]
    return found


def _choices(replies: dict[Request, Reply]) -> dict[int, str]:
    found = {}
    for request, reply in replies.items():
        # "A good answer is C": the last one is meant.
        letters = re.findall(rf"\b[{_LETTERS}]\b", reply.text)
        if request.sample == 1 and reply.outcome == "answered" and letters:
            found[request.index] = _options(request.index)[_LETTERS.index(letters[-1])]
    return found


def _likeliest(model: LocalModel, config: ExplainConfig) -> dict[int, str]:
    asked = [(number, option) for number in range(len(puzzles())) for option in _options(number)]
    replies = [f"{EXPLANATION} {option}" for _, option in asked]
    informed = model.log_likelihoods([_messages(puzzles()[n].shown, config) for n, _ in asked], replies)
    blank = model.log_likelihoods([_messages(Shown(), config)] * len(asked), replies)
    best: dict[int, tuple[float, str]] = {}
    for (number, option), gain in zip(asked, (informed - blank).tolist(), strict=True):
        best[number] = max(best.get(number, (-np.inf, "")), (gain, option))
    return {number: option for number, (_, option) in best.items()}


def _print(grades: Sequence[Grade], console: Console) -> None:
    by_category: dict[str, list[Grade]] = defaultdict(list)
    for grade in grades:
        by_category[grade.puzzle.category].append(grade)
    graded = any(grade.right is not None for grade in grades)
    for category, members in by_category.items():
        right = sum(bool(grade.right) for grade in members)
        console.print(f"[bold]{category}[/bold]" + (f"  {right} of {len(members)}" if graded else ""))
        for grade in members:
            console.print(
                f"  {_MARKS[grade.right]}  {escape(grade.puzzle.truth)}: "
                f"[dim]{escape(grade.explanation or 'no explanation')}[/dim]",
                soft_wrap=True,
                highlight=False,
            )
    if graded:
        right = sum(bool(grade.right) for grade in grades)
        console.print(f"{right} of {len(grades)} puzzles right (chance {len(grades) / 4:g})", highlight=False)
    else:
        console.print(
            f"{len(grades)} puzzles; this explainer has no likelihood to be graded by", highlight=False
        )
