"""A Hugging Face folder's safetensors, straight into a decoder's sharded parameters.

Tensors are read one by one, and of each only the slices that this process holds, so host memory
peaks at one tensor above the model itself.
"""

import contextlib
import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from jaxplain.errors import JaxplainError
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import Family, Weight
from jaxplain.subjects.layouts import read_parameter, source_shape

_MODEL_AXES = "FHKV"
"""Parameter axes that are spread over the mesh's `model` axis, where they divide by it."""


def load_decoder(
    folder: Path,
    family: Family,
    arch: Architecture,
    *,
    mesh: Mesh,
    dtype: jnp.dtype,
    depth: int | None = None,
    with_head: bool = False,
) -> Decoder:
    """The decoder with the folder's weights, of its first `depth` layers only where that is given.

    Raises JaxplainError where a parameter has no tensor, a tensor no parameter, or a shape differs.
    """
    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=dtype, depth=depth, with_head=with_head)
    )
    abstract = nnx.state(model)
    parameters = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(abstract)}
    with _open_checkpoint(folder, family) as checkpoint:
        plan = _match(checkpoint, family, arch, parameters)
        loaded = {
            target: _load(checkpoint[weight.source], weight, arch, parameters[target].shape, mesh, dtype)
            for target, weight in plan.items()
        }
    for target, variable in parameters.items():
        variable.set_value(loaded[target])
    nnx.update(model, abstract)
    return model


def partition(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Where a parameter lies: by its axis letters, on `model` if it divides, else on every device."""
    letters = name.rsplit("_", 1)[1]
    size = mesh.shape["model"]
    spec: list[str | None] = [None] * len(letters)
    for axis, letter in enumerate(letters):
        if letter in _MODEL_AXES and shape[axis] % size == 0:
            spec[axis] = "model"
            break
    return P(*spec)


class _Checkpoint(dict[str, Any]):
    """Tensor name, as the family has it, to safetensors slice, over all files of a folder."""


@contextlib.contextmanager
def _open_checkpoint(folder: Path, family: Family) -> Iterator[_Checkpoint]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint()
        for file in files:
            path = folder / file
            if not path.exists():
                raise JaxplainError(f"{path} does not exist; the subject needs its weights as safetensors.")
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise JaxplainError(
                    f"{path} is not a readable safetensors file ({error}); fetch it again."
                ) from error
            names = handle.keys()
            checkpoint.update({_current_name(name, family): handle.get_slice(name) for name in names})
        yield checkpoint


def _current_name(name: str, family: Family) -> str:
    for pattern, replacement in family.older_names:
        name = re.sub(pattern, replacement, name)
    return name


def _match(
    checkpoint: _Checkpoint, family: Family, arch: Architecture, parameters: dict[str, Any]
) -> dict[str, Weight]:
    """Which tensor fills which parameter, with every name accounted for."""
    known = list(weights_of(family, arch))
    sources = {weight.source for weight in known}
    for name in checkpoint:
        ignored = any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored_tensors)
        if name not in sources and not ignored:
            raise JaxplainError(
                f"the checkpoint holds a tensor {name} that the model has no place for; "
                "its config.json does not describe these weights."
            )
    by_target = {weight.target: weight for weight in known}
    for target in parameters:
        if target not in by_target:
            raise ValueError(f"no tensor of the family's checkpoints holds the parameter {target}")
        if by_target[target].source not in checkpoint:
            raise JaxplainError(
                f"the checkpoint lacks the tensor {by_target[target].source}; "
                "its config.json does not describe these weights, or a file is missing."
            )
    # What is left belongs to layers or a head that this decoder was built without, or is a tied
    # unembedding. Biases that the config denies are refused, since they would change the result.
    for weight in known:
        unused = weight.source in checkpoint and weight.target not in parameters
        if unused and weight.target.startswith("layers."):
            layer = int(weight.target.split(".")[1])
            if f"layers.{layer}.mlp.down_FD" in parameters:
                raise JaxplainError(
                    f"the checkpoint holds a tensor {weight.source} that the model has no place "
                    "for; its config.json does not describe these weights."
                )
    return {target: by_target[target] for target in parameters}


def weights_of(family: Family, arch: Architecture) -> Iterator[Weight]:
    """The family's table of tensors for an architecture, with an entry for each layer."""
    for weight in family.weights:
        if weight.when is not None and getattr(arch, weight.when[0]) != weight.when[1]:
            continue
        for layer in range(arch.layers) if "{layer}" in weight.target else [0]:
            yield dataclasses.replace(
                weight,
                source=weight.source.format(layer=layer),
                target=weight.target.format(layer=layer),
            )


def _load(
    tensor: Any, weight: Weight, arch: Architecture, shape: tuple[int, ...], mesh: Mesh, dtype: jnp.dtype
) -> jax.Array:
    expected, found = source_shape(weight, arch), tuple(tensor.get_shape())
    if found != expected:
        raise JaxplainError(
            f"the checkpoint's tensor {weight.source} has shape {found} where the config asks for "
            f"{expected}; its config.json does not describe these weights."
        )

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        return read_parameter(tensor, weight, arch, index or ()).astype(dtype)

    name = weight.target.rsplit(".", 1)[-1]
    return jax.make_array_from_callback(shape, NamedSharding(mesh, partition(name, shape, mesh)), read)
