"""The loop of an explaining run: neurons become requests, replies become samples in the database."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxplain.configs.explanation import ExplainConfig, ExplainerConfig
from jaxplain.explainers.evidence import gather, solved_examples, token_names
from jaxplain.explainers.excerpts import escape
from jaxplain.explainers.prompts import prompt
from jaxplain.explainers.replies import (
    LanguageModel,
    Reply,
    Request,
    UnparsableError,
    parse_reply,
    status_of,
)
from jaxplain.explainers.token_means import describe_tokens, token_means
from jaxplain.store.explanations import ExplanationDatabase, Sample
from jaxplain.store.neuron_id import NeuronId, neuron_of
from jaxplain.store.reader import Neuron, Split

_NOT_IN_RECIPE = ("concurrency", "timeout_seconds", "retries", "cache", "prices", "budget", "key_variable")
_NOT_IN_RECIPE += ("mode", "batch_requests")
_SILENT = "no exemplar drives the neuron in this direction"


Watcher = Callable[[Sequence[Sample], Sequence[Reply]], None]
"""Told of every neuron that is finished: its samples, and the replies that they came from."""


def recipe_of(config: ExplainConfig) -> dict[str, Any]:
    """What decides the explanations of a neuron; runs that share it share their work."""
    whole = dataclasses.asdict(config)
    explainer = {k: v for k, v in whole["explainer"].items() if k not in _NOT_IN_RECIPE}
    explainer["local"] = {k: v for k, v in explainer["local"].items() if k not in ("batch_size", "mesh")}
    signs = sorted(whole["signs"])
    kept = ("split", "prompt", "sampling")
    return {name: whole[name] for name in kept} | {"explainer": explainer, "signs": signs}


def explain_neurons(
    config: ExplainConfig,
    split: Split,
    neurons: Sequence[NeuronId],
    model: LanguageModel | None,
    database: ExplanationDatabase,
    recipe: int,
    watch: Watcher,
) -> Counter[str]:
    """Explain what is not yet explained, and say how many samples had which outcome.

    Each neuron is written as a whole when its last reply is in. `model` is None for token tables.

    Raises JaxplainError where the model stops; what is finished by then is kept.
    """
    outcomes: Counter[str] = Counter()
    if model is None:
        for neuron in neurons:
            if database.claim(recipe, neuron):
                samples = list(_token_table_samples(split.neuron_called(neuron), config))
                database.finish(recipe, neuron, samples)
                outcomes.update(sample.status for sample in samples)
                watch(samples, [])
        return outcomes

    open_neurons: dict[NeuronId, _OpenNeuron] = {}

    def requests() -> Iterator[Request]:
        for neuron in neurons:
            if not database.claim(recipe, neuron):
                continue
            answered = database.answered(recipe, neuron)
            wanted, silent = _requests(split.neuron_called(neuron), config, answered)
            opened = _OpenNeuron(samples=silent, outstanding=len(wanted))
            if not wanted:
                close(neuron, opened)
                continue
            open_neurons[neuron] = opened
            yield from wanted

    def close(neuron: NeuronId, opened: "_OpenNeuron") -> None:
        database.finish(recipe, neuron, opened.samples)
        outcomes.update(sample.status for sample in opened.samples)
        watch(opened.samples, opened.replies)

    for request, reply in model.answers(requests()):
        neuron = neuron_of(request)
        opened = open_neurons[neuron]
        opened.samples += _samples(request, reply, config)
        opened.replies.append(reply)
        opened.outstanding -= 1
        if opened.outstanding == 0:
            close(neuron, open_neurons.pop(neuron))
    return outcomes


@dataclasses.dataclass(kw_only=True)
class _OpenNeuron:
    """A neuron some of whose replies are still to come."""

    samples: list[Sample]
    outstanding: int
    replies: list[Reply] = dataclasses.field(default_factory=list)


def _requests(
    neuron: Neuron, config: ExplainConfig, answered: set[tuple[str, int]]
) -> tuple[list[Request], list[Sample]]:
    """What to ask about a neuron, and the samples that need no asking."""
    both = config.prompt.style == "highlighted_both_signs"
    wanted: list[Request] = []
    silent: list[Sample] = []
    for sign in ("max",) if both else config.signs:
        for sample in range(config.sampling.samples):
            missing = [s for s in (config.signs if both else [sign]) if (s, sample) not in answered]
            if not missing:
                continue
            evidence = gather(neuron, sign, sample, config)
            if evidence is None:
                silent += [Sample(sign=s, sample=sample, status="silent", detail=_SILENT) for s in missing]
                continue
            draw = (config.sampling.seed, *neuron.id, int(sign == "min"), sample)
            messages = prompt(evidence.shown, config.prompt, solved_examples(config.prompt, *draw))
            wanted.append(
                Request(
                    layer=neuron.layer,
                    expert=neuron.expert,
                    index=neuron.index,
                    sign=sign,
                    sample=sample,
                    messages=messages,
                    seed=_seed(*draw),
                    sequences=evidence.sequences,
                )
            )
    return wanted, silent


def _seed(*draw: int) -> int:
    """A 31-bit number that is the same wherever and whenever the neuron is explained."""
    mixed = 0
    for part in draw:
        mixed = (mixed * 1_000_003 + part + 0x9E3779B9) % (2**61 - 1)
    return mixed % 2**31


def _samples(request: Request, reply: Reply, config: ExplainConfig) -> list[Sample]:
    """What a reply gives, for each sign that was asked for."""
    both = config.prompt.style == "highlighted_both_signs"
    signs = ["max", "min"] if both else [request.sign]
    explanations: dict[str, str] = {}
    detail = reply.detail
    if reply.outcome == "answered":
        try:
            explanations = parse_reply(reply.text, config.prompt)
        except UnparsableError as error:
            detail = f"{error}; {reply.detail}" if reply.detail else str(error)
    found = []
    for number, sign in enumerate(signs):
        # A prompt about one sign knows only "the" explanation.
        text = explanations.get(sign if both else "max")
        counted = number == 0  # a reply about both signs costs once
        found.append(
            Sample(
                sign=sign,
                sample=request.sample,
                status="explained" if text else status_of(reply),
                text=text,
                detail=detail,
                reply=reply.text or None,
                messages=[(message.role, message.content) for message in request.messages],
                sequences=request.sequences,
                model=reply.model,
                input_tokens=reply.input_tokens if counted else 0,
                output_tokens=reply.output_tokens if counted else 0,
                cost_usd=reply.cost_usd if counted else 0.0,
            )
        )
    return found


def _token_table_samples(neuron: Neuron, config: ExplainConfig) -> Iterator[Sample]:
    for sign in config.signs:
        means = token_means(neuron, sign)
        names = token_names(means, neuron.split.store.vocabulary, config.prompt.tokens)
        if not names:
            yield Sample(sign=sign, sample=0, status="silent", detail=_SILENT)
            continue
        listed = [[escape(name, '"'), round(mean, 4)] for name, mean in names]
        yield Sample(
            sign=sign,
            sample=0,
            status="explained",
            text=describe_tokens([name for name, _ in listed]),
            reply=json.dumps(listed, ensure_ascii=False),
        )


def is_remote(config: ExplainerConfig) -> bool:
    """Whether requests leave this process."""
    return config.provider in ("gemini", "openai")
