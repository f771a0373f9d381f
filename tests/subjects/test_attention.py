"""Attention against that of jax.nn, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.subjects import attention
from jaxplain.subjects.attention import attend, causal_attention


def draw(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_causal_attention_is_that_of_jax(window, key_heads):
    arrays = draw((2, 9, 6, 8), (2, 9, key_heads, 8), (2, 9, key_heads, 8))
    local = None if window is None else (window - 1, 0)

    def ours(*arrays):
        return causal_attention(*arrays, window)

    def theirs(*arrays):
        return jax.nn.dot_product_attention(*arrays, is_causal=True, local_window_size=local)

    found, back = jax.vjp(ours, *arrays)
    expected, back_expected = jax.vjp(theirs, *arrays)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (gradient,) = draw(found.shape)
    for one, other in zip(back(gradient), back_expected(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_bfloat16_stays_near_float32():
    arrays = draw((2, 40, 6, 8), (2, 40, 2, 8), (2, 40, 2, 8), dtype="bfloat16")
    found = causal_attention(*arrays, None)
    exact = causal_attention(*(array.astype(jnp.float32) for array in arrays), None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("strength", [1, 300])
def test_a_prefix_counts_as_if_its_slots_were_the_row_s_own(strength):
    query, keys, values, prefix_keys, prefix_values = draw(
        (3, 4, 6, 8), (3, 2, 8, 5), (3, 2, 5, 8), (1, 2, 8, 7), (1, 2, 7, 8)
    )
    prefix_keys *= strength  # beside the highest of these logits, exp() of all others is 0
    rng = np.random.default_rng(1)
    seen, prefix_seen = (jnp.asarray(rng.random((3, 4, slots)) < 0.6) for slots in (5, 7))
    seen = seen.at[:, :, 0].set(True)
    found = attend(query, keys, values, seen, (prefix_keys, prefix_values), prefix_seen)
    expected = attend(
        query,
        jnp.concatenate([jnp.broadcast_to(prefix_keys, (3, 2, 8, 7)), keys], axis=3),
        jnp.concatenate([jnp.broadcast_to(prefix_values, (3, 2, 7, 8)), values], axis=2),
        jnp.concatenate([prefix_seen, seen], axis=2),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("logits_at_once", [1, 500])
def test_blocks_of_queries_give_what_all_of_them_give(monkeypatch, logits_at_once):
    query, keys, values, prefix_keys, prefix_values = draw(
        (3, 7, 6, 8), (3, 2, 8, 5), (3, 2, 5, 8), (1, 2, 8, 7), (1, 2, 7, 8)
    )
    rng = np.random.default_rng(1)
    seen, prefix_seen = (jnp.asarray(rng.random((3, 7, slots)) < 0.6) for slots in (5, 7))

    def both(query, keys, values):
        with_prefix = attend(query, keys, values, seen, (prefix_keys, prefix_values), prefix_seen)
        return with_prefix, attend(query, keys, values, seen[:1], scale=0.2, softcap=3.0)

    whole, back_whole = jax.vjp(both, query, keys, values)
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", logits_at_once)
    assert "while" in jax.jit(both).lower(query, keys, values).as_text()
    found, back = jax.vjp(both, query, keys, values)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    for one, other in zip(back(found), back_whole(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_position_that_attends_to_nothing_is_finite():
    query, keys, values = draw((1, 2, 2, 8), (1, 2, 8, 3), (1, 2, 3, 8))
    assert jnp.isfinite(attend(query, keys, values, jnp.zeros((1, 2, 3), bool))).all()
