"""Which of a model's parameters are trained, and how the model is put together from those and the rest.

Parameters are dictionaries from dotted names, such as `layers.3.mlp.gate_DF`, to arrays.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxplain.configs.finetuning import TrainingConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition, spread_over_data

Parameters = dict[str, Array]

READOUT = "readout_LD"
"""The unembedding's rows for the levels."""

_DOWN, _UP = "lora_down", "lora_up"
_INPUT_AXES = {"output_HCD": 2, "down_FD": 1, "down_EID": 2}
"""How many leading axes are those of a matrix's input; 1 for those not named."""


def parameters_of(decoder: Decoder) -> tuple[nnx.GraphDef[Decoder], Parameters]:
    """The decoder's structure, and its parameters by name."""
    graph, state = nnx.split(decoder)
    return graph, {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}


def decoder_of(graph: nnx.GraphDef[Decoder], parameters: Mapping[str, Array]) -> Decoder:
    """The decoder with these parameters."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split(".")), nnx.Param(value))
        for name, value in parameters.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def divide(
    parameters: Parameters, config: TrainingConfig, arch: Architecture, level_ids: Int[np.ndarray, "L"]
) -> tuple[Parameters, Parameters]:
    """The parameters to train, and those that stay.

    Raises JaxplainError where more layers are to be trained than there are.
    """
    if config.parts == "full":
        trained = dict(parameters)
    elif config.parts == "lora":
        trained = _low_rank(parameters, config)
    else:
        if config.last_layers > arch.layers:
            raise JaxplainError(
                f"training.last_layers is {config.last_layers}, but the model has {arch.layers} layers."
            )
        kept = {f"layers.{number}" for number in range(arch.layers - config.last_layers, arch.layers)}
        trained = {
            name: value
            for name, value in parameters.items()
            if name.startswith("head.norm.") or ".".join(name.split(".")[:2]) in kept
        }
    rows_LD = unembedding_rows(parameters, level_ids)
    trained[READOUT] = rows_LD if config.reset_readout is False else jnp.zeros_like(rows_LD)
    return trained, {name: value for name, value in parameters.items() if name not in trained}


def assemble(
    trained: Mapping[str, Array],
    frozen: Mapping[str, Array],
    config: TrainingConfig,
    level_ids: Int[np.ndarray, "L"],
    dtype: jnp.dtype,
) -> Parameters:
    """The model's parameters in a dtype, with what was trained in its place.

    Make the logits from the readout's rows themselves. Where they are tied to the embedding, they stand for
    their tokens in the input as well; unless everything is trained they get no gradient from there, which
    would have every layer differentiated for next to nothing.
    """
    whole = dict(frozen)
    for name, value in trained.items():
        if name.endswith(_UP):
            continue
        if name.endswith(_DOWN):
            target = name.removesuffix(f".{_DOWN}")
            update = value @ trained[f"{target}.{_UP}"] * (config.lora.alpha / config.lora.rank)
            whole[target] = frozen[target] + update.reshape(frozen[target].shape)
        elif name != READOUT:
            whole[name] = value
    whole = {name: value.astype(dtype) for name, value in whole.items()}
    name, axis = _unembedding(whole)
    rows = trained[READOUT] if config.parts == "full" else jax.lax.stop_gradient(trained[READOUT])
    rows = rows.astype(dtype)
    whole[name] = (
        whole[name].at[level_ids].set(rows) if axis == 0 else whole[name].at[:, level_ids].set(rows.T)
    )
    return whole


def unembedding_rows(parameters: Mapping[str, Array], ids: Int[np.ndarray, "L"]) -> Float[Array, "L D"]:
    """What the residual stream is multiplied with for some tokens' logits."""
    name, axis = _unembedding(parameters)
    return parameters[name][ids] if axis == 0 else parameters[name][:, ids].T


def fully_sharded(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """A parameter's place in training: over `model` as always, and over `data` along another axis."""
    small = name.endswith((_DOWN, _UP)) or name == READOUT
    spec = P() if small else partition(name, shape, mesh)
    return NamedSharding(mesh, spread_over_data(spec, shape, mesh))


def decays(name: str, value: Array) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return value.ndim > 1 and "bias" not in name and "norm" not in name


def _low_rank(parameters: Parameters, config: TrainingConfig) -> Parameters:
    """Updates of rank r for every matrix of the layers, zero at first."""
    trained: Parameters = {}
    for number, (name, value) in enumerate(sorted(parameters.items())):
        if not name.startswith("layers.") or not decays(name, value):
            continue
        axes = _INPUT_AXES.get(name.rsplit(".", 1)[1], 1)
        width_in = int(np.prod(value.shape[:axes]))
        key = jax.random.fold_in(jax.random.key(0), number)
        down = jax.random.normal(key, (width_in, config.lora.rank)) * width_in**-0.5
        trained[f"{name}.{_DOWN}"] = down
        trained[f"{name}.{_UP}"] = jnp.zeros((config.lora.rank, value.size // width_in))
    return trained


def _unembedding(parameters: Mapping[str, Array]) -> tuple[str, Literal[0, 1]]:
    """The parameter that makes logits, and its vocabulary axis."""
    return ("head.unembedding_DV", 1) if "head.unembedding_DV" in parameters else ("embedding_VD", 0)
