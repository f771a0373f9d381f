"""Runs that cannot fit are refused before they begin."""

import json

import jax
import pytest

from jaxplain.errors import JaxplainError
from jaxplain.extract import main
from jaxplain.planning import refusal
from jaxplain.planning.memory import state_bytes, weight_bytes
from jaxplain.planning.refusal import device_memory, require_memory
from tests import tiny
from tests.exemplars.test_reduction import make_mesh
from tests.planning.demands import demand


def require(asked, mesh):
    require_memory(asked.config, asked.selection, mesh)


def certain(asked, model):
    weights = weight_bytes(asked, data=8 // model, model=model, tiled=False)
    return weights + state_bytes(asked, model=model, tiled=False)


def test_what_fits_is_not_refused(monkeypatch):
    asked = demand()
    monkeypatch.setattr(refusal, "device_memory", lambda: certain(asked, 2))
    require(asked, make_mesh(4, 2))
    with pytest.raises(JaxplainError):
        require(asked, make_mesh(8, 1))
    monkeypatch.setattr(refusal, "device_memory", lambda: None)
    require(asked, make_mesh(8, 1))


def test_a_mesh_that_would_fit_is_named(monkeypatch):
    asked = demand(exemplars={"k": 300})
    monkeypatch.setattr(refusal, "device_memory", lambda: 250 * 2**20)
    assert certain(asked, 1) > 250 * 2**20 > certain(asked, 2)
    with pytest.raises(JaxplainError) as error:
        require(asked, make_mesh(8, 1))
    assert str(error.value) == (
        "each device would hold 0.01 GiB of weights and 0.45 GiB of exemplars and statistics, and has "
        "0.24 GiB; run.mesh data 2 x model 4 and run.batch_size 256 should fit."
    )


def test_runs_over_some_layers_are_named_where_no_mesh_fits(monkeypatch):
    asked = demand(exemplars={"k": 300})
    monkeypatch.setattr(refusal, "device_memory", lambda: 45 * 2**20)
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
