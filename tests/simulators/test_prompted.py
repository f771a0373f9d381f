"""The prompted simulator: its prompt, where it reads, and what it makes of the digits."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxplain
from jaxplain.configs.explanation import LocalModelConfig
from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.scoring import PromptedConfig
from jaxplain.mesh import make_mesh
from jaxplain.simulators.prompted import PromptedSimulator, prompted_messages
from jaxplain.simulators.simulation import Job
from jaxplain.subjects.subject import open_subject
from tests import tiny

GOLDEN = Path(__file__).parent / "golden" / "prompted.txt"
CONFIG = PromptedConfig(few_shot=2)


def prompt_text():
    return "\n".join(f"== {m.role}\n{m.content}" for m in prompted_messages(CONFIG, levels=11)) + "\n"


def test_the_prompt_is_as_written_down():
    assert prompt_text() == GOLDEN.read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted")
    return tiny.write_model(folder, tiny.LLAMA | {"max_position_embeddings": 4096})


@pytest.fixture(scope="module")
def vocabulary(explained):
    return jaxplain.open_store(explained / "run").vocabulary


def test_every_token_is_read_before_its_placeholder(model, vocabulary, explained):
    """Against the whole prompt as one text, read in one plain pass."""
    simulator = PromptedSimulator(str(model), CONFIG, LocalModelConfig(batch_size=8), vocabulary)
    rows = jaxplain.open_store(explained / "run")["train"].sequences(np.arange(3))["token"]
    sequences = [row[row >= 0][:length] for row, length in zip(rows, (9, 4, 12), strict=True)]
    job = Job(layer=0, index=0, sign="max", explanation="a {cat}", sequences=sequences)
    ((given, found),) = simulator.simulate(iter([job]))
    assert given is job
    subject = open_subject(SubjectConfig(id=str(model)))
    mesh = make_mesh(MeshConfig(), batch_size=8, mlp_width=48)
    decoder, tokenizer = subject.load(mesh, with_head=True), subject.tokenizer
    chat = [{"role": m.role, "content": m.content} for m in prompted_messages(CONFIG, levels=11)]
    chat.append({"role": "user", "content": "Explanation: a {cat}"})
    start = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)

    def plain(text):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    digits = [plain(str(level))[0] for level in range(11)]
    for sequence, simulation in zip(sequences, found, strict=True):
        ids, places = list(start), []
        for token in sequence.tolist():
            text = vocabulary.bytes_of(token).decode("utf-8", "surrogateescape")
            shown = "".join(f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
            ids += plain(shown.replace("\n", "\\n")) + plain("\t")
            places.append(len(ids) - 1)
            ids += plain("unknown\n")
        logits = np.asarray(decoder.logits(jnp.array([ids], jnp.int32))[0], np.float64)[places][:, digits]
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(simulation.probabilities, probabilities, atol=1e-4)
        np.testing.assert_allclose(simulation.expected, probabilities @ np.arange(11), atol=1e-3)


def test_without_a_token_for_ten_levels_are_stretched(model, vocabulary, monkeypatch):
    from jaxplain.explainers import chat

    whole = chat.ChatTokenizer.text
    monkeypatch.setattr(
        chat.ChatTokenizer, "text", lambda self, text: [9, 9] if text == "10" else whole(self, text)
    )
    simulator = PromptedSimulator(str(model), CONFIG, LocalModelConfig(batch_size=8), vocabulary)
    job = Job(layer=0, index=0, sign="max", explanation="x", sequences=[np.array([5, 6], np.int32)])
    ((_, (simulation,)),) = simulator.simulate(iter([job]))
    assert simulation.probabilities is None
    assert ((simulation.expected >= 0) & (simulation.expected <= 10)).all()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(prompt_text())
