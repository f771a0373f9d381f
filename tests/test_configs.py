"""The configs that come with the project: each is read by its command, and its header says what is so."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from jaxplain.commands import config_parser, parse_config
from jaxplain.configs.explanation import ExplainConfig
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.configs.finetuning import FinetuneConfig
from jaxplain.configs.scoring import ScoreConfig
from jaxplain.planning import planner
from jaxplain.planning.hardware import target_of
from jaxplain.planning.planner import make_plan
from jaxplain.subjects.families import architecture_of
from tests.subjects.test_families import PUBLISHED

CONFIGS = Path(__file__).parent.parent / "configs"
COMMANDS = {
    "explain": ExplainConfig,
    "extract": ExtractConfig,
    "finetune": FinetuneConfig,
    "score": ScoreConfig,
}
FILES = sorted(CONFIGS.glob("*/*.yaml"))

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TARGETS = {
    "llama-3.1-8b-instruct": LLAMA3,
    "llama-3-8b-valueeval": LLAMA3,
    "qwen2.5-7b": PUBLISHED["Qwen2.5-7B"][1],
    "gemma-2-2b": PUBLISHED["gemma-2-2b"][1],
    "pythia-1.4b": PUBLISHED["pythia-1.4b"][1],
    "gpt2-small": PUBLISHED["gpt2"][1],
}


def read(path):
    kind = COMMANDS[path.parent.name]
    return parse_config(config_parser(kind, path.parent.name), kind, ["--config", str(path)])[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_read_by_its_command(path):
    config = read(path)
    assert isinstance(config, COMMANDS[path.parent.name])
    header = path.read_text().split("\nsubject:")[0].split("\nstore:")[0]
    command = f"python -m jaxplain.{path.parent.name} --config configs/{path.parent.name}/{path.name}"
    assert command in header, "the header says how to run it"


def test_every_folder_of_configs_belongs_to_a_command():
    assert {path.name for path in CONFIGS.iterdir()} == COMMANDS.keys()
    assert {f"{name}.yaml" for name in TARGETS} <= {path.name for path in FILES}


@pytest.mark.parametrize("name", TARGETS)
def test_the_header_says_what_a_run_takes(name, monkeypatch):
    path = CONFIGS / "extract" / f"{name}.yaml"
    header = path.read_text().split("\nsubject:")[0]
    topology, memory = re.search(r"--topology (\S+)(?: --memory (\S+))?", header).groups()
    config = read(path)
    if "--run.checkpoint_minutes 0" in header:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_minutes=0.0))
    lines = (
        r"store (\S+) GB",
        r"devices (\S+) GiB of weights, (\S+) GiB of state",
        r"time (\S+) hours at 40% of the peak: (\S+) FLOP",
    )
    stated = re.search(".*?".join(lines), header, re.DOTALL)
    arch = architecture_of(AutoConfig.for_model(**TARGETS[name]))
    monkeypatch.setattr(planner, "read_architecture", lambda _: arch)
    target = target_of(topology=topology, devices=None, memory=memory)
    found = make_plan(config, target, utilisation=0.4)
    assert found.fits
    expected = [
        found.store.total / 1e9,
        found.configured.memory.weights / 2**30,
        found.configured.memory.state / 2**30,
        found.hours,
        found.flops,
    ]
    np.testing.assert_allclose([float(number) for number in stated.groups()], expected, rtol=0.1)
    neurons = re.search(r"All (\S+) MLP neurons", header)[1]
    assert int(neurons.replace(",", "")) == arch.layers * arch.neurons
