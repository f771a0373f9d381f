"""A causal language model run here, on the mesh, by jaxplain's own decoder: no server and no account."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxplain.configs.explanation import LocalModelConfig, SamplingConfig
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.chat import ChatTokenizer
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.replies import Reply, Request
from jaxplain.mesh import make_mesh
from jaxplain.subjects.generation import Generator, Sampling
from jaxplain.subjects.subject import Subject, open_subject

_BATCHES_AT_ONCE = 8  # read together, so that prompts of like length share a batch


class LocalModel:
    """A chat model, or a base model without a chat template; `chat` has its tokenizer and template.

    It is not held to a request's schema; `reply_start` can set it on the way, as with `{"verdicts": [`.
    """

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
        self.chat = ChatTokenizer(
            self._tokenizer, model, escape=config.escape, added_tokens=config.added_tokens
        )
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
            prompts = [self.chat.tokens(request.messages, reply_start=start) for request in chunk]
            seeds = [request.seed for request in chunk]
            for number, completion in self._generator.generate(prompts, sampling, seeds):
                text = self._tokenizer.decode(completion.tokens)
                assert isinstance(text, str)
                yield (
                    chunk[number],
                    Reply(
                        outcome="answered",
                        text=start + self.chat.unescaped(text),
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
        prompts = [self.chat.tokens(one) for one in messages]
        texts = [self.chat.text(reply) for reply in replies]
        lengths = np.array([len(text) for text in texts], np.float32)
        return self._generator.log_likelihoods(prompts, texts) / lengths


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
