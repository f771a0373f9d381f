"""The decoder's products, forwards and backwards, against numpy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.subjects.products import merge_heads, project, project_heads

SHAPES = {project: (5,), project_heads: (3, 4)}


def draw(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("product", SHAPES)
def test_products_and_gradients_are_numpy_s(product, dtype, tolerance):
    x, w = draw(dtype, 2, 7, 6), draw(dtype, 6, *SHAPES[product], seed=1)
    found, back = jax.vjp(product, x, w)
    assert found.dtype == dtype
    axes = "BTD,D...->BT..."
    np.testing.assert_allclose(wide(found), np.einsum(axes, wide(x), wide(w)), rtol=tolerance, atol=tolerance)
    gradient = draw(dtype, *found.shape, seed=2)
    dx, dw = back(gradient)
    assert (dx.dtype, dw.dtype) == (dtype, dtype)
    flat, g, weights = wide(x).reshape(14, 6), wide(gradient).reshape(14, -1), wide(w).reshape(6, -1)
    np.testing.assert_allclose(wide(dx).reshape(14, 6), g @ weights.T, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(wide(dw).reshape(6, -1), flat.T @ g, rtol=tolerance, atol=tolerance)


def test_heads_are_summed():
    x, w = draw("float32", 2, 7, 3, 4), draw("float32", 3, 4, 6, seed=1)
    np.testing.assert_allclose(
        wide(merge_heads(x, w)), np.einsum("BTHC,HCD->BTD", wide(x), wide(w)), atol=1e-5
    )


def test_bfloat16_is_summed_in_float32():
    """A thousand terms, of which a running bfloat16 sum would lose most."""
    x, w = jnp.full((1, 1, 1024), 1.0, jnp.bfloat16), jnp.full((1024, 1), 1.0, jnp.bfloat16)
    assert float(project(x, w)[0, 0, 0]) == 1024
    rows = jnp.full((1, 1024, 1), 1.0, jnp.bfloat16)
    _, back = jax.vjp(project, rows, jnp.ones((1, 1), jnp.bfloat16))
    assert float(back(jnp.ones((1, 1024, 1), jnp.bfloat16))[1][0, 0]) == 1024
