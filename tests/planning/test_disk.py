"""The predicted size of a store against one that is written."""

import pytest

from jaxplain.planning.disk import store_size
from jaxplain.planning.hardware import target_of
from jaxplain.planning.planner import make_plan
from tests.planning.demands import demand, parsed


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny model's store, and what its config is."""
    import yaml

    from jaxplain.extract import main
    from tests import tiny

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
    stats = sum(size_of(store / split / "stats") for split in ("train", "valid"))
    assert 0.5 * predicted.statistics < stats < 1.5 * predicted.statistics
    sequences = sum(size_of(store / split / "sequences") for split in ("train", "valid"))
    assert sequences < predicted.sequences
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
