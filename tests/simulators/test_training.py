"""Steps of training: the same on every mesh and however a batch is cut; what is trained, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.finetuning import LoraConfig, TrainingConfig
from jaxplain.errors import JaxplainError
from jaxplain.mesh import make_mesh
from jaxplain.simulators.pairs import Batch
from jaxplain.simulators.parts import READOUT, parameters_of
from jaxplain.simulators.training import Trainer, learning_rate
from jaxplain.subjects.subject import open_subject
from tests import tiny

IDS = np.arange(11, dtype=np.int32)
ROWS, TOGETHER, PROMPT, TOKENS, STEPS = 16, 2, 6, 14, 4
# Two layers, so that programs are compiled sooner.
UNTIED, TIED = (tiny.VARIANTS[name] | {"num_hidden_layers": 2} for name in ("llama-biases", "llama-mqa-tied"))
PARTS = ["full", "last_layers", "lora"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": tiny.write_model(folder / "untied", UNTIED),
        "tied": tiny.write_model(folder / "tied", TIED),
    }


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        shape = (ROWS, TOGETHER, TOKENS)
        levels = rng.integers(0, 11, shape).astype(np.int32)
        levels[rng.random(shape) < 0.2] = -1
        prompts = rng.integers(0, 380, (ROWS, PROMPT)).astype(np.int32)
        prompts[::3, 4:] = -1
        yield Batch(
            prompts_EP=prompts,
            tokens_EST=rng.integers(0, 380, shape).astype(np.int32),
            levels_EST=levels,
        )


def config(**fields):
    given = {"steps": 20, "batch_size": ROWS, "learning_rate": 3e-3, "warmup": 2, "compute_dtype": "float32"}
    given |= {"last_layers": 1, "lora": LoraConfig(rank=4), "reset_readout": False, "readout_rate": 1.0}
    return TrainingConfig(**given | fields)


def trainer(folder, data=8, model=1, **fields):
    mesh = make_mesh(MeshConfig(data=data, model=model), batch_size=ROWS, mlp_width=48)
    decoder = open_subject(SubjectConfig(id=str(folder))).load(mesh, with_head=True)
    return Trainer(decoder, config(**fields), IDS, mesh)


def run(made, steps=STEPS):
    """The loss of each step, and the state after the last."""
    state, losses = made.start(), []
    (batch,) = batches(1)
    for _ in range(steps):
        state, metrics = made.step(state, batch)
        losses.append(float(metrics.loss))
    return losses, state


def level_logits(decoder, batch):
    """Logits of the levels at the sequences' tokens, by one plain pass over each."""
    rows = np.zeros((ROWS, TOGETHER, PROMPT + TOKENS), np.int32)
    lengths = (batch.prompts_EP >= 0).sum(1)
    for e, length in enumerate(lengths):
        rows[e, :, :length] = batch.prompts_EP[e, :length]
        rows[e, :, length : length + TOKENS] = batch.tokens_EST[e]
    x_BTD = decoder(jnp.asarray(rows.reshape((-1, rows.shape[-1]))))
    logits = np.asarray(decoder.unembed(x_BTD, IDS), np.float64).reshape((*rows.shape, 11))
    return np.stack([logits[e, :, length : length + TOKENS] for e, length in enumerate(lengths)])


def by_hand(decoder, batch):
    """Mean cross-entropy, in float64."""
    logits = level_logits(decoder, batch)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = map(tuple, np.argwhere(batch.levels_EST >= 0))
    return -np.mean([log_probabilities[place][batch.levels_EST[place]] for place in places])


@pytest.mark.parametrize("parts", PARTS)
def test_every_mesh_gives_one_loss_curve(folders, parts):
    curves = [run(trainer(folders["untied"], *mesh, parts=parts))[0] for mesh in [(8, 1), (2, 4), (1, 8)]]
    assert curves[0][-1] < curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-5)


@pytest.mark.parametrize("fields", [{"accumulate": 2}, {"remat": False}])
def test_neither_accumulation_nor_remat_changes_the_result(folders, fields):
    losses, state = run(trainer(folders["untied"], parts="full", remat=True))
    again, other = run(trainer(folders["untied"], parts="full", **{"remat": True} | fields))
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    for name, value in state.trained.items():
        np.testing.assert_allclose(other.trained[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_first_loss_is_that_of_the_model_as_it_was(folders, kind, parts):
    made = trainer(folders[kind], parts=parts)
    mesh = make_mesh(MeshConfig(data=8, model=1), batch_size=ROWS, mlp_width=48)
    decoder = open_subject(SubjectConfig(id=str(folders[kind]))).load(mesh, with_head=True)
    (batch,) = batches(1)
    _, metrics = made.step(made.start(), batch)
    assert float(metrics.loss) == pytest.approx(by_hand(decoder, batch), rel=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("parts", PARTS)
def test_only_what_is_trained_changes(folders, kind, parts):
    made = trainer(folders[kind], parts=parts)
    _, before = parameters_of(made.decoder(made.start()))
    _, state = run(made)
    _, after = parameters_of(made.decoder(state))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    unembedding = "embedding_VD" if kind == "tied" else "head.unembedding_DV"
    assert unembedding in changed
    others = changed - {unembedding}
    match parts:
        case "full":
            assert changed == set(before)
        case "last_layers":
            assert others == {n for n in before if n.startswith(("layers.1.", "head.norm"))}
        case "lora":
            assert others == {
                n for n in before if n.startswith("layers.") and "norm" not in n and "bias" not in n
            }
    if parts != "full":
        axis = 0 if kind == "tied" else 1
        rows = np.any(np.asarray(before[unembedding] != after[unembedding]), axis=1 - axis)
        assert np.flatnonzero(rows).tolist() == IDS.tolist()


def test_states_are_spread_over_the_whole_mesh(folders):
    made = trainer(folders["untied"], data=2, model=4, parts="full")
    state = made.start()
    spread = {
        name: value.size / value.addressable_shards[0].data.size for name, value in state.trained.items()
    }
    assert spread["layers.0.mlp.gate_DF"] == 8
    assert spread["layers.1.attention.query_DHC"] == 8
    assert spread["embedding_VD"] == 8
    (batch,) = batches(1)
    after, _ = made.step(state, batch)
    for name, value in after.trained.items():
        assert value.size / value.addressable_shards[0].data.size == spread[name], name
    for leaf in jax.tree.leaves(after.optimiser):
        assert leaf.ndim == 0 or leaf.size / leaf.addressable_shards[0].data.size == max(
            1, leaf.size / leaf.addressable_shards[0].data.size
        )


def test_evaluation_is_the_mean_over_tokens(folders):
    made = trainer(folders["tied"], parts="lora")
    state = made.start()
    given = list(batches(3))
    empty = given[0]._replace(levels_EST=np.full_like(given[0].levels_EST, -1))
    found = made.evaluate(state, [*given, empty])
    decoder = made.decoder(state)
    counts = [(batch.levels_EST >= 0).sum() for batch in given]
    losses = [by_hand(decoder, batch) for batch in given]
    assert found.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    logits = np.concatenate([level_logits(decoder, batch) for batch in given])
    levels = np.concatenate([batch.levels_EST for batch in given])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected, real = (probabilities @ np.arange(11))[levels >= 0], levels[levels >= 0]
    assert found.correlation == pytest.approx(np.corrcoef(expected, real)[0, 1], abs=1e-4)
    share = np.bincount(real, minlength=11) / len(real)
    assert found.constant_loss == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)


def test_bfloat16_arithmetic_keeps_float32_weights(folders):
    made = trainer(folders["untied"], parts="full", compute_dtype="bfloat16")
    losses, state = run(made)
    exact, _ = run(trainer(folders["untied"], parts="full"))
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert losses != exact
    assert {str(value.dtype) for value in state.trained.values()} == {"float32"}


def test_the_gradient_is_clipped(folders):
    free, tight = (trainer(folders["untied"], parts="full", clip=clip) for clip in (1e6, 1e-6))
    (batch,) = batches(1)
    _, loose = free.step(free.start(), batch)
    _, clipped = tight.step(tight.start(), batch)
    assert float(loose.gradient_norm) == pytest.approx(float(clipped.gradient_norm), rel=1e-6)
    assert float(loose.gradient_norm) > 0.1


def test_the_rate_rises_and_falls_to_a_tenth():
    rate = learning_rate(config(steps=100, warmup=10, learning_rate=1.0))
    values = [float(rate(step)) for step in range(101)]
    assert 0 < values[0] < 0.1
    assert np.argmax(values) == 10
    assert values[10] == 1.0
    assert values[100] == pytest.approx(0.1)
    assert all(np.diff(values[:11]) > 0)
    assert all(np.diff(values[10:]) < 0)


def test_more_layers_than_there_are_cannot_be_trained(folders):
    with pytest.raises(JaxplainError, match="last_layers is 9, but the model has 2 layers"):
        trainer(folders["tied"], parts="last_layers", last_layers=9)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(JaxplainError, match=r"training\.lora\.rank is 0; give 1 or more"):
        LoraConfig(rank=0)


@pytest.mark.parametrize("parts", PARTS)
def test_the_readout_starts_at_zero_and_nothing_else_moves_at_first(folders, parts):
    """Without a readout there is no gradient to anything below it."""
    made = trainer(folders["tied"], parts=parts, reset_readout=True, weight_decay=0.0)
    losses, state = run(made, steps=1)
    assert losses[0] == pytest.approx(np.log(11), rel=1e-6)
    before = made.start().trained
    changed = {name for name in before if not np.array_equal(before[name], state.trained[name])}
    assert changed == {READOUT}


def test_the_readout_has_a_rate_of_its_own(folders):
    rows = {}
    for rate in (1.0, 10.0):
        _, state = run(trainer(folders["tied"], reset_readout=True, weight_decay=0.0, readout_rate=rate), 1)
        rows[rate] = np.asarray(state.trained[READOUT])
    np.testing.assert_allclose(rows[10.0], 10 * rows[1.0], rtol=1e-5)
    assert np.abs(rows[1.0]).max() == pytest.approx(3e-3 / 3, rel=0.01)  # Adam's first step, in the warm-up


def test_the_readout_s_rows_may_start_as_they_were(folders):
    made = trainer(folders["tied"], parts="lora")
    _, parameters = parameters_of(made.decoder(made.start()))
    np.testing.assert_array_equal(made.start().trained[READOUT], np.asarray(parameters["embedding_VD"])[IDS])
