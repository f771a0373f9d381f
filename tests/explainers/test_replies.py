"""The explanation in a reply, in whatever shape models put it."""

import pytest

from jaxplain.configs.explanation import PromptConfig
from jaxplain.explainers.replies import Reply, UnparsableError, parse_reply, status_of

PLAIN = PromptConfig()
REASONING = PromptConfig(chain_of_thought=True)
BOTH = PromptConfig(style="highlighted_both_signs")
STYLES = [PLAIN, REASONING] + [
    PromptConfig(style=style)
    for style in ("token_activation_pairs", "contrastive", "token_list", "activation_values")
]


@pytest.mark.parametrize("prompt", STYLES, ids=lambda prompt: f"{prompt.style}-{prompt.chain_of_thought}")
@pytest.mark.parametrize(
    "text",
    [
        "Explanation: names of trees",
        "explanation:names of trees\n",
        "EXPLANATION :  names of trees",
        "**Explanation:** names of trees",
        "**Explanation**: names of trees",
        "**Explanation: names of trees**",
        "__Explanation:__ names of trees",
        "Explanation:\n\n  names of trees\n\nLet me know if you need more.",
        "Explanation: **names of trees**",
        'Explanation: "names of trees"',
        "Explanation: \u201cnames of trees\u201d",
        "Explanation: *'names of trees'*",
        "Explanation: `names of trees`",
        "Explanation: _names of trees_",
        "Reasoning: oak and birch\nExplanation: names of trees",
        "Reasoning: one Explanation: could be wood.\nExplanation: wood\nBetter:\nExplanation: names of trees",
        "Sure! Here it is. Explanation: names of trees",
        "Explanation: names of trees\r\nThat is all.",
        "## Explanation:\nnames of trees",
        "```\nExplanation: names of trees\n```",
        "Explanation:\n```\nnames of trees\n```",
    ],
)
def test_after_a_label(text, prompt):
    assert parse_reply(text, prompt) == {"max": "names of trees"}


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ('the word "bank"', 'the word "bank"'),
        ('"bank" and "shore"', '"bank" and "shore"'),
        ("names such as __init__", "names such as __init__"),
        ("the boys' names", "the boys' names"),
        ("`if` and `else`", "`if` and `else`"),
        ("\"the word 'bank'\"", "the word 'bank'"),
        ("a: b", "a: b"),
        ("42", "42"),
        ("木の名前", "木の名前"),
    ],
)
def test_only_quotes_around_the_whole_are_dropped(text, explanation):
    for start in ("Explanation: ", ""):
        assert parse_reply(start + text, PLAIN) == {"max": explanation}


@pytest.mark.parametrize(
    "text",
    ["names of trees", '\n\n "names of trees"\nbecause oaks', "**names of trees**", "---\nnames of trees"],
)
def test_a_bare_phrase_will_do_unless_reasoning_was_asked_for(text):
    assert parse_reply(text, PLAIN) == {"max": "names of trees"}
    with pytest.raises(UnparsableError, match='no line begins with "Explanation:"'):
        parse_reply(text, REASONING)


@pytest.mark.parametrize("text", ["", " \n\t\n", "Explanation:", "Explanation: **", 'Explanation: ""\n\n...'])
@pytest.mark.parametrize("prompt", [PLAIN, REASONING])
def test_nothing_in_it(text, prompt):
    with pytest.raises(UnparsableError, match=r"is empty|no line begins"):
        parse_reply(text, prompt)


@pytest.mark.parametrize(
    "text",
    [
        "Positive explanation: trees\nNegative explanation: metals",
        "Negative explanation: metals\n\nPositive explanation: trees",
        "**positive Explanation:** trees\n**NEGATIVE explanation**: *metals*",
        "Positive explanation: trees Negative explanation: metals",
        "Positive explanation:\ntrees\nNegative explanation:\nmetals",
        "Explanation: both\nPositive explanation: oaks\nPositive explanation: trees\n"
        'Negative explanation: "metals"\nI hope this helps.',
    ],
)
def test_both_signs(text):
    assert parse_reply(text, BOTH) == {"max": "trees", "min": "metals"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Positive explanation: trees", 'no line begins with "Negative explanation:"'),
        ("Negative explanation: metals", 'no line begins with "Positive explanation:"'),
        ("Explanation: trees", 'no line begins with "Positive explanation:"'),
        ("trees", 'no line begins with "Positive explanation:"'),
        ("", 'no line begins with "Positive explanation:"'),
        ("Positive explanation:\nNegative explanation: metals", "the explanation is empty"),
        ("Positive explanation: trees\nNegative explanation: -", "the explanation is empty"),
    ],
)
def test_both_signs_with_one_missing(text, message):
    with pytest.raises(UnparsableError, match=message):
        parse_reply(text, BOTH)


def test_a_label_of_another_style_is_no_bare_phrase():
    with pytest.raises(UnparsableError, match='no line begins with "Explanation:"'):
        parse_reply("Positive explanation: trees\nNegative explanation: metals", PLAIN)


@pytest.mark.parametrize(
    ("outcome", "status"), [("answered", "unparsable"), ("refused", "refused"), ("failed", "failed")]
)
def test_what_a_reply_without_an_explanation_counts_as(outcome, status):
    assert status_of(Reply(outcome=outcome)) == status
