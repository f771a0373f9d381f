"""More rows in the embedding: what is in them, and where they lie."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.subjects.resizing import as_whole_model, grow_vocabulary
from jaxplain.subjects.subject import open_subject
from tests import tiny
from tests.subjects.test_decoder import make_mesh

WEIGHTS = tiny.tensors(tiny.LLAMA)
TABLES = {"embedding_VD": "model.embed_tokens.weight", "unembedding_DV": "lm_head.weight"}


def load(tmp_path, config=tiny.LLAMA, *, mesh=None, dtype="float32", **options):
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path, config)), dtype=dtype))
    return subject.load(mesh or make_mesh(), **{"with_head": True} | options)


def tables(decoder):
    """Embedding and unembedding, both with rows of tokens."""
    embedding = np.asarray(decoder.embedding_VD[...])
    return {"embedding_VD": embedding, "unembedding_DV": np.asarray(decoder.head.unembedding_DV[...]).T}


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("rows", [385, 392, 400])
def test_new_rows_are_copies_or_the_mean(shape, rows, tmp_path):
    """392 rows divide by 8 devices, 400 too, and 385 by none."""
    decoder = load(tmp_path, mesh=make_mesh(*shape))
    like = {384: 7, 380: 3}
    grown = grow_vocabulary(decoder, rows, like=like)
    assert grown.arch.vocabulary == rows
    for name, found in tables(grown).items():
        original = WEIGHTS[TABLES[name]]
        kept = [n for n in range(384) if n not in like]
        np.testing.assert_array_equal(found[kept], original[kept])
        for new, old in like.items():
            np.testing.assert_array_equal(found[new], original[old])
        others = np.broadcast_to(original.mean(0), (rows - 385, 32))
        np.testing.assert_allclose(found[385:], others, atol=1e-6)
    np.testing.assert_array_equal(tables(decoder)["embedding_VD"], WEIGHTS[TABLES["embedding_VD"]])


def test_parameters_keep_their_sharding_where_it_divides(tmp_path):
    decoder = load(tmp_path, mesh=make_mesh(2, 4))
    assert grow_vocabulary(decoder, 388, like={}).embedding_VD[...].addressable_shards[0].data.shape == (
        97,
        32,
    )
    grown = grow_vocabulary(decoder, 388, like={})
    assert grown.head.unembedding_DV[...].addressable_shards[0].data.shape == (32, 97)
    assert grow_vocabulary(decoder, 385, like={}).embedding_VD[...].sharding.is_fully_replicated


def test_everything_else_is_the_same_array(tmp_path):
    decoder = load(tmp_path)
    grown = grow_vocabulary(decoder, 400, like={})
    before, after = (dict(nnx.to_flat_state(nnx.state(model))) for model in (decoder, grown))
    assert before.keys() == after.keys()
    for path in before:
        if path[-1] not in TABLES:
            assert after[path].get_value() is before[path].get_value()


def test_tied_and_headless_decoders_grow_their_embedding(tmp_path):
    tied = load(tmp_path / "tied", tiny.VARIANTS["llama-mqa-tied"])
    logits = grow_vocabulary(tied, 386, like={384: 1, 385: 1}).logits(jnp.array([[5, 384]]))
    expected = tied.logits(jnp.array([[5, 1]]))
    np.testing.assert_allclose(logits[..., :384], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[..., 385], expected[..., 1], rtol=1e-5, atol=1e-5)
    headless = grow_vocabulary(load(tmp_path / "a", with_head=False, depth=2), 400, like={})
    assert headless.embedding_VD[...].shape == (400, 32)
    assert len(headless.layers) == 2
    assert headless.head is None


def test_the_first_layers_are_a_model_of_their_own(tmp_path):
    decoder = load(tmp_path, depth=2)
    tokens_BT = jnp.array([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="all layers"):
        decoder.logits(tokens_BT)
    whole = as_whole_model(decoder)
    assert whole.arch.layers == 2
    assert whole.embedding_VD[...] is decoder.embedding_VD[...]
    np.testing.assert_array_equal(whole(tokens_BT), decoder(tokens_BT))
    assert whole.logits(tokens_BT).shape == (1, 4, 384)
    assert decoder.arch.layers == 3


def test_the_mean_of_bfloat16_is_taken_in_float32(tmp_path):
    grown = grow_vocabulary(load(tmp_path, dtype="bfloat16"), 385, like={})
    rows = np.asarray(jnp.bfloat16(WEIGHTS[TABLES["embedding_VD"]]))
    expected = rows.astype(np.float32).mean(0).astype(rows.dtype)
    assert grown.embedding_VD[...].dtype == jnp.bfloat16
    np.testing.assert_allclose(grown.embedding_VD[...][-1].astype(float), expected.astype(float), rtol=2**-7)


def test_refuses_rows_that_there_are_not(tmp_path):
    decoder = load(tmp_path)
    with pytest.raises(ValueError, match="384 rows, which cannot grow to 383"):
        grow_vocabulary(decoder, 383, like={})
    with pytest.raises(ValueError, match="row 400 cannot be like row 1 "):
        grow_vocabulary(decoder, 400, like={400: 1})
    with pytest.raises(ValueError, match="row 384 cannot be like row 384 "):
        grow_vocabulary(decoder, 400, like={384: 384})
