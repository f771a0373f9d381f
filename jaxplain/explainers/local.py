"""A causal language model run here, on the mesh, by jaxplain's own decoder: no server and no account."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import TemplateError

from jaxplain.configs.explanation import LocalModelConfig, SamplingConfig
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.replies import Reply, Request
from jaxplain.mesh import make_mesh
from jaxplain.subjects.generation import Generator, Sampling
from jaxplain.subjects.subject import Subject, open_subject

_BATCHES_AT_ONCE = 8  # read together, so that prompts of like length share a batch
_SLOT = "\ue000{}\ue001"  # stands for a message's content while the chat template is filled in


class LocalModel:
    """A chat model. A base model without a chat template goes on from the messages as plain text."""

    def __init__(self, model: str, config: LocalModelConfig, sampling: SamplingConfig):
        self._config, self._sampling = config, sampling
        subject = open_subject(
            SubjectConfig(id=model, revision=config.revision, dtype=config.dtype), field="explainer.model"
        )
        self._tokenizer = subject.tokenizer
        self._tokenizer.add_tokens(config.added_tokens, special_tokens=True)
        if len(self._tokenizer) > subject.arch.vocabulary:
            raise JaxplainError(
                f"explainer.local.added_tokens makes {len(self._tokenizer)} tokens, but {model} has "
                f"embeddings of {subject.arch.vocabulary}; leave out what the model was not finetuned with."
            )
        mesh = make_mesh(config.mesh, batch_size=config.batch_size, mlp_width=subject.arch.neurons)
        self._name = model
        self._stop = _stop_tokens(subject, config)
        self._generator = Generator(subject.load(mesh, with_head=True), mesh, batch_size=config.batch_size)

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Reply]]:
        """Requests with their replies, a batch at a time."""
        sampling = Sampling(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_tokens,
            stop=self._stop,
        )
        start = self._config.reply_start
        while chunk := list(itertools.islice(requests, self._config.batch_size * _BATCHES_AT_ONCE)):
            prompts = [self.tokens(request.messages) for request in chunk]
            seeds = [request.seed for request in chunk]
            for number, completion in self._generator.generate(prompts, sampling, seeds):
                text = self._tokenizer.decode(completion.tokens)
                assert isinstance(text, str)
                yield (
                    chunk[number],
                    Reply(
                        outcome="answered",
                        text=start + self._unescaped(text),
                        detail=None
                        if completion.finished
                        else "the reply was cut short by sampling.max_tokens",
                        model=self._name,
                        input_tokens=len(prompts[number]),
                        output_tokens=len(completion.tokens),
                    ),
                )

    def log_likelihoods(
        self, messages: Sequence[Sequence[Message]], replies: Sequence[str]
    ) -> Float[np.ndarray, "N"]:
        """Mean natural log-probability per token of each reply after its messages."""
        prompts = [self.tokens(one, with_start=False) for one in messages]
        texts = [self._content(reply) for reply in replies]
        lengths = np.array([len(text) for text in texts], np.float32)
        return self._generator.log_likelihoods(prompts, texts) / lengths

    def tokens(self, messages: Sequence[Message], *, with_start: bool = True) -> list[int]:
        """A chat as token ids, up to where the reply begins.

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
            tokens += self._plain(before) + self._content(content)
        start = self._config.reply_start if with_start else ""
        return tokens + self._plain(template) + (self._content(start) if start else [])

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

    def _content(self, text: str) -> list[int]:
        """Text in which nothing is a special token but what the config's replacements bring in."""
        pieces: list[str | int] = [text]
        for original, replacement in self._config.escape.items():
            number = self._tokenizer.convert_tokens_to_ids(replacement)
            insert = number if isinstance(number, int) and replacement in self._config.added_tokens else None
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

    def _unescaped(self, text: str) -> str:
        for original, replacement in reversed(self._config.escape.items()):
            text = text.replace(replacement, original)
        return text


def _split(text: str, original: str, replacement: str | int) -> list[str | int]:
    parts = text.split(original)
    joined: list[str | int] = []
    for number, part in enumerate(parts):
        joined += [replacement, part] if number else [part]
    return joined


def _stop_tokens(subject: Subject, config: LocalModelConfig) -> tuple[int, ...]:
    """What ends a turn, by the model's own files and the config."""
    tokens: list[Any] = [subject.tokenizer.eos_token_id]
    settings = subject.folder / "generation_config.json"
    if settings.exists():
        named = json.loads(settings.read_text()).get("eos_token_id")
        tokens += named if isinstance(named, list) else [named]
    for text in config.stop:
        found = subject.tokenizer.convert_tokens_to_ids(text)
        if not isinstance(found, int) or found == subject.tokenizer.unk_token_id:
            raise JaxplainError(f"explainer.local.stop names {text!r}, which is no token of {subject.id}.")
        tokens.append(found)
    return tuple(sorted({token for token in tokens if isinstance(token, int)}))
