"""The configs that come with the project: each is read by its command, and its header says what is so."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from flax import nnx
from transformers import AutoConfig

from jaxplain.commands import config_parser, parse_config
from jaxplain.configs.explanation import ExplainConfig
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.configs.finetuning import FinetuneConfig
from jaxplain.configs.scoring import ScoreConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.estimates import estimate, flops_per_token
from jaxplain.exemplars.strata import kept_of_draws, plan_strata
from jaxplain.extract import main
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import architecture_of
from tests import families, tiny
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
    return parse_config(config_parser(kind, prog="test"), kind, ["--config", str(path)])[0]


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
def test_the_header_says_what_a_run_takes(name):
    path = CONFIGS / "extract" / f"{name}.yaml"
    header = path.read_text().split("\nsubject:")[0]
    peak, utilisation = re.search(r"--peak (\S+) --utilisation (\S+)", header).groups()
    lines = (
        r"store (\S+) GB",
        r"devices (\S+) GB of weights, (\S+) GB of reductions",
        r"time (\S+) hours: (\S+)",
    )
    stated = re.search(".*?".join(lines), header, re.DOTALL)
    arch = architecture_of(AutoConfig.for_model(**TARGETS[name]))
    found = estimate(read(path), arch)
    expected = [
        found.store_bytes / 1e9,
        found.weight_bytes / 1e9,
        found.reduction_bytes / 1e9,
        found.hours(peak=float(peak), utilisation=float(utilisation)),
        found.flops,
    ]
    np.testing.assert_allclose([float(number) for number in stated.groups()], expected, rtol=0.1)
    neurons = re.search(r"All (\S+) MLP neurons", header)[1]
    assert int(neurons.replace(",", "")) == arch.layers * arch.neurons


@pytest.mark.parametrize("model", [tiny.LLAMA, families.QWEN2_MOE | {"mlp_only_layers": [1]}])
@pytest.mark.parametrize("more", [False, True])
def test_the_estimated_bytes_are_those_of_a_store(tmp_path, model, more):
    tiny.write_model(tmp_path / "model", model)
    tiny.write_corpus(tmp_path / "docs.jsonl", 150)
    arguments = [
        *("--subject.id", str(tmp_path / "model"), "--output", str(tmp_path / "run")),
        *("--corpus.sources", f"[{{dataset: json, data_files: {tmp_path / 'docs.jsonl'}}}]"),
        *("--corpus.sequence_length", "20", "--corpus.max_sequences", "30", "--exemplars.k", "7"),
        *("--neurons.layers", "[0, 2]", "--neurons.indices", "0:48:3", "--run.batch_size", "8"),
        *("--run.progress", "false"),
        *(("--neurons.experts", "all") if "num_experts" in model else ()),
        *(("--exemplars.kinds", "[max, quantile]", "--statistics.tokens.neurons", "5") if more else ()),
    ]
    main(arguments)
    config, _ = parse_config(config_parser(ExtractConfig, prog="test"), ExtractConfig, arguments)
    arch = architecture_of(AutoConfig.from_pretrained(tmp_path / "model"))
    root = zarr.open_group(tmp_path / "run" / "exemplars.zarr", mode="r")
    members = root.members(max_depth=None)
    arrays = [array for name, array in members if name.count("/") >= 2 and isinstance(array, zarr.Array)]
    assert len(arrays) > 20
    assert estimate(config, arch).store_bytes == sum(array.nbytes for array in arrays)


def test_estimates_count_what_a_run_reads(tmp_path):
    arch = Architecture(
        vocabulary=100, layers=4, width=64, neurons=256, query_heads=4, key_value_heads=2, head_width=16,
        max_positions=64,
    )  # fmt: skip
    config = read(CONFIGS / "extract" / "smollm2.yaml")
    change = dataclasses.replace
    whole = estimate(config, arch)
    one = estimate(change(config, neurons=change(config.neurons, layers=[0])), arch)
    assert whole.weight_bytes == 4 * (100 * 64 + 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256 + 2 * 64))
    assert one.weight_bytes == 4 * (100 * 64 + 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256 + 2 * 64)
    half = estimate(change(config, exemplars=change(config.exemplars, kinds=["max", "random"])), arch)
    top = 256 * 4 * 100 * (2 * 96 + 12)  # activations, priority, sequence and slot
    assert whole.reduction_bytes - half.reduction_bytes == top
    strata = change(config.exemplars, kinds=["max", "min", "random", "quantile"])
    kept = kept_of_draws(plan_strata(strata.strata, wanted=strata.samples_per_quantile, rows=1000))
    parted = estimate(change(config, exemplars=strata), arch)
    assert parted.reduction_bytes - whole.reduction_bytes == sum(kept.values()) * top // 100
    tables = change(config.statistics.tokens, neurons=[[0, 1], [0, 2], [3, 5]])
    tabled = estimate(change(config, statistics=change(config.statistics, tokens=tables)), arch)
    assert tabled.reduction_bytes - whole.reduction_bytes == 3 * (100 * 8 + 4) + 2 * 100 * 4
    assert whole.flops == 2 * 1000 * 96 * flops_per_token(arch, 4, 96)
    assert whole.hours(peak=whole.flops, utilisation=0.5) == 2 / 3600


def test_how_many_sequences_there_are_must_be_known():
    config = read(CONFIGS / "extract" / "smollm2.yaml")
    change = dataclasses.replace
    config = change(config, corpus=change(config.corpus, max_sequences=0))
    arch = architecture_of(AutoConfig.for_model(**LLAMA3))
    with pytest.raises(JaxplainError, match=r"say what you expect in corpus\.expected_sequences"):
        estimate(config, arch)


def test_estimates_of_a_mixture_count_all_experts():
    arch = Architecture(
        vocabulary=100, layers=3, width=64, neurons=96, query_heads=4, key_value_heads=2, head_width=16,
        max_positions=64, experts=6, experts_per_token=2, expert_neurons=32, shared_neurons=16,
        dense_layers=(True, False, False),
    )  # fmt: skip
    of_neurons = 3 * 64 * (96 + 2 * 208) - 64 * 208 + 64 * 6 * 2
    assert flops_per_token(arch, 3, 96) == 2 * (3 * (64 * 64 * 2 + 64 * 64 + 2 * 96 * 64) + of_neurons)
    config = read(CONFIGS / "extract" / "smollm2.yaml")
    change = dataclasses.replace
    few, more = (
        estimate(change(config, statistics=change(config.statistics, sampled_tokens=number)), arch)
        for number in (10, 11)
    )
    # Three tokens are drawn for one that a routed expert reads.
    assert more.reduction_bytes - few.reduction_bytes == 3 * 2 * (96 + 2 * 208)


@pytest.mark.parametrize("gated", [True, False])
def test_the_flops_are_those_that_xla_counts(gated):
    arch = Architecture(
        vocabulary=64, layers=3, width=256, neurons=1024, query_heads=8, key_value_heads=4, head_width=32,
        max_positions=128, gated=gated,
    )  # fmt: skip
    model = Decoder(arch, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)
    forward = jax.jit(lambda weights, tokens_BT: nnx.merge(graph, weights)(tokens_BT))
    counted = forward.lower(weights, jnp.zeros((1, 128), jnp.int32)).compile().cost_analysis()["flops"]
    expected = 128 * (flops_per_token(arch, 3, 128) + 2 * 256 * 1024)  # here the last layer is whole
    assert counted == pytest.approx(expected, rel=0.05)
