"""A layer of experts (Shazeer et al., 2017): a router has a few of them read each token, a shared one all.

All experts are computed at every token, and those that a token is not routed to have no weight: as many
products as a dense layer of all their neurons. What it buys is that shapes are the same for every batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.mlp import ACTIVATIONS, sow_activations
from jaxplain.subjects.parameters import random_parameter
from jaxplain.subjects.products import merge_heads, project, project_heads


class Routed(NamedTuple):
    """What a layer of experts sows.

    `acts_BTF` holds the neurons of one expert after those of another, the shared one's last; they are 0 at
    tokens that are not routed to the expert. `routed_BTE` says which expert reads which tokens.
    """

    acts_BTF: Float[Array, "B T F"]
    routed_BTE: Bool[Array, "B T E"]


class Mixture(nnx.Module):
    """Gated experts, whose hidden units are the neurons, and perhaps one that every token passes."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, e, i, j = arch.width, arch.experts, arch.expert_neurons, arch.shared_neurons
        self.per_token, self.sums_to_one = arch.experts_per_token, arch.routing_sums_to_one
        self.activation, self.has_shared = arch.activation, j > 0
        self.router_DE = random_parameter(rngs, dtype, d, e, fan_in=d)
        self.gate_DEI = random_parameter(rngs, dtype, d, e, i, fan_in=d)
        self.up_DEI = random_parameter(rngs, dtype, d, e, i, fan_in=d)
        self.down_EID = random_parameter(rngs, dtype, e, i, d, fan_in=i)
        if self.has_shared:
            self.shared_router_D = random_parameter(rngs, dtype, d, fan_in=d)
            self.shared_gate_DJ = random_parameter(rngs, dtype, d, j, fan_in=d)
            self.shared_up_DJ = random_parameter(rngs, dtype, d, j, fan_in=d)
            self.shared_down_JD = random_parameter(rngs, dtype, j, d, fan_in=j)

    @property
    def widths(self) -> tuple[int, ...]:
        """The neurons of each expert, the shared one last."""
        experts, neurons, _ = self.down_EID.shape
        shared = (self.shared_down_JD.shape[0],) if self.has_shared else ()
        return (neurons,) * experts + shared

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Compute and sow the neurons, and project those of each token's experts down."""
        activation = ACTIVATIONS[self.activation]
        logits_BTE = project(x_BTD, self.router_DE[...])
        weight_BTE, routed_BTE = route(logits_BTE, self.per_token, sums_to_one=self.sums_to_one)
        gate_BTEI = activation(project_heads(x_BTD, self.gate_DEI[...]))
        # Not by the weights alone: 0 times what overflowed is no number.
        acts_BTEI = jnp.where(routed_BTE[..., None], gate_BTEI * project_heads(x_BTD, self.up_DEI[...]), 0)
        out_BTD = merge_heads(acts_BTEI * weight_BTE[..., None].astype(acts_BTEI.dtype), self.down_EID[...])
        acts_BTF = acts_BTEI.reshape((*x_BTD.shape[:2], -1))
        if self.has_shared:
            gate_BTJ = activation(project(x_BTD, self.shared_gate_DJ[...]))
            acts_BTJ = gate_BTJ * project(x_BTD, self.shared_up_DJ[...])
            share_BT1 = jax.nn.sigmoid(project(x_BTD, self.shared_router_D[...][:, None]))
            out_BTD += share_BT1 * project(acts_BTJ, self.shared_down_JD[...])
            acts_BTF = jnp.concatenate([acts_BTF, acts_BTJ], axis=2)
            routed_BTE = jnp.pad(routed_BTE, ((0, 0), (0, 0), (0, 1)), constant_values=True)
        sow_activations(self, Routed(acts_BTF, routed_BTE))
        return out_BTD


def route(
    logits_BTE: Float[Array, "B T E"], per_token: int, *, sums_to_one: bool
) -> tuple[Float[Array, "B T E"], Bool[Array, "B T E"]]:
    """The experts' weights, float32, and which experts read which tokens: the likeliest of each token.

    Others have no weight. Of equals the expert with the lower number is chosen.
    """
    chance_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    # Not by lax.top_k, for which XLA would gather the batch from all data shards.
    chosen_BTK = jnp.argsort(-chance_BTE, axis=-1, stable=True)[..., :per_token]
    routed_BTE = jax.nn.one_hot(chosen_BTK, chance_BTE.shape[-1], dtype=jnp.bool_).any(axis=2)
    weight_BTE = jnp.where(routed_BTE, chance_BTE, 0)
    if sums_to_one:
        weight_BTE /= weight_BTE.sum(axis=-1, keepdims=True)
    return weight_BTE, routed_BTE
