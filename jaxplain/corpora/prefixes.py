"""What stands before the text of a window: a BOS token, or the way to a user's first message."""

import jinja2
from transformers import PreTrainedTokenizerBase

from jaxplain.errors import JaxplainError, first_line

_MESSAGE = "placeholder-of-the-message"
_DATE = "26 Jul 2024"


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, as a list, for a tokenizer that begins every text with one; else empty."""
    tokens = tokenizer("a")["input_ids"]
    begins = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    return [tokens[0]] if begins else []


def chat_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template puts before a user's first message, its system prompt included.

    They begin with BOS if the tokenizer begins texts with it. Templates that tell the date, as Llama 3's do,
    are given the one that Llama 3.1's has of itself, so that a run does not depend on its day.

    Raises JaxplainError where there is no template, or it puts nothing there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise JaxplainError(
            "corpus.chat_prefix is true, but the subject's tokenizer has no chat template; "
            "use a chat model as the subject, or set it to false."
        )
    message = [{"role": "user", "content": _MESSAGE}]
    try:
        text = str(tokenizer.apply_chat_template(message, tokenize=False, date_string=_DATE))
    except jinja2.TemplateError as error:
        raise JaxplainError(
            f"corpus.chat_prefix is true, but the subject's chat template fails: {first_line(error)}; "
            "set it to false."
        ) from error
    before, found, _ = text.partition(_MESSAGE)
    if not found or not before:
        raise JaxplainError(
            "corpus.chat_prefix is true, but the subject's chat template puts nothing before a user's "
            "message; set it to false."
        )
    tokens = [int(token) for token in tokenizer(before, add_special_tokens=False)["input_ids"]]
    bos = bos_prefix(tokenizer)
    return tokens if tokens[:1] == bos else bos + tokens
