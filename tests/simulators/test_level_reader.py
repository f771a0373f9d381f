"""Levels read with shared prompts are those of one plain pass over prompt and sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.mesh import make_mesh
from jaxplain.simulators.level_reader import Asked, LevelReader
from jaxplain.subjects.subject import open_subject
from tests import tiny

IDS = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), tiny.VARIANTS["llama-biases"])


def load(folder, mesh):
    return open_subject(SubjectConfig(id=str(folder))).load(mesh, with_head=True)


def mesh_of(data, model, batch_size=8):
    return make_mesh(MeshConfig(data=data, model=model), batch_size=batch_size, mlp_width=48)


def draw(rng, length):
    return rng.integers(4, 380, length).astype(np.int32)


def jobs():
    """Prompts of different lengths, with one to five sequences each."""
    rng = np.random.default_rng(0)
    return [
        Asked(n, draw(rng, 3 + n).tolist(), [draw(rng, int(rng.integers(1, 20))) for _ in range(1 + n % 5)])
        for n in range(11)
    ]


def plain(decoder):
    """A pass over one sequence of up to 64 tokens, compiled once."""
    return jax.jit(lambda tokens_BT: decoder.logits(tokens_BT)[0])


def plainly(logits, asked, shared=()):
    """The same, without caches: one pass for each sequence."""
    found = []
    for sequence in asked.sequences:
        tokens = [*shared, *asked.prompt, *sequence]
        padded = jnp.array([tokens + [0] * (64 - len(tokens))], jnp.int32)
        logits_TV = np.asarray(logits(padded), np.float64)[len(tokens) - len(sequence) : len(tokens)]
        chosen = np.exp(logits_TV[:, IDS] - logits_TV[:, IDS].max(1, keepdims=True))
        found.append(chosen / chosen.sum(1, keepdims=True))
    return found


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("shared", [[], [7, 8, 9, 10, 11]], ids=["apart", "shared"])
def test_levels_equal_those_of_a_plain_pass(folder, data, model, shared):
    decoder = load(folder, mesh_of(data, model))
    reader = LevelReader(decoder, mesh_of(data, model), IDS, batch_size=8, shared=shared)
    logits = plain(load(folder, mesh_of(8, 1)))
    asked = jobs()
    found = dict(reader.read(iter(asked)))
    assert sorted(found) == [one.job for one in asked]
    for one in asked:
        assert [len(values) for values in found[one.job]] == [len(s) for s in one.sequences]
        for values, expected in zip(found[one.job], plainly(logits, one, shared), strict=True):
            np.testing.assert_allclose(values, expected, atol=2e-5)


def test_a_prompt_with_more_sequences_than_a_batch_holds(folder):
    rng = np.random.default_rng(1)
    asked = Asked("many", draw(rng, 5).tolist(), [draw(rng, 6) for _ in range(19)])
    decoder = load(folder, mesh_of(8, 1))
    ((job, found),) = LevelReader(decoder, mesh_of(8, 1), IDS, batch_size=8).read(iter([asked]))
    assert job == "many"
    np.testing.assert_allclose(np.stack(found), np.stack(plainly(plain(decoder), asked)), atol=2e-5)


def test_many_jobs_are_read_as_they_come(folder):
    """No more jobs are taken than are read together."""
    taken = []

    def asked():
        rng = np.random.default_rng(2)
        for number in range(1000):
            taken.append(number)
            yield Asked(number, draw(rng, 4).tolist(), [draw(rng, 5)])

    reader = LevelReader(load(folder, mesh_of(8, 1)), mesh_of(8, 1), IDS, batch_size=8)
    next(reader.read(asked()))
    assert len(taken) == 64


def test_what_is_too_long_is_refused(folder):
    reader = LevelReader(load(folder, mesh_of(8, 1)), mesh_of(8, 1), IDS, batch_size=8, shared=[5] * 10)
    asked = Asked(0, [6] * 30, [np.full(25, 7, np.int32)])
    with pytest.raises(JaxplainError, match="have 65 tokens, more than the 64"):
        list(reader.read(iter([asked])))


def test_the_unembedding_of_chosen_tokens_is_theirs(folder):
    decoder = load(folder, mesh_of(8, 1))
    tokens = jnp.arange(10, 30, dtype=jnp.int32).reshape(2, 10)
    x_BTD = decoder(tokens)
    np.testing.assert_allclose(
        decoder.unembed(x_BTD, IDS), jax.device_get(decoder.unembed(x_BTD))[..., IDS], atol=1e-5
    )
