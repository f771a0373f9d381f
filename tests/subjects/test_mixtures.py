"""Mixtures of experts: routing, both forms of checkpoints, where parameters lie, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects.mixture import Mixture, route
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.saving import save_decoder
from jaxplain.subjects.subject import open_subject
from tests import tiny
from tests.subjects import reference
from tests.subjects.test_decoder import assert_close_in_every_layer, make_mesh, sown_activations

MIXTURES = [name for name, config in tiny.VARIANTS.items() if "num_experts_per_tok" in config]


def opened(folder, config, **weights):
    return open_subject(SubjectConfig(id=str(tiny.write_model(folder, config, **weights))))


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_the_likeliest_experts_of_a_token_have_weights(sums_to_one):
    logits_BTE = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    weight_BTE, routed_BTE = route(jnp.asarray(logits_BTE), 3, sums_to_one=sums_to_one)
    for logits_E, weight_E, routed_E in zip(
        logits_BTE.reshape(-1, 7), weight_BTE.reshape(-1, 7), routed_BTE.reshape(-1, 7), strict=True
    ):
        best = sorted(range(7), key=lambda expert: -logits_E[expert])[:3]
        assert sorted(np.flatnonzero(routed_E)) == sorted(best)
        chance_E = np.exp(logits_E) / np.exp(logits_E).sum()
        expected_E = np.where(routed_E, chance_E, 0) / (chance_E[best].sum() if sums_to_one else 1)
        np.testing.assert_allclose(weight_E, expected_E, rtol=1e-5)


def test_of_equally_likely_experts_the_first_are_chosen():
    _, routed_BTE = route(jnp.zeros((1, 1, 5)), 2, sums_to_one=True)
    assert routed_BTE.tolist() == [[[True, True, False, False, False]]]


def test_what_overflows_in_experts_that_do_not_read_a_token_does_no_harm(tmp_path):
    arch = opened(tmp_path, tiny.VARIANTS["mixtral"]).arch
    layer = Mixture(arch, nnx.Rngs(0), jnp.dtype("float32"))
    layer.router_DE.set_value(jnp.zeros_like(layer.router_DE[...]).at[:, :2].set(1.0))
    layer.up_DEI.set_value(layer.up_DEI[...].at[:, 3].set(jnp.inf))
    out_BTD, sown = nnx.capture(layer, Sown)(jnp.ones((1, 4, arch.width)))
    acts_BTF, routed_BTE = sown[MLP_ACTIVATION].get_value()[0]
    assert routed_BTE[0, 0].tolist() == [True, True, False, False]
    assert np.isfinite(out_BTD).all()
    assert (np.asarray(acts_BTF[..., 48:]) == 0).all()
    assert (np.asarray(acts_BTF[..., :48]) != 0).all()


@pytest.mark.parametrize("variant", MIXTURES)
def test_layers_have_the_experts_that_the_config_says(variant, tmp_path):
    arch = opened(tmp_path, tiny.VARIANTS[variant]).arch
    expected = {
        "mixtral": [(24,) * 4] * 3,
        "mixtral-sliding-window": [(24,) * 4] * 3,
        "qwen2-moe": [(16, 16, 16, 16, 24)] * 3,
        "qwen2-moe-plain-layers": [(48,), (16, 16, 16, 16, 24), (48,)],
        "qwen3-moe": [(8,) * 6] * 3,
        "qwen3-moe-plain-layers": [(8,) * 6, (48,), (8,) * 6],
    }[variant]
    assert [arch.expert_widths(layer) for layer in range(3)] == expected
    routed = [widths.count(widths[0]) if len(widths) > 1 else 0 for widths in expected]
    assert [arch.routed_experts(layer) for layer in range(3)] == routed
    first = arch.with_first_layers(2)
    assert [first.expert_widths(layer) for layer in range(2)] == expected[:2]


def joined(weights):
    """A checkpoint as transformers holds it in memory: the experts of a layer in one tensor."""
    found, experts = {}, {}
    for name, value in weights.items():
        head, expert, rest = name.partition(".experts.")
        if not expert:
            found[name.replace(".block_sparse_moe.", ".mlp.")] = value
            continue
        number, matrix, _ = rest.split(".")
        kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(matrix, matrix)
        experts.setdefault(head.replace(".block_sparse_moe", ".mlp"), {})[kind, int(number)] = value
    for head, matrices in experts.items():
        count = 1 + max(number for _, number in matrices)

        def stacked(kind, matrices=matrices, count=count):
            return np.stack([matrices[kind, number] for number in range(count)])

        both = np.concatenate([stacked("gate_proj"), stacked("up_proj")], axis=1)
        found |= {f"{head}.experts.gate_up_proj": both, f"{head}.experts.down_proj": stacked("down_proj")}
    return found


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe", "qwen3-moe-plain-layers"])
def test_experts_in_one_tensor_are_read_as_well(variant, shape, tmp_path):
    golden = np.load(reference.GOLDEN / f"{variant}.npz")
    config = tiny.VARIANTS[variant]
    weights = joined(tiny.tensors(config))
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    assert not any(".experts.0." in name for name in weights)
    folder = tiny.write_model(tmp_path / "joined", config, weights=weights)
    tokens_BT = np.repeat(reference.tokens_of(variant), shape[0], axis=0)
    acts, logits = sown_activations(folder, tokens_BT, make_mesh(*shape))
    assert_close_in_every_layer(acts[:, :1], golden["acts"])
    np.testing.assert_allclose(logits[:1, -3:], golden["logits"], atol=1e-4 * np.abs(logits).max())
    # What is saved has the published form, and is the same model.
    subject = open_subject(SubjectConfig(id=str(folder)))
    save_decoder(subject.load(make_mesh(*shape), with_head=True), subject, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = tiny.tensors(config)
    assert saved.keys() == expected.keys()
    assert all(np.array_equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("config", "shape", "spread"),
    [
        # Experts, where they divide; else the neurons of each. What is shared, by its own neurons.
        ("mixtral", (1, 4), {"router_DE": (32, 1), "gate_DEI": (32, 1, 24), "down_EID": (1, 24, 32)}),
        ("mixtral", (1, 8), {"router_DE": (32, 4), "gate_DEI": (32, 4, 3), "down_EID": (4, 3, 32)}),
        ("qwen2-moe", (2, 4), {"shared_gate_DJ": (32, 6), "shared_down_JD": (6, 32), "up_DEI": (32, 1, 16)}),
    ],
)
def test_experts_are_spread_over_the_model_axis(config, shape, spread, tmp_path):
    state = nnx.state(opened(tmp_path, tiny.VARIANTS[config]).load(make_mesh(*shape)))
    for name, expected in spread.items():
        value = state["layers"][0]["mlp"][name].get_value()
        assert value.addressable_shards[0].data.shape == expected, name


def test_no_more_of_a_checkpoint_is_read_than_the_mesh_has_experts(tmp_path, monkeypatch):
    from jaxplain.subjects import loading

    read = []
    original = loading.read_parameter

    def recorded(tensor, weight, arch, index):
        found = original(tensor, weight, arch, index)
        read.append((weight.source, found.size))
        return found

    monkeypatch.setattr(loading, "read_parameter", recorded)
    opened(tmp_path, tiny.VARIANTS["mixtral"]).load(make_mesh(1, 4))
    experts = [size for source, size in read if ".experts." in source]
    assert sum(experts) == 3 * 4 * 3 * 24 * 32, "each expert once, on the device that has it"


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5 .* there are 4 experts"),
        ("qwen3-moe", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0 .* there are 6 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0 .* only 1 or more are"),
        (
            "qwen2-moe",
            {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size = 0 .* only 1",
        ),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 .* only 1 or more are"),
        ("qwen2-moe", {"layer_types": ["chunked_attention"] * 3}, "layer_types .* 'chunked_attention' is no"),
        ("qwen3-moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("mixtral", {"hidden_act": "tanh"}, "hidden_act = 'tanh' .* known are silu"),
        ("mixtral", {"router_bias": True}, "router_bias = True .* no known meaning"),
        ("qwen3-moe", {"n_group": 2}, "n_group = 2 .* no known meaning"),
        (
            "qwen3-moe",
            {"shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size = 8 .* no known",
        ),
        ("qwen2-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5 .* no known meaning"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_attributes_that_it_does_not_honour(variant, change, message, tmp_path):
    config = tiny.VARIANTS[variant]
    with pytest.raises(JaxplainError, match=rf"config attribute .*{message}"):
        opened(tmp_path, config | change, weights=tiny.tensors(config))


@pytest.mark.parametrize(
    ("variant", "tensor", "shape"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.4.w1.weight", (24, 32)),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.bias", (4,)),
        ("mixtral", "model.layers.1.mlp.shared_expert.up_proj.weight", (24, 32)),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", (4, 32, 24)),
        ("qwen2-moe", "model.layers.2.mlp.gate_proj.weight", (48, 32)),
        ("qwen2-moe-plain-layers", "model.layers.0.mlp.experts.0.up_proj.weight", (16, 32)),
        ("qwen2-moe-plain-layers", "model.layers.0.mlp.shared_expert_gate.weight", (1, 32)),
        ("qwen3-moe-plain-layers", "model.layers.1.mlp.experts.gate_up_proj", (6, 16, 32)),
        ("qwen3-moe", "model.layers.0.mlp.gate.e_score_correction_bias", (6,)),
    ],
)
def test_refuses_tensors_that_the_config_denies(variant, tensor, shape, tmp_path):
    config = tiny.VARIANTS[variant]
    weights = tiny.tensors(config) | {tensor: np.zeros(shape, np.float32)}
    subject = opened(tmp_path, config, weights=weights)
    with pytest.raises(JaxplainError, match=r"tensor model\.layers\.\S+ that the model has no place for"):
        subject.load(make_mesh())


@pytest.mark.parametrize(
    ("variant", "tensor"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert_gate.weight"),
        ("qwen2-moe-plain-layers", "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_refuses_a_checkpoint_without_a_tensor_or_with_another_shape(variant, tensor, tmp_path):
    config = tiny.VARIANTS[variant]
    weights = tiny.tensors(config)
    shape = weights[tensor].shape
    larger = weights | {tensor: np.zeros((shape[0] + 1, *shape[1:]), np.float32)}
    del weights[tensor]
    for folder, there, message in (("a", weights, "lacks the tensor"), ("b", larger, "has shape")):
        with pytest.raises(JaxplainError, match=f"{message}|{tensor} {message}"):
            opened(tmp_path / folder, config, weights=there).load(make_mesh())


@pytest.mark.parity
@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe-plain-layers", "qwen3-moe"])
def test_what_torch_saves_is_read(variant, original_format, tmp_path):
    folder = tiny.write_model(tmp_path / "source", tiny.VARIANTS[variant], seed=5)
    model = reference.torch_model(folder)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_format)
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert any(name.endswith(".experts.gate_up_proj") for name in names) != original_format
    tiny.write_tokenizer(tmp_path / "saved")
    expected, expected_logits = reference.torch_activations(folder, reference.TOKENS_BT)
    acts, logits = sown_activations(tmp_path / "saved", reference.TOKENS_BT, make_mesh())
    assert_close_in_every_layer(acts, expected)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4 * np.abs(logits).max())


def test_fewer_layers_of_a_model_with_plain_ones_are_saved_as_one(tmp_path):
    from jaxplain.subjects.resizing import as_whole_model

    folder = tmp_path / "source"
    subject = opened(folder, tiny.VARIANTS["qwen3-moe-plain-layers"])
    save_decoder(
        as_whole_model(subject.load(make_mesh(), depth=2, with_head=True)), subject, tmp_path / "saved"
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_hidden_layers"] == 2
    assert open_subject(SubjectConfig(id=str(tmp_path / "saved"))).arch.dense_layers == (False, True)
    found, _ = sown_activations(tmp_path / "saved", reference.TOKENS_BT, make_mesh())
    whole, _ = sown_activations(folder, reference.TOKENS_BT, make_mesh())
    np.testing.assert_array_equal(found, whole[:2])


def test_gradients_reach_the_router_and_the_experts(tmp_path):
    arch = opened(tmp_path, tiny.VARIANTS["qwen2-moe"]).arch
    layer = Mixture(arch, nnx.Rngs(0), jnp.dtype("float32"))
    graph, state = nnx.split(layer)
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, arch.width)), jnp.float32)
    gradients = jax.grad(lambda state: (nnx.merge(graph, state)(x_BTD) ** 2).sum())(state)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient.get_value()).max() > 0, path
