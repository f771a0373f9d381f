"""A small extraction that can be interrupted anywhere, and what two of its stores have in common."""

import json
import os
import signal

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.exemplars.step import make_step
from jaxplain.extract import main
from tests import tiny

SEQUENCES, BATCH, STEPS = 45, 8, 6
SPLITS = ("train", "valid")
KINDS = ("max", "min", "random")


class Crash(BaseException):
    """Stands in for a sudden end where no other process is needed to see what is left."""


def write_config(folder, *, model=tiny.LLAMA, documents=150, sequences=SEQUENCES, **run):
    """A model of two layers, a corpus and a config with both, under a folder; gives the config's path."""
    tiny.write_model(folder / "model", model | {"num_hidden_layers": 2})
    tiny.write_corpus(folder / "docs.jsonl", documents)
    config = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": 20,
            "max_sequences": sequences,
            "splits": {"train": 0.5, "valid": 0.5},
            "exclude": {"special": True, "first": 1},
        },
        "exemplars": {"k": 6, "kinds": [*KINDS, "quantile"], "samples_per_quantile": 1},
        "statistics": {"sampled_tokens": 50, "tokens": {"neurons": 4, "count": 5, "min_count": 1}},
        "run": {"batch_size": BATCH, "progress": False} | run,
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config, output, *arguments):
    """The command; gives the store."""
    main(["--config", str(config), "--output", str(output), *map(str, arguments)])
    return jaxplain.open_store(output)


def after_steps(monkeypatch, count, act):
    """Do something after so many steps of a run, and count all of them in the list that this gives."""
    steps = []

    def counting(*arguments, **options):
        step, weights = make_step(*arguments, **options)

        def counted(*inputs):
            found = step(*inputs)
            steps.append(1)
            if len(steps) == count:
                act()
            return found

        return counted, weights

    monkeypatch.setattr("jaxplain.extract.make_step", counting)
    return steps


def terminate():
    """What a cluster does before it takes a machine back."""
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise Crash


def interrupted(monkeypatch, config, output, *arguments, steps, act, raised):
    """Run until something happens after so many steps; gives what was raised."""
    with monkeypatch.context() as patch:
        after_steps(patch, steps, act)
        with pytest.raises(raised) as caught:
            run(config, output, *arguments)
    return caught.value


def files_of(output):
    """The contents of all of a store's files but its root's attributes, by their names."""
    root = output / "exemplars.zarr"
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path != root / "zarr.json"
    }


def assert_same_bits(output, other):
    """The stores' files are the same, and so are the roots but for where and how the runs ran."""
    ours, theirs = files_of(output), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    roots = []
    for folder in (output, other):
        attributes = json.loads((folder / "exemplars.zarr" / "zarr.json").read_text())["attributes"]
        for name in ("run", "output"):
            attributes["config"].pop(name)
        attributes.pop("seconds", None)
        roots.append(attributes)
    assert roots[0] == roots[1]
    assert roots[0]["complete"] is True


def assert_same_answer(store, other):
    """The same sequences but where scores are next to equal; the same numbers but for the last digits."""
    for split in SPLITS:
        for layer in range(len(store[split].layers)):
            for kind in (*KINDS, "quantile_sample"):
                names = [f"{kind}/{name}" for name in ("sequence", "score", "activation")]
                ours, theirs = (s[split].layer_arrays(layer, *names) for s in (store, other))
                same = ours[0] == theirs[0]
                assert same.mean() > 0.98
                np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(ours[2][same], theirs[2][same], rtol=2e-3, atol=2e-3)
            names = ["stats/count", "stats/mean", "stats/variance", "stats/skewness", "stats/kurtosis"]
            names += ["stats/fraction_active", "stats/quantile"]
            for name, mine, its in zip(
                names, *(s[split].layer_arrays(layer, *names) for s in (store, other)), strict=True
            ):
                np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-5, err_msg=name)
        for sign in ("max", "min"):
            ours, theirs = (
                s[split]._array(f"token_table/{sign}/mean").read().result() for s in (store, other)
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def assert_nothing_left(output):
    """A run that ended well leaves its store alone."""
    assert [path.name for path in output.iterdir()] == ["exemplars.zarr"]
    assert not list(output.rglob("*.__lock"))
