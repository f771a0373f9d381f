"""The prompt styles: each a pure function from what is shown of a neuron to chat messages.

`token_activation_pairs` follows Bills et al. (2023), the highlighted ones Choi et al. (2024); the
wording is our own. Solved examples are shown in the same form as the neuron itself.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxplain.configs.explanation import PromptConfig, Style
from jaxplain.explainers.excerpts import Excerpt, escape

EXPLANATION = "Explanation:"
POSITIVE, NEGATIVE = "Positive explanation:", "Negative explanation:"

_SPARSE = 0.2  # Bills et al. repeat the non-zero tokens where fewer than this share are non-zero
_LEVELS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What a prompt shows of a neuron; each style uses what it needs.

    Attributes:
        excerpts: Texts that drive the neuron in the explained direction.
        threshold: Activations from here on are highlighted.
        negative_threshold: The same for the opposite direction.
        counterexamples: Texts on which the neuron is silent.
        tokens: Vocabulary tokens with the highest mean activation, and that mean.
        scale: The activation that counts as 10.
    """

    excerpts: Sequence[Excerpt] = ()
    threshold: float = 1.0
    negative_threshold: float = 1.0
    counterexamples: Sequence[Excerpt] = ()
    tokens: Sequence[tuple[str, float]] = ()
    scale: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvedExample:
    """A few-shot example: what is shown, and the reply that would be right."""

    shown: Shown
    explanation: str
    reasoning: str
    negative_explanation: str = ""
    negative_reasoning: str = ""


def prompt(shown: Shown, config: PromptConfig, examples: Sequence[SolvedExample]) -> list[Message]:
    """The messages that ask for an explanation, solved examples included."""
    instructions, body = _instructions(config), _BODIES[config.style]
    solved = [(body(example.shown, config), _reply(example, config)) for example in examples]
    turns: list[Message] = []
    if config.few_shot == "system":
        for number, (question, answer) in enumerate(solved, 1):
            instructions += f"\n\n# Example {number}\n\n{question}\n\n{answer}"
    elif config.few_shot == "turns":
        for question, answer in solved:
            turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    system = Message(role="system", content=instructions)
    return [system, *turns, Message(role="user", content=body(shown, config))]


def _reply(example: SolvedExample, config: PromptConfig) -> str:
    """The reply that a style asks for."""
    both = config.style == "highlighted_both_signs"
    lines = []
    if config.chain_of_thought:
        lines.append(f"Reasoning: {example.reasoning}" + (f" {example.negative_reasoning}" if both else ""))
    if both:
        lines += [f"{POSITIVE} {example.explanation}", f"{NEGATIVE} {example.negative_explanation}"]
    else:
        lines.append(f"{EXPLANATION} {example.explanation}")
    return "\n".join(lines)


_TASK = (
    "You study single neurons of a language model. A neuron gives every token of a text a number, its "
    "activation. You find out what the tokens on which a neuron fires have in common, and say it in one "
    "short phrase."
)
_BREVITY = (
    "Be specific and brief, name the pattern instead of listing examples, and leave out hedges and remarks."
)
_GUIDANCE = (
    "Look for the one pattern that accounts for most of the evidence: what the tokens are or mean, the words "
    f"before them, what comes after them, or the subject of the text. {_BREVITY}"
)
_TOKEN_GUIDANCE = (
    "Look for the one pattern that accounts for most of the tokens: what they are or mean, how they are "
    f"spelled, or the subject that they belong to. {_BREVITY}"
)
_ANSWER = f'Write one line that begins with "{EXPLANATION}".'
_ANSWER_AFTER_REASONING = (
    'First write a line that begins with "Reasoning:" in which you go through the marked tokens and their '
    f"surroundings. {_ANSWER.replace('Write', 'Then write')}"
)
_ESCAPES = (
    "In the text, \\n is a line break, \\t a tab, \\xe2 a byte of a broken character, and a backslash before "
    "any other character says that the character is text and no mark."
)


_TOKENS_GIVEN = (
    "You are given the tokens of the vocabulary on which the neuron fires most strongly on average, "
)


def _instructions(config: PromptConfig) -> str:
    """The system prompt: the task, what is given, what to look for, and the form of the answer."""
    (left, right), (negative_left, negative_right) = config.delimiters, config.negative_delimiters
    guidance, answer = _GUIDANCE, _ANSWER_AFTER_REASONING if config.chain_of_thought else _ANSWER
    match config.style:
        case "highlighted":
            given = (
                "You are given excerpts in which the neuron fires. The tokens on which it fires most "
                f"strongly stand between {left} and {right}."
            )
        case "contrastive":
            given = (
                "You are given excerpts in which the neuron fires, with the tokens on which it fires most "
                f"strongly between {left} and {right}, and then excerpts in which it stays silent. A good "
                "explanation holds for the first and not for the second."
            )
        case "highlighted_both_signs":
            given = (
                "This neuron's activation can be positive or negative. You are given excerpts in which the "
                f"tokens with the highest activations stand between {left} and {right}, and those with the "
                f"most negative ones between {negative_left} and {negative_right}. Explain the two kinds "
                "separately."
            )
            guidance = guidance.replace("Look", "For each kind, look")
            first = (
                'First write a line that begins with "Reasoning:" in which you go through the marked tokens '
                "of both kinds and their surroundings. Then write "
            )
            answer = (
                f"{first if config.chain_of_thought else 'Write '}one line that begins with "
                f'"{POSITIVE}" and one that begins with "{NEGATIVE}".'
            )
        case "token_activation_pairs":
            given = (
                "You are given excerpts with one token on each line, followed by a tab and the neuron's "
                f"activation there, from 0 (silent) to {_LEVELS} (strongest)."
            )
        case "token_list":
            given = f"{_TOKENS_GIVEN}strongest first. Many are parts of words, and a few may be chance."
            guidance = _TOKEN_GUIDANCE
        case "activation_values":
            given = (
                f"{_TOKENS_GIVEN}one on each line, followed by a tab and the average, from 0 to {_LEVELS}. "
                "Many are parts of words, and a few may be chance."
            )
            guidance = _TOKEN_GUIDANCE
    return "\n\n".join((_TASK, f"{given} {_ESCAPES}", guidance, answer))


def highlight(excerpt: Excerpt, threshold: float, delimiters: Sequence[str], escaped: str = "") -> str:
    """An excerpt on one line, its pieces from `threshold` on between delimiters, neighbours in one pair."""
    return _mark(excerpt, [excerpt.strengths >= threshold], [delimiters], escaped or "".join(delimiters))


def _mark(
    excerpt: Excerpt, marked: Sequence[np.ndarray], delimiters: Sequence[Sequence[str]], escaped: str
) -> str:
    kinds = [next((k for k, m in enumerate(marked) if m[i]), -1) for i in range(len(excerpt.pieces))]
    parts, before = [], -1
    for piece, kind in zip((*excerpt.pieces, ""), (*kinds, -1), strict=True):
        if kind != before:
            parts += delimiters[before][1] if before >= 0 else ""
            parts += delimiters[kind][0] if kind >= 0 else ""
        parts.append(escape(piece, escaped))
        before = kind
    return "".join(parts)


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"Excerpt {number}: {line}" for number, line in enumerate(lines, 1))


def _highlighted(shown: Shown, config: PromptConfig) -> str:
    return _numbered([highlight(e, shown.threshold, config.delimiters) for e in shown.excerpts])


def _contrastive(shown: Shown, config: PromptConfig) -> str:
    silent = [highlight(e, math.inf, config.delimiters) for e in shown.counterexamples]
    return f"The neuron fires:\n{_highlighted(shown, config)}\n\nIt stays silent:\n{_numbered(silent)}"


def _both_signs(shown: Shown, config: PromptConfig) -> str:
    delimiters = [config.delimiters, config.negative_delimiters]
    escaped = "".join((*config.delimiters, *config.negative_delimiters))
    lines = [
        _mark(
            e,
            [e.strengths >= shown.threshold, e.opposite().strengths >= shown.negative_threshold],
            delimiters,
            escaped,
        )
        for e in shown.excerpts
    ]
    return _numbered(lines)


def _levels(values: np.ndarray, scale: float) -> list[int]:
    """Activations from 0 to 10, the scale's own being 10."""
    return np.clip(np.floor(_LEVELS * values / scale + 1e-6), 0, _LEVELS).astype(int).tolist()


def _pairs(shown: Shown, config: PromptConfig) -> str:
    levels = [_levels(e.strengths, shown.scale) for e in shown.excerpts]
    blocks = []
    for number, (e, values) in enumerate(zip(shown.excerpts, levels, strict=True), 1):
        lines = [f"{escape(piece)}\t{value}" for piece, value in zip(e.pieces, values, strict=True)]
        blocks.append("\n".join((f"Excerpt {number}:", "<start>", *lines, "<end>")))
    flat = [value for values in levels for value in values]
    if sum(value > 0 for value in flat) < _SPARSE * len(flat):
        blocks.append("The same excerpts without the tokens of activation 0:")
        for number, (e, values) in enumerate(zip(shown.excerpts, levels, strict=True), 1):
            pairs = zip(e.pieces, values, strict=True)
            lines = [f"{escape(piece)}\t{value}" for piece, value in pairs if value > 0]
            blocks.append("\n".join((f"Excerpt {number}:", "<start>", *lines, "<end>")))
    return "\n\n".join(blocks)


def _token_list(shown: Shown, config: PromptConfig) -> str:
    return "Tokens: " + ", ".join(f'"{_quoted(name)}"' for name, _ in shown.tokens)


def _activation_values(shown: Shown, config: PromptConfig) -> str:
    levels = _levels(np.array([mean for _, mean in shown.tokens]), shown.scale)
    return "\n".join(
        f'"{_quoted(name)}"\t{level}' for (name, _), level in zip(shown.tokens, levels, strict=True)
    )


def _quoted(name: str) -> str:
    return escape(name, '"')


_BODIES: dict[Style, Callable[[Shown, PromptConfig], str]] = {
    "token_activation_pairs": _pairs,
    "highlighted": _highlighted,
    "highlighted_both_signs": _both_signs,
    "contrastive": _contrastive,
    "token_list": _token_list,
    "activation_values": _activation_values,
}
