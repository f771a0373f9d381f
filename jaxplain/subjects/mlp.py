"""The feed-forward layer, whose hidden units are the neurons, and the site at which they are sown."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.parameters import random_parameter
from jaxplain.subjects.products import project

MLP_ACTIVATION = "mlp_activation"
"""The site whose features are neurons: the input of the down projection, [B, T, F] or `mixture.Routed`."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Sown(nnx.Variable[Any]):
    """What a layer's activations are folded into while they pass; read it with `nnx.capture`.

    Captured without an initial value it collects the activations themselves in a tuple. With one,
    the value's own `fold(activations)` decides, and only its result leaves the layer.
    """


def sow_activations(layer: nnx.Module, activations: Any) -> None:
    """Sow a layer's activations, if someone captures them."""
    if hasattr(layer, "__captures__"):  # Flax warns of a sow that `nnx.capture` does not surround
        layer.sow(Sown, MLP_ACTIVATION, activations, reduce_fn=_fold, init_fn=tuple)


def _fold(accumulator: Any, activations: Any) -> Any:
    if hasattr(accumulator, "fold"):
        return accumulator.fold(activations)
    return (*accumulator, activations)


class MLP(nnx.Module):
    """A feed-forward layer, gated (Shazeer, 2020) or plain. Its hidden units are the neurons."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, f = arch.width, arch.neurons
        self.gated, self.has_bias = arch.gated, arch.mlp_bias
        self.activation = arch.activation
        if self.gated:
            self.gate_DF = random_parameter(rngs, dtype, d, f, fan_in=d)
        self.up_DF = random_parameter(rngs, dtype, d, f, fan_in=d)
        self.down_FD = random_parameter(rngs, dtype, f, d, fan_in=f)
        if self.has_bias:
            if self.gated:
                self.gate_bias_F = nnx.Param(jnp.zeros(f, dtype))
            self.up_bias_F = nnx.Param(jnp.zeros(f, dtype))
            self.down_bias_D = nnx.Param(jnp.zeros(d, dtype))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Compute and sow the neurons, and project them down."""
        activation = ACTIVATIONS[self.activation]
        up_BTF = project(x_BTD, self.up_DF[...])
        if self.has_bias:
            up_BTF += self.up_bias_F[...][None, None]
        if self.gated:
            gate_BTF = project(x_BTD, self.gate_DF[...])
            if self.has_bias:
                gate_BTF += self.gate_bias_F[...][None, None]
            acts_BTF = activation(gate_BTF) * up_BTF
        else:
            acts_BTF = activation(up_BTF)
        sow_activations(self, acts_BTF)
        out_BTD = project(acts_BTF, self.down_FD[...])
        return out_BTD + self.down_bias_D[...][None, None] if self.has_bias else out_BTD
