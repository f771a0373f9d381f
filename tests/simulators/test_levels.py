"""Levels and readouts."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.simulators.levels import discretised, extreme_of, rectified
from jaxplain.simulators.readout import Readout, expected_levels
from tests import tiny

ACTS = np.array([0.0, 4.0, 3.9, 0.1, -8.0, 9.0, np.nan], np.float32)


def test_levels_are_tenths_of_the_extreme_and_the_other_sign_is_zero():
    assert discretised(ACTS, "max", 4.0).tolist() == [0, 10, 10, 0, 0, 10, -1]
    assert discretised(ACTS, "min", 16.0).tolist() == [0, 0, 0, 0, 5, 0, -1]
    np.testing.assert_array_equal(rectified(ACTS, "min")[:6], [0, 0, 0, 0, 8, 0])


def test_a_neuron_that_is_silent_has_no_levels():
    with pytest.raises(ValueError, match=r"the extreme is 0\.0"):
        discretised(ACTS, "max", 0.0)


def test_extremes_are_those_of_the_sign(explained):
    import jaxplain

    neuron = jaxplain.open_store(explained / "run")["train"].neuron(2, 3)
    assert extreme_of(neuron, "max") == neuron.exemplars("max")[0].score > 0
    assert extreme_of(neuron, "min") == -neuron.exemplars("min")[0].score > 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_prompts_are_the_template_with_the_explanation(tokenizer):
    readout = Readout(ReadoutConfig(), tokenizer)
    text = "## Neuron Description: a {cat}\n\n ## Input: "
    assert readout.prompt("a {cat}") == tokenizer(text)["input_ids"]
    assert readout.level_ids.tolist() == list(range(11))


def test_remapped_tokens_are_replaced_in_prompts_and_sequences(tokenizer):
    grown = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    grown.add_tokens(["<||end||>"], special_tokens=True)
    config = ReadoutConfig(added_tokens=["<||end||>"], remapped={"<|end|>": "<||end||>"})
    readout = Readout(config, grown)
    end, new = grown.convert_tokens_to_ids(["<|end|>", "<||end||>"])
    assert readout.sequence(np.array([5, end, 7], np.int32)).tolist() == [5, new, 7]
    prompt = readout.prompt("stops at <|end|>")
    assert new in prompt
    assert end not in prompt


def test_digits_must_be_single_tokens(tokenizer):
    readout = Readout(ReadoutConfig(logits="digits"), tokenizer)
    assert [tokenizer.decode([number]) for number in readout.level_ids] == [str(n) for n in range(11)]
    bytewise = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("0123456789")}, merges=[]))
    with pytest.raises(JaxplainError, match=r"but 10 is 2 tokens of this tokenizer"):
        Readout(ReadoutConfig(logits="digits"), PreTrainedTokenizerFast(tokenizer_object=bytewise))


def test_remapping_an_unknown_token_is_refused(tokenizer):
    config = ReadoutConfig(added_tokens=["<||what||>"], remapped={"<|what|>": "<||what||>"})
    with pytest.raises(JaxplainError, match="is no token of this tokenizer"):
        Readout(config, tokenizer)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "no place"}, "name {explanation} in it, once"),
        ({"remapped": {"a": "b"}}, "list 'b' among readout.added_tokens"),
        (
            {"special_tokens": "remap", "remapped": {"a": "b"}, "added_tokens": ["b"]},
            "give one of the two",
        ),
    ],
)
def test_bad_readouts_are_refused(fields, said):
    with pytest.raises(JaxplainError, match=said):
        ReadoutConfig(**fields)


def test_expected_levels_are_means_by_probability():
    probabilities = np.zeros((2, 11), np.float32)
    probabilities[0, [0, 10]] = 0.5
    probabilities[1, 3] = 1.0
    assert expected_levels(probabilities).tolist() == [5.0, 3.0]
