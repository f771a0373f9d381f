"""A Hugging Face folder's safetensors, or a GGUF file, straight into a decoder's sharded parameters.

Tensors are read one by one, and of each only the slices that this process holds, so host memory
peaks at one tensor above the model itself.
"""

import contextlib
import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
from jaxplain.subjects.gguf import gguf_tensors, is_gguf, open_gguf
from jaxplain.subjects.layouts import axes_of, read_parameter, source_shape

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_MODEL_AXES = "FHKVEIJ"
"""Parameter axes of which the first that divides by the mesh's `model` axis is spread over it."""


def load_decoder(
    folder: Path,
    family: Family,
    arch: Architecture,
    *,
    mesh: Mesh,
    dtype: jnp.dtype,
    depth: int | None = None,
    with_head: bool = False,
    over_data: bool = False,
) -> Decoder:
    """The decoder with the weights of a folder or GGUF file, of its first `depth` layers only if given.

    Weights lie as `partition` says, with `over_data` spread over the mesh's axis `data` too.

    Raises JaxplainError where a parameter has no tensor, a tensor no parameter, or a shape differs.
    """
    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=dtype, depth=depth, with_head=with_head)
    )
    abstract = nnx.state(model)

    def place(target: str) -> jax.ShapeDtypeStruct:
        shape, name = parameters[target].shape, target.rsplit(".", 1)[-1]
        spec = partition(name, shape, mesh)
        spec = spread_over_data(spec, shape, mesh) if over_data else spec
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    parameters = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(abstract)}
    with _open_checkpoint(folder, family) as checkpoint:
        plan = _match(checkpoint, family, arch, parameters)
        loaded = {
            target: _load(checkpoint, weights, arch, place(target), dtype) for target, weights in plan.items()
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


def spread_over_data(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """A place on the mesh, and along the longest free axis that divides by it on `data` too."""
    axes: list[str | None] = [*spec, *[None] * (len(shape) - len(spec))]
    size = mesh.shape["data"]
    free = [axis for axis in range(len(shape)) if axes[axis] is None and shape[axis] % size == 0]
    if free and size > 1:
        axes[max(free, key=lambda axis: shape[axis])] = "data"
    return P(*axes)


class _Checkpoint(dict[str, Any]):
    """Tensor name, as the family has it, to what can be sliced, over all files of a folder."""


@contextlib.contextmanager
def _open_checkpoint(folder: Path, family: Family) -> Iterator[_Checkpoint]:
    if is_gguf(folder):
        yield _Checkpoint(gguf_tensors(open_gguf(folder)))
        return
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
                raise _missing_weights(path)
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise JaxplainError(
                    f"{path} is not a readable safetensors file ({error}); fetch it again."
                ) from error
            names = handle.keys()
            checkpoint.update({_current_name(name, family): handle.get_slice(name) for name in names})
        yield checkpoint


def _missing_weights(path: Path) -> JaxplainError:
    """What to say where there is no safetensors file: weights may be there in a form that is not read."""
    pickles = sorted(file.name for file in path.parent.iterdir() if file.suffix in PICKLE_SUFFIXES)
    others = sorted(file.name for file in path.parent.iterdir() if is_gguf(file))
    if pickles:
        return JaxplainError(pickle_refusal(f"{path.parent / pickles[0]}"))
    if others:
        return JaxplainError(
            f"{path} does not exist; name the GGUF file itself, {path.parent / others[0]}, to read that."
        )
    return JaxplainError(
        f"{path} does not exist; the subject needs its weights as safetensors, and a model of the Hugging "
        "Face hub that has only pickled weights (.bin) must be converted, or read at a revision that has "
        "safetensors."
    )


def pickle_refusal(what: str) -> str:
    """Why pickled weights are not read, and what to do about it."""
    return (
        f"{what} is pickled, and reading a pickle can run any code that is in it, so it is refused; convert "
        "the weights to safetensors once, in an environment with torch and where you trust them: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
    )


def _current_name(name: str, family: Family) -> str:
    for pattern, replacement in family.older_names:
        name = re.sub(pattern, replacement, name)
    return name


def _match(
    checkpoint: _Checkpoint, family: Family, arch: Architecture, parameters: dict[str, Any]
) -> dict[str, list[Weight]]:
    """Which tensor, or one for each expert, fills which parameter, with every name accounted for."""
    other = [weight for weight in _spelt_out(family.other_weights, arch) if weight.source in checkpoint]
    replaced = {weight.target for weight in other}
    known = other + [weight for weight in weights_of(family, arch) if weight.target not in replaced]
    sources = {weight.source for weight in known}
    for name in checkpoint:
        ignored = any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored_tensors)
        if name not in sources and not ignored:
            raise JaxplainError(
                f"the checkpoint holds a tensor {name} that the model has no place for; "
                "its config.json does not describe these weights."
            )
    by_target: dict[str, list[Weight]] = {}
    for weight in known:
        by_target.setdefault(weight.target, []).append(weight)
    for target in parameters:
        if target not in by_target:
            raise ValueError(f"no tensor of the family's checkpoints holds the parameter {target}")
        for weight in by_target[target]:
            if weight.source not in checkpoint:
                raise JaxplainError(
                    f"the checkpoint lacks the tensor {weight.source}; "
                    "its config.json does not describe these weights, or a file is missing."
                )
    # What is left belongs to layers or a head that this decoder was built without, or is a tied
    # unembedding. Biases that the config denies are refused, since they would change the result, and so are
    # experts in a layer that should have none.
    built = {_layer_of(target) for target in parameters}
    for weight in known:
        unused = weight.source in checkpoint and weight.target not in parameters
        if unused and weight.target.startswith("layers.") and _layer_of(weight.target) in built:
            raise JaxplainError(
                f"the checkpoint holds a tensor {weight.source} that the model has no place "
                "for; its config.json does not describe these weights."
            )
    return {target: by_target[target] for target in parameters}


def _layer_of(target: str) -> str:
    """`layers` and the number, of a parameter of a layer."""
    return ".".join(target.split(".")[:2])


def weights_of(family: Family, arch: Architecture) -> Iterator[Weight]:
    """The family's table of tensors for an architecture, with an entry for each layer and expert."""
    return _spelt_out(family.weights, arch)


def _spelt_out(table: Iterable[Weight], arch: Architecture) -> Iterator[Weight]:
    for weight in table:
        if weight.when is not None and getattr(arch, weight.when[0]) != weight.when[1]:
            continue
        experts = range(arch.experts) if "{expert}" in weight.source else [None]
        for layer in range(arch.layers) if "{layer}" in weight.target else [0]:
            for expert in experts:
                yield dataclasses.replace(
                    weight,
                    source=weight.source.format(layer=layer, expert=expert),
                    target=weight.target.format(layer=layer),
                    expert=expert,
                )


def _load(
    checkpoint: _Checkpoint,
    weights: Sequence[Weight],
    arch: Architecture,
    place: jax.ShapeDtypeStruct,
    dtype: jnp.dtype,
) -> jax.Array:
    """A parameter from its tensor, or from the tensors of its experts in their order."""
    for weight in weights:
        expected, found = source_shape(weight, arch), tuple(checkpoint[weight.source].get_shape())
        if found != expected:
            raise JaxplainError(
                f"the checkpoint's tensor {weight.source} has shape {found} where the config asks for "
                f"{expected}; its config.json does not describe these weights."
            )

    def read_tensor(weight: Weight, index: Sequence[slice]) -> np.ndarray:
        return read_parameter(checkpoint[weight.source], weight, arch, index).astype(dtype)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        if weights[0].expert is None:
            return read_tensor(weights[0], index)
        axis = axes_of(weights[0]).index("E")
        others = [*index[:axis], *index[axis + 1 :]]
        return np.stack([read_tensor(weight, others) for weight in weights[index[axis]]], axis)

    assert place.sharding is not None
    return jax.make_array_from_callback(place.shape, place.sharding, read)
