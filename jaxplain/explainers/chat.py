"""Chats as token ids, by a model's own chat template."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jaxplain.errors import JaxplainError
from jaxplain.explainers.prompts import Message

_SLOT = "\ue000{}\ue001"  # stands for a message's content while the chat template is filled in


class ChatTokenizer:
    """A model's tokenizer and chat template; one without a template goes on from the messages as plain text.

    `escape` says what in messages is replaced by what; a replacement among `added_tokens` becomes that token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        escape: Mapping[str, str] | None = None,
        added_tokens: Sequence[str] = (),
    ):
        self._tokenizer, self._name = tokenizer, name
        self._escape, self._added_tokens = dict(escape or {}), added_tokens

    def tokens(self, messages: Sequence[Message], *, reply_start: str = "") -> list[int]:
        """A chat as token ids, up to and with what the reply begins with.

        Special tokens come from the chat template alone: what looks like one in a message is text.
        """
        contents = [message.content for message in messages]
        slots = [_SLOT.format(number) for number in range(len(messages))]
        template = self._filled_template(messages, slots)
        tokens: list[int] = []
        for slot, content in zip(slots, contents, strict=True):
            before, found, template = template.partition(slot)
            if not found:
                raise JaxplainError(f"the chat template of {self._name} leaves messages out.")
            tokens += self._plain(before) + self.text(content)
        return tokens + self._plain(template) + (self.text(reply_start) if reply_start else [])

    def _filled_template(self, messages: Sequence[Message], slots: Sequence[str]) -> str:
        chat = [{"role": m.role, "content": slot} for m, slot in zip(messages, slots, strict=True)]
        if self._tokenizer.chat_template is None:
            return "\n\n".join((f"{self._tokenizer.bos_token or ''}{slots[0]}", *slots[1:], ""))
        try:
            filled = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            # Some templates know no system role.
            system, first, *rest = chat
            merged = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            filled = self._tokenizer.apply_chat_template(
                [merged, *rest], tokenize=False, add_generation_prompt=True
            )
        assert isinstance(filled, str)
        return filled

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def text(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a special token but what `escape` brings in."""
        pieces: list[str | int] = [text]
        for original, replacement in self._escape.items():
            number = self._tokenizer.convert_tokens_to_ids(replacement)
            insert = number if isinstance(number, int) and replacement in self._added_tokens else None
            pieces = [
                part
                for piece in pieces
                for part in (
                    _split(piece, original, replacement if insert is None else insert)
                    if isinstance(piece, str)
                    else [piece]
                )
            ]
        tokens: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            elif piece:
                tokens += self._tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return tokens

    def unescaped(self, text: str) -> str:
        """A reply with what `escape` replaces put back."""
        for original, replacement in reversed(self._escape.items()):
            text = text.replace(replacement, original)
        return text


def _split(text: str, original: str, replacement: str | int) -> list[str | int]:
    parts = text.split(original)
    joined: list[str | int] = []
    for number, part in enumerate(parts):
        joined += [replacement, part] if number else [part]
    return joined
