"""Weights that are spread over data shards too: less on every device, and the same store."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.subjects.loading import spread_over_data
from jaxplain.subjects.subject import open_subject
from tests import families, tiny
from tests.exemplars.test_reduction import make_mesh
from tests.running import runs


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (P(None, "model"), (32, 48), P("data", "model")),
        (P(None, "model"), (33, 48), P(None, "model")),
        (P("model", None, None), (8, 4, 16), P("model", None, "data")),
        (P("model", None, None), (8, 16, 4), P("model", "data", None)),
        (P(), (12,), P("data")),
        (P(), (7,), P(None)),
    ],
)
def test_the_longest_free_axis_that_divides_is_spread(spec, shape, expected):
    assert spread_over_data(spec, shape, make_mesh(4, 2)) == expected


def test_a_mesh_without_data_shards_spreads_nothing():
    assert spread_over_data(P(None, "model"), (32, 48), make_mesh(1, 8)) == P(None, "model")


def test_every_device_holds_a_share(tmp_path):
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "model"))))
    mesh = make_mesh(4, 2)

    def on_one_device(over_data):
        model = subject.load(mesh, over_data=over_data)
        leaves = jax.tree.leaves(nnx.state(model))
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves), leaves

    (whole, one), (spread, other) = on_one_device(False), on_one_device(True)
    assert spread < 0.27 * whole
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_the_store_is_the_same(tmp_path):
    config = runs.write_config(tmp_path)
    mesh = ("--run.mesh.data", 4, "--run.mesh.model", 2)
    usual = runs.run(config, tmp_path / "usual", *mesh)
    spread = runs.run(config, tmp_path / "spread", *mesh, "--run.shard_weights", "true")
    assert spread.config["run"]["shard_weights"] is True
    assert "shard_weights" not in usual.config["run"]
    runs.assert_same_answer(spread, usual)


def test_experts_may_be_spread_too(tmp_path):
    model = families.QWEN2_MOE | {"mlp_only_layers": [0]}
    config = runs.write_config(tmp_path, model=model)
    mesh = ("--run.mesh.data", 4, "--run.mesh.model", 2)
    usual = runs.run(config, tmp_path / "usual", *mesh)
    spread = runs.run(config, tmp_path / "spread", *mesh, "--run.shard_weights", "true")
    runs.assert_same_answer(spread, usual)
