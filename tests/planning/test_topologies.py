"""Steps compiled for TPUs that are not there, by libtpu's compiler."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.topologies import get_topology_desc

from jaxplain.errors import JaxplainError
from jaxplain.mesh import mesh_over
from jaxplain.plan import main
from jaxplain.planning.flops import flops_per_sequence
from jaxplain.planning.memory import memory
from jaxplain.planning.topologies import TooLargeError, compile_for_topology
from tests import tiny
from tests.planning.demands import ARCH, demand

pytestmark = pytest.mark.libtpu

WIDE = dataclasses.replace(ARCH, width=512, neurons=4096, layers=2)


def asked(arch=WIDE, **blocks):
    return demand(arch, **{"subject": {"dtype": "bfloat16"}, "exemplars": {"k": 32}} | blocks)


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4)])
def test_a_step_talks_over_model_alone(data, model):
    found = compile_for_topology(asked(), "v5e:2x4", data=data, model=model, batch=64)
    assert found.collectives["data"] == {}
    assert bool(found.collectives["model"]) == (model > 1)


def test_memory_is_about_as_predicted():
    found = compile_for_topology(asked(), "v5e:2x4", data=4, model=2, batch=128)
    predicted = memory(asked(), data=4, model=2, batch=128, tiled=True)
    assert predicted.weights + predicted.state == pytest.approx(found.arguments + found.unread, rel=0.05)
    assert found.unread == 4096 * 512 * 2 // 2
    assert 0.3 < predicted.temporaries / found.temporaries < 4
    assert found.outputs < 0.01 * found.arguments


def test_programs_that_jax_cannot_read_are_said_so(monkeypatch):
    def as_text(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    with pytest.raises(JaxplainError, match=r"^jax \S+ cannot read the programs of libtpu \S+; install the"):
        compile_for_topology(asked(), "v5e:2x4", data=8, model=1, batch=64)


def test_spread_weights_are_gathered_a_layer_or_two_at_a_time():
    """Were all gathered first, temporaries would hold all twelve layers."""
    arch = dataclasses.replace(ARCH, width=1024, neurons=4096, layers=12)
    spread = asked(arch, exemplars={"k": 8}, run={"shard_weights": True}, neurons={"layers": [11]})
    found = compile_for_topology(spread, "v5e:2x4", data=8, model=1, batch=64)
    layer = 2 * (3 * 1024 * 4096 + 2 * 1024 * 256 + 2 * 1024 * 64)
    assert found.temporaries < 3 * layer
    assert found.collectives["data"].keys() == {"all-gather"}
    assert found.arguments < 4 * layer


def test_work_of_a_device_falls_with_their_number():
    flops = [
        compile_for_topology(asked(), topology, data=devices, model=1, batch=128).flops
        for topology, devices in (("v5e:2x2", 4), ("v5e:4x4", 16))
    ]
    assert flops[0] == pytest.approx(4 * flops[1], rel=0.05)
    assert flops[0] == pytest.approx(32 * flops_per_sequence(asked()), rel=0.1)


def test_slices_lie_along_data():
    devices = get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    mesh = mesh_over(devices, 4, 2)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_axes_may_split_those_of_the_torus():
    found = compile_for_topology(asked(), "v5p:4x4x4", data=8, model=8, batch=64)
    assert found.collectives["data"] == {}


def test_what_does_not_fit_is_said():
    with pytest.raises(TooLargeError) as error:
        compile_for_topology(asked(exemplars={"k": 20000}), "v5e:2x2", data=4, model=1, batch=64)
    assert error.value.used > error.value.limit > 15 * 2**30


def test_unknown_topologies_are_refused():
    with pytest.raises(JaxplainError, match=r"^--topology is 'v5e:3x5', for which libtpu does not compile: "):
        compile_for_topology(asked(), "v5e:3x5", data=15, model=1, batch=15)


def test_the_command_compiles(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    config = {
        "subject": {"id": str(tmp_path)},
        "corpus": {"sources": [{"preset": "fineweb"}], "sequence_length": 32},
        "output": "out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(tmp_path / "run.yaml"), "--topology", "v5e:2x2", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["compiled"]["collectives"]["data"] == {}
    assert (plan["compiled"]["data"], plan["compiled"]["batch"]) == (4, 32)
    assert plan["largest_batch_compiled"] >= 32
    main(["--config", str(tmp_path / "run.yaml"), "--topology", "v5e:2x2"])
    text = capsys.readouterr().out
    assert "collectives in a step: none over model, none over data" in text
    assert "(libtpu " in text
