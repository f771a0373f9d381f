"""llama.cpp's GGUF files: what they say of a model, and its tensors as Hugging Face's folders have them.

Names, keys and layouts are those of llama.cpp's converter and of the package `gguf`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError, first_line

GGUF_SUFFIX = ".gguf"

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""llama.cpp's architectures that can be read, named as Hugging Face's `model_type`, with the torch class."""

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

_ROTARY_PAIRS_ARE_NEIGHBOURS = ("llama",)
"""Architectures for which llama.cpp puts the rows of queries and keys that rotate together side by side."""

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED_TENSORS = {
    "rope_freqs": "read with the config",
    "attn_rot_embd": "computed from the config",
}
_HASHED_BYTES_PER_TENSOR = 4096
_ROWS_AT_ONCE = 1024  # bounds what de-quantising takes beside its result


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A GGUF file that was found readable. `tensors` are the package gguf's, by llama.cpp's names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """llama.cpp's name, a key of `ARCHITECTURES`."""
        return self.metadata["general.architecture"]


def is_gguf(path: Path) -> bool:
    """Whether a subject's place is a GGUF file, by its name."""
    return path.suffix.lower() == GGUF_SUFFIX


def open_gguf(path: Path) -> GGUFFile:
    """Read a file's metadata and find its tensors, which stay on disk.

    Raises JaxplainError for a file that is not GGUF or cut short, an architecture or a quantisation that is
    not supported, or where the package gguf (extra `demo`) is missing.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise JaxplainError(f"{path} cannot be read: {error.strerror}.") from error
    return _open(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, changed: int) -> GGUFFile:
    """Kept, since the vocabulary of a large model takes seconds to read; size and time tell of a new file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise JaxplainError(
            f"reading {path.name} needs the package gguf; install it with pip install 'jaxplain[demo]'."
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise JaxplainError(
            f"{path} is not a GGUF file that can be read ({first_line(error)}); fetch it again."
        ) from error
    if reader.byte_order != "I":
        raise JaxplainError(
            f"{path.name} was written for machines of another byte order; use a little-endian file."
        )
    if metadata.get("split.count", 0) > 1:
        raise JaxplainError(
            f"{path.name} is one of {metadata['split.count']} parts; join them with llama.cpp's "
            "llama-gguf-split --merge, and name the whole file."
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise JaxplainError(
            f"{path.name} holds a model of architecture {architecture!r}; only GGUF files of architecture "
            f"{', '.join(ARCHITECTURES)} can be read, so use the model's Hugging Face folder."
        )
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in QUANTISATIONS:
            raise JaxplainError(
                f"the tensor {tensor.name} of {path.name} is quantised as {tensor.tensor_type.name}; "
                f"supported are {', '.join(QUANTISATIONS)}, so use a file of one of those, such as Q8_0."
            )
    return GGUFFile(path=path, metadata=metadata, tensors={t.name: t for t in reader.tensors})


class GGUFTensor:
    """A matrix or vector on disk, its rows in Hugging Face's order; only those asked for are de-quantised.

    `order` says where in the file each row lies; None where they are in order.
    """

    def __init__(self, tensor: Any, order: np.ndarray | None = None):
        self._tensor = tensor
        self._order = np.arange(int(tensor.shape[-1])) if order is None else order

    def get_shape(self) -> list[int]:
        """The shape of the values."""
        return self._tensor.shape.tolist()[::-1]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values as float32, at one slice for every axis."""
        from gguf.quants import dequantize

        data, kind = self._tensor.data, self._tensor.tensor_type
        rows = self._order[index[0]]
        if data.ndim == 1:  # its one axis is the one that blocks of a quantisation lie along
            return np.asarray(dequantize(data, kind), np.float32)[rows]
        columns = len(range(self.get_shape()[1])[index[1]])
        values = np.empty((len(rows), columns), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            values[some] = dequantize(data[rows[some]], kind)[:, index[1]]
        return values


def gguf_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The file's tensors by Hugging Face's names. Raises JaxplainError for one without a known place."""
    heads = file.metadata.get(f"{file.architecture}.attention.head_count")
    key_heads = file.metadata.get(f"{file.architecture}.attention.head_count_kv", heads)
    permuted = {"attn_q": heads, "attn_k": key_heads}
    found = {}
    for name, tensor in file.tensors.items():
        *block, module, kind = name.split(".")
        if module in _IGNORED_TENSORS:
            continue
        known = _OF_A_LAYER if block else _ENDS
        if module not in known:
            raise JaxplainError(
                f"{file.path.name} holds a tensor {name} that has no known place in a "
                f"{file.architecture} model; use the model's Hugging Face folder."
            )
        order = None
        if module in permuted and file.architecture in _ROTARY_PAIRS_ARE_NEIGHBOURS:
            order = _halves(int(tensor.shape[-1]), permuted[module])
        prefix = f"model.layers.{block[1]}." if block else ""
        found[f"{prefix}{known[module]}.{kind}"] = GGUFTensor(tensor, order)
    return found


def _halves(rows: int, heads: int) -> np.ndarray:
    """For heads whose rotating pairs lie half a head apart, where they lie side by side."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def gguf_weight_hash(file: GGUFFile) -> str:
    """A fingerprint of the weights: SHA-256 over every tensor's name, type, shape and first 4 KiB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(file.tensors.items()):
        digest.update(f"{name} {tensor.tensor_type.name} {tensor.shape.tolist()}".encode())
        digest.update(tensor.data.reshape(-1).view(np.uint8)[:_HASHED_BYTES_PER_TENSOR].tobytes())
    return digest.hexdigest()
