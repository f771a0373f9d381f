"""The decoder against golden activations and logits of the reference, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.subjects.mixture import Routed
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.subject import open_subject
from tests import tiny
from tests.subjects import reference


def make_mesh(data=1, model=1):
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * model],
    )


def sown_activations(folder, tokens_BT, mesh, dtype="float32"):
    """Activations of every layer [L, B, T, F], and logits, by our decoder; NaN as in the reference."""
    subject = open_subject(SubjectConfig(id=str(folder), dtype=dtype))
    model = subject.load(mesh, with_head=True)
    graph, weights = nnx.split(model)

    @jax.jit
    def forward(weights, tokens_BT):
        logits, sown = nnx.capture(nnx.merge(graph, weights).logits, Sown)(tokens_BT)
        layers = range(subject.arch.layers)
        return logits, [sown["layers"][i]["mlp"][MLP_ACTIVATION].get_value()[0] for i in layers]

    logits, acts = forward(weights, jnp.asarray(tokens_BT, jnp.int32))
    found = [
        with_gaps(a, subject.arch.expert_widths(layer))
        if isinstance(a, Routed)
        else np.asarray(a, np.float32)
        for layer, a in enumerate(acts)
    ]
    return reference.stacked(found), np.asarray(logits, np.float32)


def with_gaps(sown, widths):
    """Neurons of experts, NaN where the expert does not read the token."""
    routed_BTF = np.repeat(np.asarray(sown.routed_BTE), widths, axis=2)
    return np.where(routed_BTF, np.asarray(sown.acts_BTF, np.float32), np.nan)


def assert_close_in_every_layer(found_LBTF, expected_LBTF, largest_L=None, tolerance=1e-4):
    """Within a share of the layer's largest absolute activation; NaN where the other is."""
    if largest_L is None:
        largest_L = np.nanmax(np.abs(expected_LBTF), (1, 2, 3))
    np.testing.assert_array_equal(np.isnan(found_LBTF), np.isnan(expected_LBTF))
    errors_L = np.nanmax(np.abs(found_LBTF - expected_LBTF), (1, 2, 3)) / largest_L
    assert (errors_L < tolerance).all(), errors_L


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_equals_the_reference(variant, tmp_path):
    golden = np.load(reference.GOLDEN / f"{variant}.npz")
    folder = tiny.write_model(tmp_path, tiny.VARIANTS[variant])
    acts, logits = sown_activations(folder, reference.tokens_of(variant), make_mesh())
    assert_close_in_every_layer(acts, golden["acts"])
    np.testing.assert_allclose(logits[:, -3:], golden["logits"], atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (8, 1)])
def test_equals_the_reference_on_a_mesh(shape, tmp_path):
    """Four query heads divide by 4 but not by 8, and two key/value heads by neither."""
    golden = np.load(reference.GOLDEN / "llama-gqa.npz")
    folder = tiny.write_model(tmp_path, tiny.VARIANTS["llama-gqa"])
    acts, _ = sown_activations(folder, reference.TOKENS_BT, make_mesh(*shape))
    assert_close_in_every_layer(acts, golden["acts"])


def test_bfloat16_is_near(tmp_path):
    golden = np.load(reference.GOLDEN / "llama-gqa.npz")
    folder = tiny.write_model(tmp_path, tiny.VARIANTS["llama-gqa"])
    acts, _ = sown_activations(folder, reference.TOKENS_BT, make_mesh(), dtype="bfloat16")
    assert_close_in_every_layer(acts, golden["acts"], tolerance=0.1)


@pytest.mark.packaged
def test_packaged_smollm2_equals_the_reference():
    from jaxplain.subjects.packaged import packaged_folder

    golden = np.load(reference.GOLDEN / "smollm2-135m-instruct.npz")
    folder = packaged_folder("smollm2-135m-instruct")
    acts, _ = sown_activations(folder, golden["tokens"], make_mesh())
    assert_close_in_every_layer(acts[..., reference.SMOLLM2_NEURONS], golden["acts"], golden["largest"])


@pytest.mark.parity
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_equals_live_torch(variant, tmp_path):
    folder = tiny.write_model(tmp_path, tiny.VARIANTS[variant], seed=11)
    expected, expected_logits = reference.torch_activations(folder, reference.TOKENS_BT)
    acts, logits = sown_activations(folder, reference.TOKENS_BT, make_mesh())
    assert_close_in_every_layer(acts, expected)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("text", "double"),
    [
        (
            "The lighthouse keeper wrote every day for 31 years, though nobody read a line of it. In "
            "spring he listed the birds; in autumn, the wrecks. What he left is the best record we "
            "have of that coast: storms, prices, births, quarrels over nets and one eclipse.",
            False,
        ),
        # While this text's second token turns into an attention sink, rounding errors grow a
        # thousandfold: torch's float32 strays 1.6e-4 from its own float64, which is the reference here.
        (
            "Seven hundred years later, the monastery's bells (all 12 of them) still rang at dawn.",
            True,
        ),
    ],
)
def test_packaged_smollm2_equals_live_torch(text, double):
    from transformers import AutoTokenizer

    from jaxplain.subjects.packaged import packaged_folder

    folder = packaged_folder("smollm2-135m-instruct")
    tokens_BT = np.array([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    expected, _ = reference.torch_activations(folder, tokens_BT, double=double)
    acts, _ = sown_activations(folder, tokens_BT, make_mesh())
    assert_close_in_every_layer(acts, expected)
