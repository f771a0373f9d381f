"""What a simulator learns from: pairs of an explanation and a sequence with its neuron's levels.

Some neurons and some documents are held out. What is trained on has neither; what is evaluated on has
both, so that the loss there is that of new neurons on new text.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int

from jaxplain.configs.explanation import Sign
from jaxplain.configs.finetuning import PairsConfig
from jaxplain.corpora.hashing import lottery
from jaxplain.errors import JaxplainError
from jaxplain.simulators.levels import NOT_COUNTED, discretised, extreme_of
from jaxplain.simulators.reading import NO_TOKEN
from jaxplain.simulators.readout import Readout
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.explanations import Explanation
from jaxplain.store.neuron_id import NeuronId, neuron_of
from jaxplain.store.reader import Neuron, Split


class Batch(NamedTuple):
    """Explanations, each with sequences of its neuron; int32, numpy's on the host and jax's on devices.

    Attributes:
        prompts_EP: What the simulator is told, with the explanation; -1 after it. [E, P]
        tokens_EST: Tokens of the sequences, -1 where there is none. [E, S, T]
        levels_EST: The level to predict at each token; -1 where there is none to predict. [E, S, T]
    """

    prompts_EP: Any
    tokens_EST: Any
    levels_EST: Any


class Pairs(grain.sources.RandomAccessDataSource):
    """Rows of `Batch` by number: an explanation with `together` sequences or fewer, of `length` tokens."""

    def __init__(self, *, longest_prompt: int, together: int, length: int):
        self._longest_prompt, self._shape = longest_prompt, (together, length)
        self._rows: list[tuple[Int[np.ndarray, "P"], list[tuple[np.ndarray, np.ndarray]]]] = []

    def add(self, prompt: Sequence[int], sequences: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """A prompt with (tokens, levels) of each of its sequences."""
        self._rows.append((np.array(prompt, np.int32), list(sequences)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(
        self, number: int
    ) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "S T"], Int[np.ndarray, "S T"]]:
        """Prompt, tokens and levels of a row."""
        prompt, sequences = self._rows[number]
        prompt_P = np.full(self._longest_prompt, NO_TOKEN, np.int32)
        prompt_P[: len(prompt)] = prompt
        tokens_ST = np.full(self._shape, NO_TOKEN, np.int32)
        levels_ST = np.full(self._shape, NOT_COUNTED, np.int32)
        for place, (tokens, levels) in enumerate(sequences):
            tokens_ST[place, : len(tokens)], levels_ST[place, : len(levels)] = tokens, levels
        return prompt_P, tokens_ST, levels_ST


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """What to train on, what to evaluate on, and the explanations that had no place in either.

    Attributes:
        train, held_out: The two sets.
        too_long: Explanations whose prompts are longer than `pairs.longest_prompt`.
        neurons: Neurons trained on, and neurons held out.
    """

    train: Pairs
    held_out: Pairs
    too_long: int
    neurons: tuple[int, int]


def make_dataset(
    explanations: Iterable[Explanation],
    split: Split,
    config: PairsConfig,
    readout: Readout,
    *,
    longest_row: int,
) -> Dataset:
    """Pairs of every explanation of the chosen signs and providers.

    Raises JaxplainError where none is left, nothing is held out, or rows are longer than the model reads.
    """
    chosen = [
        e
        for e in explanations
        if e.sign in config.signs and (not config.providers or e.provider in config.providers)
    ]
    if not chosen:
        raise JaxplainError(
            "there are no explanations of these pairs.signs and pairs.providers; make some with "
            "python -m jaxplain.explain."
        )
    prompts = [readout.prompt(explanation.text) for explanation in chosen]
    fitting = [len(prompt) <= config.longest_prompt for prompt in prompts]
    longest = max((len(p) for p, fits in zip(prompts, fitting, strict=True) if fits), default=0)
    tokens = split.sequences(np.zeros(1, np.int32))["token"].shape[1]
    if longest + tokens > longest_row:
        raise JaxplainError(
            f"prompts and sequences have {longest + tokens} tokens together, more than the {longest_row} "
            "that the model reads; lower pairs.longest_prompt."
        )
    sets = {
        out: Pairs(longest_prompt=longest, together=config.top + config.random, length=tokens)
        for out in (False, True)
    }
    neurons: dict[bool, set[NeuronId]] = {False: set(), True: set()}
    for explanation, prompt, fits in zip(chosen, prompts, fitting, strict=True):
        if not fits:
            continue
        neuron = neuron_of(explanation)
        held_out = is_held_out(neuron.layer, neuron.index, config, expert=neuron.expert)
        found = _sequences(split.neuron_called(neuron), explanation, held_out, config, readout)
        if found:
            sets[held_out].add(prompt, found)
            neurons[held_out].add(neuron)
    for held_out, name, remedy in (
        (False, "to train on", "lower the two shares, or explain more neurons"),
        (
            True,
            "held out",
            "raise pairs.held_out_neurons or pairs.held_out_documents, or explain more neurons",
        ),
    ):
        if not len(sets[held_out]):
            raise JaxplainError(f"no pair of explanation and sequence is {name}; {remedy}.")
    return Dataset(
        train=sets[False],
        held_out=sets[True],
        too_long=fitting.count(False),
        neurons=(len(neurons[False]), len(neurons[True])),
    )


def is_held_out(layer: int, index: int, config: PairsConfig, *, expert: int | None = None) -> bool:
    """Whether a neuron is one of those that are never trained on."""
    number = index if expert is None else (expert << 32) + index
    draw = lottery(config.seed, np.array([layer]), np.array([number]))
    return bool(draw[0] < config.held_out_neurons)


def _documents_held_out(exemplars: Sequence[Exemplar], config: PairsConfig) -> Bool[np.ndarray, "N"]:
    documents = np.array([exemplar.document for exemplar in exemplars], np.int64)
    # Another stream than that of the neurons.
    return lottery(config.seed + 1, documents, np.zeros_like(documents)) < config.held_out_documents


def _sequences(
    neuron: Neuron, explanation: Explanation, held_out: bool, config: PairsConfig, readout: Readout
) -> list[tuple[np.ndarray, np.ndarray]]:
    sign: Sign = "max" if explanation.sign == "max" else "min"
    extreme = extreme_of(neuron, sign)
    if not extreme > 0:
        return []
    rng = np.random.default_rng((config.seed, *neuron.id, sign == "min"))
    chosen: dict[int, Exemplar] = {}
    for kind, count in ((sign, config.top), ("random", config.random)):
        if count == 0:
            continue
        exemplars = neuron.exemplars(kind)
        allowed = [
            exemplar
            for exemplar, out in zip(exemplars, _documents_held_out(exemplars, config), strict=True)
            if out == held_out and exemplar.sequence not in chosen
        ]
        if kind == "random":
            # The same sequences for every neuron otherwise.
            rng.shuffle(allowed)
        chosen |= {exemplar.sequence: exemplar for exemplar in allowed[:count]}
    return [
        (readout.sequence(exemplar.tokens), discretised(exemplar.activations, sign, extreme))
        for exemplar in chosen.values()
    ]


def training_batches(pairs: Pairs, *, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
    """Batches without end, each pass in an order of its own, from the batch number `start` on."""
    dataset = grain.MapDataset.source(pairs).seed(seed).shuffle().repeat().batch(batch_size)
    number = start
    while True:
        batch = dataset[number]
        assert batch is not None
        yield Batch(*batch)
        number += 1


def evaluation_batches(pairs: Pairs, *, batch_size: int, most: int, seed: int) -> Iterator[Batch]:
    """Each explanation once, or `most` of them, drawn by the seed.

    The last batch is filled up with rows that have nothing to predict.
    """
    chosen = np.arange(len(pairs))
    if most < len(pairs):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    for start in range(0, len(chosen), batch_size):
        rows = [pairs[number] for number in chosen[start : start + batch_size].tolist()]
        rows += [(rows[0][0], rows[0][1], np.full_like(rows[0][2], NOT_COUNTED))] * (batch_size - len(rows))
        yield Batch(*map(np.stack, zip(*rows, strict=True)))
