"""The predicted size of a store against one that is written."""

import math

import numpy as np
import pytest
import zarr
from transformers import AutoConfig

from jaxplain.commands import config_parser, parse_config
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.exemplars.selection import select_neurons
from jaxplain.extract import main
from jaxplain.planning.demand import demand_of
from jaxplain.planning.disk import split_arrays, store_size
from jaxplain.planning.hardware import target_of
from jaxplain.planning.planner import make_plan
from jaxplain.subjects.families import architecture_of
from tests import families, tiny
from tests.planning.demands import MIXTURE, demand, parsed


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny model's store, and what its config is."""
    import yaml

    folder = tmp_path_factory.mktemp("written")
    tiny.write_model(folder / "model", tiny.LLAMA | {"max_position_embeddings": 128})
    tiny.write_corpus(folder / "docs.jsonl", 400)
    fields = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": 96,
            "max_sequences": 60,
            "splits": {"train": 0.5, "valid": 0.5},
        },
        "neurons": {"layers": [0, 2]},
        "exemplars": {"k": 40},
        "run": {"batch_size": 16, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    main(["--config", str(folder / "config.yaml")])
    return folder, fields


def test_a_store_is_as_large_as_predicted(written):
    folder, fields = written
    target = target_of(topology="h100:8", devices=None, memory=None)
    predicted = make_plan(parsed(fields), target, utilisation=0.5).store
    store = folder / "run" / "exemplars.zarr"
    kinds = sum(
        size_of(store / split / kind) for split in ("train", "valid") for kind in ("max", "min", "random")
    )
    assert 0.8 * predicted.exemplars < kinds < predicted.exemplars
    groups = ("stats", "sample")
    stats = sum(size_of(store / split / group) for split in ("train", "valid") for group in groups)
    assert 0.5 * predicted.statistics < stats < 1.5 * predicted.statistics
    sequences = sum(size_of(store / split / "sequences") for split in ("train", "valid"))
    assert sequences < 1.1 * predicted.sequences  # so few do not outweigh the arrays' metadata
    assert 0.75 * predicted.total < size_of(store) < 1.05 * predicted.total


def test_neurons_that_are_not_asked_for_take_no_place():
    some = store_size(demand(neurons={"layers": [0], "indices": list(range(16))}))
    assert some.exemplars == pytest.approx(store_size(demand()).exemplars / 3 / 64, rel=0.01)


def test_every_part_grows_with_what_it_holds():
    base = store_size(demand())
    assert store_size(demand(exemplars={"k": 8})).exemplars == pytest.approx(2 * base.exemplars, rel=0.02)
    assert store_size(demand(corpus={"max_sequences": 2000})).sequences == pytest.approx(
        2 * base.sequences, rel=0.02
    )
    both = store_size(demand(exemplars={"splits": ["train", "test"]}))
    assert (both.exemplars, both.sequences) == (2 * base.exemplars, 2 * base.sequences)
    assert both.statistics == 2 * base.statistics
    fewer = store_size(demand(statistics={"quantiles": []}))
    assert fewer.statistics < base.statistics
    assert base.total == base.exemplars + base.sequences + base.statistics + base.vocabulary


@pytest.mark.parametrize("model", [tiny.LLAMA, families.QWEN2_MOE | {"mlp_only_layers": [1]}])
@pytest.mark.parametrize("more", [False, True])
def test_the_planned_arrays_are_those_of_a_store(tmp_path, model, more):
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
    config, _ = parse_config(config_parser(ExtractConfig, "extract"), ExtractConfig, arguments)
    arch = architecture_of(AutoConfig.from_pretrained(tmp_path / "model"))
    asked = demand_of(config, select_neurons(config.neurons, arch))
    root = zarr.open_group(tmp_path / "run" / "exemplars.zarr", mode="r")
    members = dict(root.members(max_depth=None))
    planned = {
        f"{split}/{group}/{name}": spec
        for split, rows in asked.sequences.items()
        for group, arrays in split_arrays(asked, rows).items()
        for name, spec in arrays.items()
    }
    written = {
        name: array
        for name, array in members.items()
        if name.count("/") >= 2 and isinstance(array, zarr.Array)
    }
    assert len(written) > 20
    assert planned.keys() == written.keys()
    assert {name: spec.shape for name, spec in planned.items()} == {
        name: array.shape for name, array in written.items()
    }
    size = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in planned.values())
    assert size == sum(array.nbytes for array in written.values())


def test_strata_and_tables_of_a_mixture_take_their_place():
    base = store_size(demand(MIXTURE))
    # Six strata of two sequences each, with the number of a stratum for each rank, in place of four. The
    # places of chunks, of neurons that there are not too, are a twentieth.
    strata = {"kinds": ["quantile"], "samples_per_quantile": 2}
    quantile = store_size(demand(MIXTURE, exemplars=strata)).exemplars
    assert quantile == pytest.approx(base.exemplars / 2 / 4 * 12 * (128 * 2 + 12) / (128 * 2 + 8), rel=0.05)
    tables = {"sampled_tokens": 32, "tokens": {"neurons": 5, "count": 3}}
    more = store_size(demand(MIXTURE, statistics=tables)).statistics - base.statistics
    # Of both signs a token, a mean and a count, and the names of the neurons; with the places of 9 chunks.
    assert more == 5 * (2 * 3 * (4 + 4 + 8) + 3 * 4) + 16 * (2 * 3 + 3)
