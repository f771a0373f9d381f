"""Runs that cannot fit are refused before they begin."""

import json

import jax
import pytest

from jaxplain.errors import JaxplainError
from jaxplain.extract import main
from jaxplain.planning import refusal
from jaxplain.planning.memory import memory
from jaxplain.planning.refusal import device_memory, require_memory
from tests import tiny
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import demand


def require(asked, mesh):
    require_memory(asked.config, asked.selection, mesh)


def needed(asked, model):
    batch = asked.config.run.batch_size
    return memory(asked, data=8 // model, model=model, batch=batch, tiled=False).total


def test_what_fits_is_not_refused(monkeypatch):
    asked = demand()
    monkeypatch.setattr(refusal, "device_memory", lambda: needed(asked, 2))
    require(asked, make_mesh(4, 2))
    with pytest.raises(JaxplainError):
        require(asked, make_mesh(8, 1))
    require(demand(run={"check_memory": False}), make_mesh(8, 1))
    monkeypatch.setattr(refusal, "device_memory", lambda: needed(asked, 2) - 1)
    with pytest.raises(JaxplainError):
        require(asked, make_mesh(4, 2))
    monkeypatch.setattr(refusal, "device_memory", lambda: None)
    require(asked, make_mesh(8, 1))


def test_a_mesh_that_would_fit_is_named(monkeypatch):
    asked = demand(exemplars={"k": 300})
    monkeypatch.setattr(refusal, "device_memory", lambda: 400 * 2**20)
    assert needed(asked, 1) > 400 * 2**20 > needed(asked, 2)
    with pytest.raises(JaxplainError) as error:
        require(asked, make_mesh(8, 1))
    assert str(error.value) == (
        "each device would hold 0.01 GiB of weights, 0.45 GiB of exemplars and statistics and about 0.30 GiB "
        "besides, and has 0.39 GiB; run.mesh data 4 x model 2 and run.batch_size 256 should fit (or "
        "run.check_memory false, to try all the same)."
    )


def test_a_batch_that_would_fit_is_named(monkeypatch):
    asked = demand(run={"batch_size": 1024})
    fitting = needed(demand(run={"batch_size": 512}), 1)
    monkeypatch.setattr(refusal, "device_memory", lambda: fitting)
    with pytest.raises(JaxplainError, match=r"has 0\.\d\d GiB; run\.batch_size 512 should fit \(or"):
        require(asked, make_mesh(8, 1))


def test_runs_over_some_layers_are_named_where_no_mesh_fits(monkeypatch):
    asked = demand(exemplars={"k": 300})
    monkeypatch.setattr(refusal, "device_memory", lambda: 70 * 2**20)
    with pytest.raises(
        JaxplainError, match=r"take the layers in 3 runs, such as neurons.layers 0:1 and 1:2, each"
    ):
        require(asked, make_mesh(4, 2))


def test_extract_refuses_before_it_reads_weights(tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tiny.write_corpus(tmp_path / "docs.jsonl", 9)
    source = json.dumps([{"dataset": "json", "data_files": str(tmp_path / "docs.jsonl")}])
    monkeypatch.setattr(refusal, "device_memory", lambda: 2**20)
    flags = [
        "--subject.id",
        str(tmp_path / "model"),
        "--corpus.sources",
        source,
        "--corpus.sequence_length",
        "16",
    ]
    with pytest.raises(JaxplainError, match=r"^each device would hold .* and has 0\.00 GiB; "):
        main([*flags, "--output", str(tmp_path / "run")])


def test_too_large_steps_still_end_in_a_sentence(tmp_path, monkeypatch):
    """Where nothing is known of the memory, the devices say that it is too little."""
    tiny.write_model(tmp_path / "model")
    tiny.write_corpus(tmp_path / "docs.jsonl", 30)
    source = json.dumps([{"dataset": "json", "data_files": str(tmp_path / "docs.jsonl")}])
    monkeypatch.setattr(refusal, "device_memory", lambda: None)
    flags = ["--subject.id", str(tmp_path / "model"), "--corpus.sources", source, "--run.progress", "false"]
    flags += ["--corpus.sequence_length", "16"]
    with pytest.raises(JaxplainError, match=r"too little memory for exemplars\.k 1000000000, "):
        main([*flags, "--exemplars.k", "1000000000", "--output", str(tmp_path / "run")])


def test_memory_of_a_device():
    """CPU devices share the host's memory."""
    with open("/proc/meminfo") as file:
        host = int(file.readline().split()[1]) * 1024
    assert device_memory() == pytest.approx(host / jax.local_device_count(), rel=0.01)


def test_memory_of_an_accelerator(monkeypatch):
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 5}

    monkeypatch.setattr(refusal.jax, "local_devices", lambda: [Device()])
    assert device_memory() == 5
