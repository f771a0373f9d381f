"""Detection and fuzzing: can a judge who knows only the explanation tell where the neuron fires?

Both are defined by Paulo et al. (2024, "Automatically Interpreting Millions of Features in Large Language
Models") and EleutherAI's delphi; wording and code are our own. In *detection* the judge sees excerpts, some
in which the neuron fires, from the strongest to the weakest of those kept, and some random ones in which it
does not, and says of each whether the neuron fires in it. In *fuzzing* tokens are highlighted, in some
excerpts those on which the neuron fires and in others as many on which it does not, and the judge says of
each excerpt whether the highlights are right.

Where theirs takes any activation above zero for firing, as sparse features allow, `threshold` says here what
counts. An answer that is missing is left out of the scores and counted; it is never taken for a no.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from jaxplain.configs.explanation import Sign
from jaxplain.explainers.excerpts import Excerpt, escape, excerpt_of
from jaxplain.explainers.prompts import Message, highlight
from jaxplain.explainers.replies import (
    LanguageModel,
    Request,
    UnparsableError,
    answer_in,
    parse_json,
    replies_by_item,
)
from jaxplain.simulators.simulation import Failure
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.neuron_id import neuron_of

Test = Literal["detection", "fuzzing"]

_DELIMITERS = ("{{", "}}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """An excerpt to be judged.

    Attributes:
        text: The excerpt as it is shown, on one line.
        truth: Whether yes is right.
        sequence: The row of the token table that the excerpt is from.
        quantile: Which part of the firing exemplars it is from, 0 being the strongest; None for a silent
            one.
    """

    text: str
    truth: bool
    sequence: int
    quantile: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """An explanation, and what a judge is asked about it."""

    layer: int
    index: int
    expert: int | None = None
    sign: str
    test: Test
    explanation: str
    questions: Sequence[Question]


# ---- questions ----


def detection_questions(
    firing: Sequence[Exemplar],
    random: Sequence[Exemplar],
    sign: Sign,
    *,
    threshold: float,
    quantiles: int = 10,
    per_quantile: int = 5,
    silent: int = 50,
    pieces: int | None = 32,
    seed: int,
) -> list[Question]:
    """Excerpts in which the neuron fires, truly yes, and ones in which it does not, in random order.

    Args:
        firing: Exemplars of kind `sign`, and others if wanted; those whose strongest activation is below
            `threshold` are left out. The rest are sorted by it and cut into `quantiles` parts of like size.
        random: Exemplars of kind random; only those that stay below `threshold` throughout are used.
        sign: Which sign's activations count as positive.
        threshold: The activation from which on the neuron fires, above 0.
        quantiles: How many parts.
        per_quantile: Exemplars drawn from each part; all where there are fewer.
        silent: Silent exemplars drawn; all where there are fewer.
        pieces: Tokens shown of an exemplar, among them the strongest, which may stand anywhere; all for
            None. Weaker judges do better on short excerpts.
        seed: Of draws and order.
    """
    rng = np.random.default_rng(seed)
    chosen = _firing(firing, sign, threshold, quantiles, per_quantile, pieces, rng)
    questions = [
        Question(text=_plain(excerpt), truth=True, sequence=sequence, quantile=quantile)
        for quantile, sequence, excerpt in chosen
    ]
    questions += [
        Question(text=_plain(excerpt), truth=False, sequence=sequence, quantile=None)
        for sequence, excerpt in _silent(random, sign, threshold, silent, pieces, rng)
    ]
    return [questions[i] for i in rng.permutation(len(questions))]


def fuzzing_questions(
    firing: Sequence[Exemplar],
    random: Sequence[Exemplar],
    sign: Sign,
    *,
    threshold: float,
    share: float = 0.3,
    wrong_in: Literal["silent", "firing"] = "silent",
    quantiles: int = 10,
    per_quantile: int = 5,
    silent: int = 50,
    pieces: int | None = 32,
    seed: int,
) -> list[Question]:
    """Excerpts with highlights that are right, truly yes, and with as many that are wrong, in random order.

    Right ones are on every token whose activation is at least `threshold` and at least `share` of the
    excerpt's strongest. Wrong ones are on as many tokens, drawn at random, below `threshold`; how many is
    taken from the excerpts with right ones, in turn.

    Args:
        firing: See `detection_questions`.
        random: See `detection_questions`.
        sign: Which sign's activations count as positive.
        threshold: The activation from which on the neuron fires, above 0.
        share: Of the excerpt's strongest activation.
        wrong_in: Where wrong highlights are: in silent exemplars, as many as `silent` says; or once more in
            each of the firing ones (the harder test), which asks which token fires and not only where.
        quantiles: See `detection_questions`.
        per_quantile: See `detection_questions`.
        silent: See `detection_questions`.
        pieces: See `detection_questions`.
        seed: Of draws and order.
    """
    rng = np.random.default_rng(seed)
    chosen = _firing(firing, sign, threshold, quantiles, per_quantile, pieces, rng)
    right = [_fires(excerpt, threshold, share) for _, _, excerpt in chosen]
    questions = [
        Question(text=_highlighted(excerpt, marked_N), truth=True, sequence=sequence, quantile=quantile)
        for (quantile, sequence, excerpt), marked_N in zip(chosen, right, strict=True)
    ]
    others = (
        chosen
        if wrong_in == "firing"
        else [(None, *found) for found in _silent(random, sign, threshold, silent, pieces, rng)]
    )
    for place, (quantile, sequence, excerpt) in enumerate(others if right else []):
        free = np.flatnonzero(excerpt.activations < threshold)  # not where it is NaN
        count = min(int(right[place % len(right)].sum()), len(free))
        if not count:
            continue  # it fires on every token
        marked_N = np.zeros(len(excerpt.pieces), bool)
        marked_N[rng.choice(free, count, replace=False)] = True
        text = _highlighted(excerpt, marked_N)
        questions.append(Question(text=text, truth=False, sequence=sequence, quantile=quantile))
    return [questions[i] for i in rng.permutation(len(questions))]


def _firing(
    exemplars: Sequence[Exemplar],
    sign: Sign,
    threshold: float,
    quantiles: int,
    per_quantile: int,
    pieces: int | None,
    rng: np.random.Generator,
) -> list[tuple[int, int, Excerpt]]:
    """Quantile, sequence and excerpt of exemplars drawn from each part; no sequence twice."""
    by_sequence = {exemplar.sequence: excerpt_of(exemplar, sign) for exemplar in exemplars}
    fires = [(s, e) for s, e in by_sequence.items() if e.strengths.max(initial=0) >= threshold]
    fires.sort(key=lambda found: (-found[1].strengths.max(), found[0]))
    chosen = []
    for quantile, part in enumerate(np.array_split(np.arange(len(fires)), quantiles)):
        for place in np.sort(rng.permutation(part)[:per_quantile]):
            sequence, excerpt = fires[place]
            peak = int(np.argmax(excerpt.strengths))
            chosen.append((quantile, sequence, _window(excerpt, peak, pieces, rng)))
    return chosen


def _silent(
    exemplars: Sequence[Exemplar],
    sign: Sign,
    threshold: float,
    count: int,
    pieces: int | None,
    rng: np.random.Generator,
) -> list[tuple[int, Excerpt]]:
    """Sequence and excerpt of exemplars drawn among those that stay below the threshold."""
    by_sequence = {exemplar.sequence: excerpt_of(exemplar, sign) for exemplar in exemplars}
    quiet = [(s, e) for s, e in by_sequence.items() if e.pieces and e.strengths.max() < threshold]
    return [
        (quiet[i][0], _window(quiet[i][1], int(rng.integers(len(quiet[i][1].pieces))), pieces, rng))
        for i in rng.permutation(len(quiet))[:count]
    ]


def _window(excerpt: Excerpt, place: int, pieces: int | None, rng: np.random.Generator) -> Excerpt:
    """So many pieces around a place, which may stand anywhere among them, so that it gives nothing away."""
    length = len(excerpt.pieces)
    if pieces is None or length <= pieces:
        return excerpt
    start = int(rng.integers(max(0, place - pieces + 1), min(place, length - pieces), endpoint=True))
    kept = slice(start, start + pieces)
    return Excerpt(pieces=excerpt.pieces[kept], activations=excerpt.activations[kept])


def _fires(excerpt: Excerpt, threshold: float, share: float) -> Bool[np.ndarray, "N"]:
    return excerpt.strengths >= max(threshold, share * float(excerpt.strengths.max()))


def _plain(excerpt: Excerpt) -> str:
    return escape("".join(excerpt.pieces))


def _highlighted(excerpt: Excerpt, marked_N: Bool[np.ndarray, "N"]) -> str:
    marks = Excerpt(pieces=excerpt.pieces, activations=marked_N.astype(np.float32))
    return highlight(marks, 1.0, _DELIMITERS)


# ---- the judge ----

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"verdicts": {"type": "array", "items": {"type": "integer"}}},
    "required": ["verdicts"],
    "additionalProperties": False,
}
"""JSON schema of a reply."""

_TASK = (
    "You judge explanations of single neurons of a language model. A neuron gives every token of a text a "
    "number, its activation, and fires where that is high. You are given an explanation of what a neuron "
    "fires on, and numbered excerpts of texts."
)
_DETECTION = (
    "In some of the excerpts the neuron fires on at least one token, in the others on none; there may be any "
    "number of either. Give 1 for an excerpt in which, by the explanation, the neuron fires somewhere, and 0 "
    "for one in which it does not."
)
_FUZZING = (
    "Tokens stand between {{ and }} in each. In some of the excerpts these are the tokens on which the "
    "neuron fires, in the others they are tokens on which it does not fire; there may be any number of "
    "either. Give 1 for an excerpt in which, by the explanation, the neuron fires on the tokens between {{ "
    "and }}, and 0 for one in which it does not."
)
_ESCAPES = (
    "In the excerpts, \\n is a line break, \\t a tab, \\xe2 a byte of a broken character, and a backslash "
    "before any other character says that the character is part of the text."
)
_ANSWER = (
    'Answer with JSON alone, of the form {"verdicts": [1, 0, ...]}, with one number for every excerpt, in '
    "the same order."
)


def judging_messages(test: Test, explanation: str, questions: Sequence[Question]) -> list[Message]:
    """The messages that ask for verdicts on excerpts."""
    instructions = "\n\n".join((_TASK, _DETECTION if test == "detection" else _FUZZING, _ESCAPES, _ANSWER))
    lines = [f"Excerpt {number}: {question.text}" for number, question in enumerate(questions, 1)]
    asked = "\n".join((f"Explanation: {explanation}", "", *lines))
    return [Message(role="system", content=instructions), Message(role="user", content=asked)]


def parse_verdicts(text: str, count: int) -> list[bool]:
    """The verdicts in a reply on so many excerpts.

    Raises UnparsableError where the reply is not of the form asked for, or has another number of verdicts.
    """
    reply = parse_json(text)
    verdicts = reply.get("verdicts") if isinstance(reply, dict) else None
    if not isinstance(verdicts, list):
        raise UnparsableError('the reply has no list "verdicts"')
    for number, verdict in enumerate(verdicts, 1):
        if not isinstance(verdict, int) or verdict not in (0, 1):
            raise UnparsableError(f"verdict {number} is {str(verdict)[:20]!r}, which is neither 0 nor 1")
    if len(verdicts) != count:
        raise UnparsableError(f"there are {len(verdicts)} verdicts on {count} excerpts")
    return [bool(verdict) for verdict in verdicts]


def judge(
    model: LanguageModel, trials: Iterator[Trial], *, at_once: int = 5, seed: int = 0
) -> Iterator[tuple[Trial, list[bool | Failure]]]:
    """Trials with a verdict on each of their questions, or why there is none, as they are finished.

    The model sees `at_once` questions at a time. Raises JaxplainError where the model does.
    """
    asked = ((trial, _requests(trial, at_once, seed)) for trial in trials)
    for trial, replies in replies_by_item(model, asked):
        verdicts: list[bool | Failure] = []
        for reply, batch in zip(replies, _batches(trial, at_once), strict=True):
            count = len(batch)
            try:
                verdicts += answer_in(reply, lambda text, count=count: parse_verdicts(text, count))
            except UnparsableError as error:
                verdicts += [Failure(detail=str(error), reply=reply.text or None)] * count
        yield trial, verdicts


def _batches(trial: Trial, at_once: int) -> list[Sequence[Question]]:
    return [trial.questions[i : i + at_once] for i in range(0, len(trial.questions), at_once)]


def _requests(trial: Trial, at_once: int, seed: int) -> list[Request]:
    draw = (seed, *neuron_of(trial), int(trial.sign == "min"))
    return [
        Request(
            layer=trial.layer,
            expert=trial.expert,
            index=trial.index,
            sign=trial.sign,
            sample=number,
            messages=judging_messages(trial.test, trial.explanation, batch),
            seed=int(np.random.SeedSequence((*draw, number)).generate_state(1)[0] >> 1),
            schema=SCHEMA,
        )
        for number, batch in enumerate(_batches(trial, at_once))
    ]


# ---- scores ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedScore:
    """How well a judge's verdicts agree with the truth; chance is a balanced accuracy of 0.5.

    Attributes:
        balanced_accuracy: Mean of recall and true-negative rate.
        accuracy: Share of right verdicts.
        precision: Share of the yeses that are right.
        recall: Share of the true ones that got a yes (the true-positive rate).
        true_negative_rate: Share of the false ones that got a no.
        f1: Harmonic mean of precision and recall; 0 where no true one got a yes.
        answered: Questions with a verdict, which the scores are of.
        failed: Questions without.
        reasons: Why scores are NaN, by name.
    """

    balanced_accuracy: float
    accuracy: float
    precision: float
    recall: float
    true_negative_rate: float
    f1: float
    answered: int
    failed: int
    reasons: Mapping[str, str]


_SCORES = ("balanced_accuracy", "accuracy", "precision", "recall", "true_negative_rate", "f1")


def judged_score(questions: Sequence[Question], verdicts: Sequence[bool | Failure]) -> JudgedScore:
    """The score of verdicts on questions. Without both true and false questions answered, all are NaN."""
    answered = [
        (question.truth, verdict)
        for question, verdict in zip(questions, verdicts, strict=True)
        if not isinstance(verdict, Failure)
    ]
    counts = {"answered": len(answered), "failed": len(verdicts) - len(answered)}
    yes_right, no_wrong = answered.count((True, True)), answered.count((True, False))
    yes_wrong, no_right = answered.count((False, True)), answered.count((False, False))
    true, false, yes = yes_right + no_wrong, yes_wrong + no_right, yes_right + yes_wrong
    if not true or not false:
        missing = "yes" if not true else "no"
        reason = f"no question whose right answer is {missing} has a verdict"
        return JudgedScore(
            **dict.fromkeys(_SCORES, math.nan), **counts, reasons=dict.fromkeys(_SCORES, reason)
        )
    recall, true_negative_rate = yes_right / true, no_right / false
    return JudgedScore(
        balanced_accuracy=(recall + true_negative_rate) / 2,
        accuracy=(yes_right + no_right) / len(answered),
        precision=yes_right / yes if yes else math.nan,
        recall=recall,
        true_negative_rate=true_negative_rate,
        f1=2 * yes_right / (true + yes),
        **counts,
        reasons={} if yes else {"precision": "no verdict is a yes"},
    )
