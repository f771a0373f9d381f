"""A decoder back into a Hugging Face folder: the inverse of `loading`.

Tensors are gathered and written one by one, so host memory peaks at about one tensor, whatever the mesh.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from jaxplain.errors import JaxplainError, first_line
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import Family, Weight
from jaxplain.subjects.layouts import axes_of, source_shape, write_parameter
from jaxplain.subjects.loading import weights_of
from jaxplain.subjects.subject import Subject, read_config

_Tensors = dict[str, list[tuple[Weight, jax.Array]]]
"""For each tensor's name the parameters that it holds, and how."""

_SAFETENSORS_TYPES = {"float32": "F32", "bfloat16": "BF16"}


def save_decoder(
    decoder: Decoder,
    subject: Subject,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_file_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a decoder of the subject's architecture as a folder that transformers and `open_subject` read.

    The config is the subject's, but for the numbers of layers and of the embedding's rows, and the dtype;
    the tokenizer is the subject's where none is given. Tensors beyond `max_file_bytes` go into further files.
    Until it is whole, the folder's name ends in `.partial`. Every process takes part; the first one writes.

    Raises JaxplainError where the folder exists (unless it holds a model and `overwrite` is set), cannot be
    written, or the tokenizer has ids without a row in the embedding.
    """
    arch = decoder.arch
    if decoder.head is None or len(decoder.layers) != arch.layers:
        raise ValueError("saving needs a decoder with all layers and with_head=True")
    resized = dataclasses.replace(subject.arch.with_first_layers(arch.layers), vocabulary=arch.vocabulary)
    if arch != resized:
        raise ValueError("the decoder's architecture is not the subject's")
    tokenizer = subject.tokenizer if tokenizer is None else tokenizer
    last_token = max(tokenizer.get_vocab().values())
    if last_token >= arch.vocabulary:
        raise JaxplainError(
            f"the tokenizer's last token is {last_token}, but the model to save has only "
            f"{arch.vocabulary} rows in its embedding; grow its vocabulary first."
        )
    folder = folder.expanduser().resolve()
    tensors = _tensors(decoder, subject.family)
    if jax.process_index() == 0:
        with _growing(folder, overwrite=overwrite) as partial:
            _write_config(subject, partial, {"vocabulary": arch.vocabulary, "layers": arch.layers}, dtype)
            _write_tokenizer(tokenizer, partial)
            _write_weights(tensors, arch, partial, dtype, max_file_bytes)
    else:
        for parts in tensors.values():
            for weight, array in parts:
                _on_host(_tensors_part(weight, array))
    multihost_utils.sync_global_devices(f"saved {folder}")


@contextlib.contextmanager
def _growing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder that is given its name when it is whole; what fails until then becomes one sentence."""
    partial, replaced = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "replaced"))
    try:
        if folder.exists() and not overwrite:
            raise JaxplainError(f"{folder} exists already; choose another folder, or have it overwritten.")
        if folder.exists() and not (folder / "config.json").exists():
            raise JaxplainError(
                f"{folder} is to be overwritten, but holds no model (no config.json); choose another folder."
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if overwrite and folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise JaxplainError(
            f"the model could not be saved as {folder}: {first_line(error)}; make room or choose another "
            "folder, and run again."
        ) from error


def _write_config(subject: Subject, folder: Path, sizes: Mapping[str, int], dtype: str) -> None:
    config = read_config(subject.folder)
    names = {meaning: name for name, meaning in subject.family.attributes.items() if isinstance(meaning, str)}
    config |= {names[meaning]: size for meaning, size in sizes.items()}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: sizes["layers"]]
    config["dtype"] = dtype
    if "torch_dtype" in config:  # what the attribute was called before
        config["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = subject.folder / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no type of its own for a failed write
        raise OSError(first_line(error)) from error


def _tensors(decoder: Decoder, family: Family) -> _Tensors:
    """The checkpoint's tensors in the order of the family's table, as the parameters that they hold."""
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    parameters = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    known = list(weights_of(family, decoder.arch))
    if unknown := parameters.keys() - {weight.target for weight in known}:
        raise ValueError(f"no tensor of the family's checkpoints holds the parameter {min(unknown)}")
    tensors: _Tensors = {}
    for weight in known:
        if weight.target in parameters:
            tensors.setdefault(weight.source, []).append((weight, parameters[weight.target]))
    return tensors


def _write_weights(
    tensors: _Tensors, arch: Architecture, folder: Path, dtype: str, max_file_bytes: int
) -> None:
    shapes = {name: source_shape(parts[0][0], arch) for name, parts in tensors.items()}
    width = jnp.dtype(dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        {name: math.prod(shape) * width for name, shape in shapes.items()},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        _write_safetensors(
            folder / file,
            {name: shapes[name] for name in names},
            dtype,
            (_as_source(tensors[name], arch, dtype) for name in names),
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, values: Iterable[np.ndarray]
) -> None:
    """One file, a tensor at a time; the safetensors library would want all of its tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers ask for it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in values:
            file.write(np.ascontiguousarray(tensor, jnp.dtype(dtype)).reshape(-1).view(np.uint8).data)


def _as_source(parts: Sequence[tuple[Weight, jax.Array]], arch: Architecture, dtype: str) -> np.ndarray:
    """The checkpoint's tensor that holds these parameters."""
    tensor = np.empty(source_shape(parts[0][0], arch), jnp.dtype(dtype))
    for weight, array in parts:
        write_parameter(tensor, weight, arch, _on_host(_tensors_part(weight, array)))
    return tensor


def _tensors_part(weight: Weight, array: jax.Array) -> jax.Array:
    """What a tensor holds of a parameter: all, or one expert's part."""
    if weight.expert is None:
        return array
    # By a number that is no constant, or every expert would be another program.
    return jax.lax.dynamic_index_in_dim(array, weight.expert, axes_of(weight).index("E"), keepdims=False)


def _on_host(array: jax.Array) -> np.ndarray:
    """All of an array, wherever its parts lie."""
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    values = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # Of a copy, since an array keeps what was read of it to the host for as long as it lives.
            values[shard.index] = np.asarray(jnp.copy(shard.data))
    return values
