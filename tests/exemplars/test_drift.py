"""Float32 sums against float64 after a hundred million tokens, folded batch by batch as a run folds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.exemplars.moments import empty_moments, merge_moments, update_moments
from tests import oracle

BATCHES, BATCH, TOKENS = 64, 32, 96
CYCLES = -(-(10**8) // (BATCHES * BATCH * TOKENS))


def batches(kind):
    """Different batches, [K B T F], of three neurons each: far from 0, heavy-tailed, and rarely active."""
    rng = np.random.default_rng(0)
    shape = (BATCHES, BATCH, TOKENS)
    acts = np.stack(
        [
            3 + rng.standard_normal(shape),
            rng.standard_t(5, shape),
            np.maximum(rng.standard_normal(shape) - 2, 0),
        ],
        axis=-1,
    )
    if kind == "batches differ":
        acts *= 1 + 2 * rng.random((BATCHES, 1, 1, 1))
        acts += rng.standard_normal((BATCHES, 1, 1, 3))
    return acts.astype(np.float32)


@functools.partial(jax.jit, static_argnames="cycles")
def folded(acts_KBTF, counted_KBT, *, cycles):
    def body(i, moments):
        return update_moments(moments, acts_KBTF[i % BATCHES], counted_KBT[i % BATCHES, :, :, None])

    return jax.lax.fori_loop(0, cycles * BATCHES, body, empty_moments(neurons=3))


@pytest.mark.parametrize("kind", ["batches alike", "batches differ"])
def test_within_1e_4_of_float64_after_a_hundred_million_tokens(kind):
    acts_KBTF = batches(kind)
    counted_KBT = np.random.default_rng(1).random(acts_KBTF.shape[:3]) < 0.99
    assert CYCLES * acts_KBTF[..., 0].size >= 10**8
    moments = folded(jnp.asarray(acts_KBTF), jnp.asarray(counted_KBT), cycles=CYCLES)
    found = merge_moments(jax.tree.map(lambda x: x[None], moments))
    # The same batches over and over have the moments that they have once.
    count, mean, variance, skewness, kurtosis, active = oracle.statistics(
        acts_KBTF.reshape((-1, TOKENS, 3)), counted_KBT.reshape((-1, TOKENS))
    )
    np.testing.assert_array_equal(found.count_F, CYCLES * count)
    # A mean near 0 is a difference of what is much larger.
    assert (np.abs(found.mean_F - mean) <= 1e-4 * np.maximum(np.abs(mean), np.sqrt(variance))).all()
    np.testing.assert_allclose(found.variance_F, variance, rtol=1e-4)
    np.testing.assert_allclose(found.skewness_F, skewness, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.kurtosis_F, kurtosis, rtol=1e-4)
    np.testing.assert_allclose(found.fraction_active_F, active, rtol=1e-9)
