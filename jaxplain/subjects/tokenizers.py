"""Whether two tokenizers are the same, and tokens added to one."""

import copy
import json
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxplain.errors import JaxplainError

_BRACKETS = {"<": ">", "[": "]", "{": "}", "(": ")"}
_NUMBERED = {"merges": "merge", "vocab": "piece"}  # a vocabulary that is a list says scores, too


def require_same_tokenizer(
    mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, what: str
) -> None:
    """Require that `mine` gives the same ids as `other`, the subject's, but for tokens added after its last.

    Raises JaxplainError with the first difference in tokens, merges or the rules around them; `what` is what
    the message calls the owner of `mine`.
    """

    def differ(where: str, found: str, expected: str) -> JaxplainError:
        return JaxplainError(
            f"{what} needs the subject's own tokenizer, but {where} is {found} where the subject has "
            f"{expected}; choose a model that shares the subject's tokenizer."
        )

    tokens, expected_tokens = (
        {number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (mine, other)
    )
    last, added = max(expected_tokens), mine.added_tokens_decoder
    for number in sorted(tokens.keys() | expected_tokens.keys()):
        found, expected = tokens.get(number), expected_tokens.get(number)
        if found != expected and not (number > last and number in added):
            raise differ(f"token {number}", _shown(found), _shown(expected))
    definition, expected_definition = _definition(mine), _definition(other)
    for part, entry in _NUMBERED.items():
        rows, expected_rows = _rows(definition, part), _rows(expected_definition, part)
        for number, (found, expected) in enumerate(zip_longest(rows, expected_rows)):
            if found != expected:
                raise differ(f"{entry} {number}", _shown(found), _shown(expected))
    for part in ("normalizer", "pre_tokenizer", "model"):
        found, expected = json.dumps(definition[part]), json.dumps(expected_definition[part])
        if found != expected:
            raise differ(f"the {part}", found, expected)


def _definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        json.loads(backend.to_str()) if backend else {"normalizer": None, "pre_tokenizer": None, "model": {}}
    )


def _rows(definition: dict[str, Any], part: str) -> list[Any]:
    """Take a list out of the model; a vocabulary may be none, and was compared by its ids."""
    rows = definition["model"].pop(part, None)
    return rows if isinstance(rows, list) else []


def _shown(entry: str | list[Any] | None) -> str:
    if entry is None:
        return "nothing"
    return " ".join(map(repr, entry)) if isinstance(entry, list) else repr(entry)


def remapped_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A new name for every special token, for an added token that may stand for it within a text.

    `<|im_start|>` becomes `<||im_start||>`, and `<s>` becomes `<|s|>`, with more bars where that is a token
    already. A token that only pads is left out, since no text holds it.
    """
    named = tokenizer.special_tokens_map
    only_pads = {named.get("pad_token")} - {token for role, token in named.items() if role != "pad_token"}
    taken = set(tokenizer.get_vocab())
    names: dict[str, str] = {}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and token.content not in only_pads:
            name = _barred(token.content)
            while name in taken:
                name = _barred(name)
            taken.add(name)
            names[token.content] = name
    return names


def with_added_tokens(tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with further special tokens, whose ids follow the last one in use.

    Raises JaxplainError where a name is a token already.
    """
    names = list(names)
    vocabulary = tokenizer.get_vocab()
    first = max(vocabulary.values()) + 1
    for number, name in enumerate(names, start=first):
        if name in vocabulary:
            raise JaxplainError(
                f"the token {name!r} cannot be added, since the tokenizer has it already (its id is "
                f"{vocabulary[name]}); choose another name."
            )
        vocabulary[name] = number
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(names, special_tokens=True)
    if grown.convert_tokens_to_ids(names) != [vocabulary[name] for name in names]:
        raise JaxplainError(
            f"the tokens {', '.join(names)} cannot be added with ids from {first} on, since the tokenizer's "
            "ids have gaps, or a name is empty; use another tokenizer or other names."
        )
    return grown


def _barred(token: str) -> str:
    """The token with a bar inside each of its brackets, or in brackets and bars where it has none."""
    if len(token) > 1 and _BRACKETS.get(token[0]) == token[-1]:
        return f"{token[0]}|{token[1:-1]}|{token[-1]}"
    return f"<|{token}|>"
