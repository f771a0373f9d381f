"""Every prompt style's exact text, few-shot placement included, against tests/explainers/golden.

python -m tests.explainers.test_prompts      rewrites the golden files; read the difference before you commit
"""

from pathlib import Path

import numpy as np
import pytest

from jaxplain.configs.explanation import PromptConfig
from jaxplain.explainers.excerpts import Excerpt
from jaxplain.explainers.prompts import Shown, SolvedExample, prompt

GOLDEN = Path(__file__).parent / "golden"


def excerpt(*pieces_and_activations):
    pieces, activations = pieces_and_activations[::2], pieces_and_activations[1::2]
    return Excerpt(pieces=pieces, activations=np.array(activations, np.float32))


# Whatever a corpus may hold: delimiters (one of them cut in two), backslashes, control characters,
# special tokens, marks of the other styles, and words that a prompt itself is made of.
HOSTILE = Shown(
    excerpts=[
        excerpt("<|im_end|>", 0, " {", 3, "{", 8, "bank", 10, "}}", 2, "\t", 0, "of\n", 9, "\\n", -4),
        excerpt("Explanation:", -9, "\n", -8, ' "quoted"', 5, " \u202eleft", np.nan, " \U0001f642", 9.99),
        excerpt("<end>", 0, "\x00", 7, "\udce2\udc82", 0.4, "]]", -10, "[[", 0, "\r\n", 0, "Excerpt 9:", 8),
    ],
    threshold=7.0,
    negative_threshold=8.0,
    counterexamples=[excerpt("{{quiet}}", 0, "\n\n", 2), excerpt(" I'm \\silent", -3, " ¿\x85?", 0)],
    tokens=[(' "', 8.0), ("\\n\n", 6.0), (" bank", 5.9), ("\udcff", 0.79), ("<|im_end|>", 0.1)],
    scale=10.0,
)
# Few tokens fire, so that they are listed once more.
SPARSE = Shown(
    excerpts=[
        excerpt("The", 0, " river", 0, " bank", 4.2, " was", 0, " steep", 0, ".\n", np.nan),
        excerpt("No", 0, " trees", -1, " there", 0),
    ],
    scale=4.2,
)
EXAMPLES = [
    SolvedExample(
        shown=Shown(
            excerpts=[excerpt("an", 0, " oak", 9, " of iron", -9, " {old}", 0)],
            threshold=5.0,
            negative_threshold=5.0,
            counterexamples=[excerpt("no", 0, " leaf", 2)],
            tokens=[(" oak", 9.0), ("pine", 8.5)],
        ),
        explanation="names of trees",
        reasoning="The mark is on a tree.",
        negative_explanation="names of metals",
        negative_reasoning="The other is on a metal.",
    ),
    SolvedExample(
        shown=Shown(
            excerpts=[excerpt("At", 0, " 9:30", 10), excerpt("at", 0, " 3.5", -8)],
            threshold=5.0,
            negative_threshold=5.0,
            counterexamples=[excerpt("9", 0, " hours", 1)],
            tokens=[(":", 10.0)],
        ),
        explanation="clock times",
        reasoning="The marked token is a time.",
        negative_explanation="decimal numbers",
        negative_reasoning="The other has a point.",
    ),
]

CASES = {
    "token_activation_pairs": (HOSTILE, PromptConfig(style="token_activation_pairs")),
    "token_activation_pairs_sparse": (SPARSE, PromptConfig(style="token_activation_pairs", few_shot="none")),
    "highlighted": (HOSTILE, PromptConfig()),
    "highlighted_system": (HOSTILE, PromptConfig(few_shot="system")),
    "highlighted_none": (HOSTILE, PromptConfig(few_shot="none")),
    "highlighted_reasoning": (HOSTILE, PromptConfig(chain_of_thought=True)),
    "highlighted_other_delimiters": (
        HOSTILE,
        PromptConfig(delimiters=["<", ">"], few_shot="none"),
    ),
    "highlighted_both_signs": (HOSTILE, PromptConfig(style="highlighted_both_signs")),
    "highlighted_both_signs_reasoning": (
        HOSTILE,
        PromptConfig(style="highlighted_both_signs", chain_of_thought=True, few_shot="system"),
    ),
    "contrastive": (HOSTILE, PromptConfig(style="contrastive")),
    "contrastive_reasoning": (
        HOSTILE,
        PromptConfig(style="contrastive", chain_of_thought=True, few_shot="none"),
    ),
    "token_list": (HOSTILE, PromptConfig(style="token_list")),
    "token_list_system": (HOSTILE, PromptConfig(style="token_list", few_shot="system")),
    "activation_values": (HOSTILE, PromptConfig(style="activation_values")),
}


def written(name):
    """A case's messages as the golden file holds them."""
    shown, config = CASES[name]
    examples = [] if config.few_shot == "none" else EXAMPLES
    messages = prompt(shown, config, examples)
    return "".join(f"======== {message.role} ========\n{message.content}\n" for message in messages)


@pytest.mark.parametrize("name", CASES)
def test_prompt_is_word_for_word_the_golden_one(name):
    assert written(name).encode() == (GOLDEN / f"{name}.txt").read_bytes()


def test_there_is_no_golden_file_too_many():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def main():
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_bytes(written(name).encode())


if __name__ == "__main__":
    main()
