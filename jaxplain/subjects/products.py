"""Matrix products of the decoder: factors in the weights' dtype, sums in float32, also in the gradients.

Accelerators sum in float32 anyway. XLA's CPU backend multiplies bfloat16 fast only where that is said, and
where the factor on the left has its summed axis last; JAX's own gradients do neither.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FLOAT32 = jnp.dtype("float32")


@jax.custom_vjp
def project(x_BTX: Float[Array, "B T X"], w_XY: Float[Array, "X Y"]) -> Float[Array, "B T Y"]:
    """Every position times a matrix, in the dtype of `x_BTX`; differentiable in reverse mode."""
    return _product("BTX,XY->BTY", x_BTX, w_XY).astype(x_BTX.dtype)


def project_heads(x_BTD: Float[Array, "B T D"], w_DHC: Float[Array, "D H C"]) -> Float[Array, "B T H C"]:
    """Every position times the matrices of several heads."""
    flat_BTX = project(x_BTD, w_DHC.reshape((w_DHC.shape[0], -1)))
    return flat_BTX.reshape((*x_BTD.shape[:2], *w_DHC.shape[1:]))


def merge_heads(x_BTHC: Float[Array, "B T H C"], w_HCD: Float[Array, "H C D"]) -> Float[Array, "B T D"]:
    """The sum over heads of every position times the head's matrix."""
    return project(x_BTHC.reshape((*x_BTHC.shape[:2], -1)), w_HCD.reshape((-1, w_HCD.shape[-1])))


def _project_forward(x_BTX: Array, w_XY: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(x_BTX, w_XY), (x_BTX, w_XY)


def _project_backward(factors: tuple[Array, Array], gradient_BTY: Array) -> tuple[Array, Array]:
    x_BTX, w_XY = factors
    dx_BTX = _product("BTY,XY->BTX", gradient_BTY, w_XY)
    # Written as the transposition of three axes, which XLA does not fold into the product.
    x_XN = x_BTX.transpose(2, 0, 1).reshape((x_BTX.shape[2], -1))
    dw_XY = _product("XN,NY->XY", x_XN, gradient_BTY.reshape((-1, gradient_BTY.shape[-1])))
    return dx_BTX.astype(x_BTX.dtype), dw_XY.astype(w_XY.dtype)


def _product(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, preferred_element_type=_FLOAT32)


project.defvjp(_project_forward, _project_backward)
