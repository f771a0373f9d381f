"""One step of extraction: a batch through the subject, every chosen layer folded as it passes."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from jaxplain.exemplars.reduction import Fold, LayerReduction, Rows
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown

Reductions = dict[int, LayerReduction]
Step = Callable[[Reductions, nnx.State, Rows, Mapping[int, Array]], Reductions]


def make_step(
    model: Decoder, mesh: Mesh, *, active_above: float = 0.0, gather: bool = False
) -> tuple[Step, nnx.State]:
    """The jitted step, and the model's weights to call it with.

    With `gather` the weights are spread over the mesh's axis `data` too, and every layer's are gathered
    when the layer before is computed (as in FSDP, Zhao et al., 2023).

    `step(reductions, weights, rows, neurons)` gives the reductions with the batch folded in and
    consumes (donates) those it was given. `neurons[layer]` are the indices to keep, where not all.
    """
    graph, weights = nnx.split(model)

    def step(
        reductions: Reductions,
        weights: nnx.State,
        rows: Rows,
        neurons: Mapping[int, Int[Array, "N"]],
    ) -> Reductions:
        folds = {
            layer: Fold(
                reduction=reduction,
                rows=rows,
                neurons=neurons.get(layer),
                active_above=active_above,
                mesh=mesh,
            )
            for layer, reduction in reductions.items()
        }
        initial = nnx.State(
            {"layers": {layer: {"mlp": {MLP_ACTIVATION: Sown(fold)}} for layer, fold in folds.items()}}
        )
        model = nnx.merge(graph, _gathered(weights, mesh) if gather else weights)
        forward = cast(Callable[..., Any], nnx.capture(model, Sown, init=initial))
        _, sown = forward(rows.tokens_BT.clip(0))
        return {
            layer: sown["layers"][layer]["mlp"][MLP_ACTIVATION].get_value().reduction for layer in reductions
        }

    return jax.jit(step, donate_argnums=0), weights


def _gathered(weights: nnx.State, mesh: Mesh) -> nnx.State:
    """The weights as every data shard needs them, whole along its own devices; when, the compiler decides."""

    def whole(name: str, value: Array) -> Array:
        place = NamedSharding(mesh, partition(name, value.shape, mesh))
        return lax.with_sharding_constraint(value, place)

    return nnx.from_flat_state(
        [
            (path, variable.replace(whole(str(path[-1]), variable.get_value())))
            for path, variable in nnx.to_flat_state(weights)
        ]
    )
