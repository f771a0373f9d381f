"""What is trained on and what is held out."""

import dataclasses
import itertools

import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxplain
from jaxplain.configs.finetuning import PairsConfig
from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.simulators.levels import discretised, extreme_of
from jaxplain.simulators.pairs import (
    NOT_COUNTED,
    Pairs,
    evaluation_batches,
    is_held_out,
    make_dataset,
    training_batches,
)
from jaxplain.simulators.readout import Readout
from jaxplain.store.explanations import open_explanations
from tests.workspace import LAYERS, NEURONS

CONFIG = PairsConfig(top=3, random=3, held_out_neurons=0.3, held_out_documents=0.3)


@pytest.fixture(scope="module")
def split(explained):
    return jaxplain.open_store(explained / "run")["train"]


@pytest.fixture(scope="module")
def readout(explained):
    return Readout(ReadoutConfig(), AutoTokenizer.from_pretrained(explained / "model"))


@pytest.fixture(scope="module")
def explanations(explained):
    with open_explanations(explained / "run" / "explanations.sqlite") as database:
        return database.explanations()


@pytest.fixture
def dataset(split, readout, explanations):
    def make(**fields):
        config = PairsConfig(
            **{"top": 3, "random": 3, "held_out_neurons": 0.3, "held_out_documents": 0.3} | fields
        )
        return make_dataset(explanations, split, config, readout, longest_row=256)

    return make


def rows_of(pairs):
    """Prompt and (tokens, levels) of each sequence, without what fills them up."""
    for number in range(len(pairs)):
        prompt, tokens, levels = pairs[number]
        yield (
            tuple(prompt[prompt >= 0].tolist()),
            [
                (tuple(t[t >= 0].tolist()), x[t >= 0].tolist())
                for t, x in zip(tokens, levels, strict=True)
                if (t >= 0).any()
            ],
        )


def sequence_documents(split):
    """Document by the tokens of a sequence."""
    rows = split.sequences(np.arange(split.sequence_count))
    return {
        tuple(t for t in token if t >= 0): document
        for token, document in zip(rows["token"].tolist(), rows["document"].tolist(), strict=True)
    }


def sequences_in(pairs, split):
    """The documents of the sequences that a set shows."""
    known = sequence_documents(split)
    return {known[tokens] for _, sequences in rows_of(pairs) for tokens, _ in sequences}


def test_neurons_and_documents_held_out_are_never_trained_on(dataset, split, readout, explanations):
    made = dataset()
    held = {(layer, n) for layer in LAYERS for n in range(NEURONS) if is_held_out(layer, n, CONFIG)}
    assert 0 < len(held) < 24
    assert made.neurons == (24 - len(held), len(held))
    prompts = {
        out: {tuple(readout.prompt(e.text)) for e in explanations if ((e.layer, e.index) in held) == out}
        for out in (False, True)
    }
    for out, pairs in ((False, made.train), (True, made.held_out)):
        assert {prompt for prompt, _ in rows_of(pairs)} <= prompts[out]
        assert all(1 <= len(sequences) <= 6 for _, sequences in rows_of(pairs))
    trained, kept = sequences_in(made.train, split), sequences_in(made.held_out, split)
    assert trained
    assert kept
    assert not trained & kept


def test_rows_are_a_prompt_and_sequences_with_their_levels(split, readout, explanations):
    config = PairsConfig(top=2, random=0, held_out_neurons=0.3, held_out_documents=0.3)
    made = make_dataset(explanations, split, config, readout, longest_row=256)
    trained = sequences_in(made.train, split)
    wanted = [e for e in explanations if not is_held_out(e.layer, e.index, config)]
    for explanation, (prompt, sequences) in zip(wanted, rows_of(made.train), strict=True):
        neuron, sign = split.neuron(explanation.layer, explanation.index), explanation.sign
        assert list(prompt) == readout.prompt(explanation.text)
        # The strongest but for those whose documents are held out.
        allowed = [e for e in neuron.exemplars(sign) if e.document in trained][:2]
        for exemplar, (tokens, levels) in zip(allowed, sequences, strict=True):
            assert tokens == tuple(exemplar.tokens.tolist())
            assert levels == discretised(exemplar.activations, sign, extreme_of(neuron, sign)).tolist()
            assert exemplar.rank > 0 or max(levels) == 10


def test_signs_and_providers_are_chosen(dataset, explanations):
    assert len(dataset(signs=["max"]).train) < len(dataset().train)
    assert len(dataset(providers=["token_table"]).train) == len(dataset().train)
    with pytest.raises(JaxplainError, match="there are no explanations of these"):
        dataset(providers=["gemini"])


def test_explanations_that_are_too_long_are_counted(dataset, readout, explanations):
    lengths = sorted(len(readout.prompt(e.text)) for e in explanations)
    limit = lengths[len(lengths) // 2]
    assert dataset(longest_prompt=limit).too_long == sum(length > limit for length in lengths)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"held_out_neurons": 0.001}, "no pair of explanation and sequence is held out"),
        ({"held_out_neurons": 0.999}, "no pair of explanation and sequence is to train on"),
        ({"longest_prompt": 2}, "no pair of explanation and sequence is to train on"),
    ],
)
def test_empty_sets_are_refused(dataset, fields, said):
    with pytest.raises(JaxplainError, match=said):
        dataset(**fields)


@pytest.mark.parametrize("place", [{"layer": 77}, {"index": 999}])
def test_an_explanation_of_an_unknown_neuron_is_refused(split, readout, explanations, place):
    strange = dataclasses.replace(explanations[0], **place)
    with pytest.raises(JaxplainError, match=f"{next(iter(place.values()))} is not in the store"):
        make_dataset([*explanations, strange], split, CONFIG, readout, longest_row=256)


def test_rows_longer_than_the_model_reads_are_refused(split, readout, explanations):
    with pytest.raises(JaxplainError, match="more than the 20 that the model reads"):
        make_dataset(explanations, split, CONFIG, readout, longest_row=20)


def numbered(count):
    pairs = Pairs(longest_prompt=2, together=3, length=4)
    for n in range(count):
        pairs.add([n], [(np.array([n, n]), np.array([n % 11, -1]))])
    return pairs


def test_every_epoch_has_every_explanation_once_in_an_order_of_its_own():
    batches = itertools.islice(training_batches(numbered(12), batch_size=4, seed=3, start=0), 6)
    seen = [batch.prompts_EP[:, 0].tolist() for batch in batches]
    first, second = (list(itertools.chain(*part)) for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != list(range(12))


def test_batches_go_on_from_any_number():
    whole = list(itertools.islice(training_batches(numbered(10), batch_size=4, seed=3, start=0), 9))
    rest = list(itertools.islice(training_batches(numbered(10), batch_size=4, seed=3, start=5), 4))
    for batch, again in zip(whole[5:], rest, strict=True):
        for array, other in zip(batch, again, strict=True):
            np.testing.assert_array_equal(array, other)
    other = next(training_batches(numbered(10), batch_size=4, seed=4, start=0))
    assert (other.prompts_EP != whole[0].prompts_EP).any()


def test_evaluation_takes_every_explanation_once_and_fills_up_with_nothing():
    batches = list(evaluation_batches(numbered(6), batch_size=4, most=6, seed=0))
    assert [batch.tokens_EST.shape for batch in batches] == [(4, 3, 4)] * 2
    prompts, tokens, levels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert prompts[:6].tolist() == [[n, -1] for n in range(6)]
    assert tokens[5].tolist() == [[5, 5, -1, -1], [-1] * 4, [-1] * 4]
    assert levels[5].tolist() == [[5, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert (levels[6:] == NOT_COUNTED).all()


def test_evaluation_may_take_a_draw_of_them():
    def draw(seed):
        (batch,) = evaluation_batches(numbered(40), batch_size=8, most=8, seed=seed)
        return batch.prompts_EP[:, 0].tolist()

    assert draw(0) == draw(0) == sorted(set(draw(0)))
    assert draw(0) != draw(1)
    assert draw(0)[-1] >= 8
