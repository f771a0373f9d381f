"""Comparing a subject's activations with those of torch and transformers, layer by layer.

The reference computes in a finer type than the subject, so that what is found is the subject's own error. A
GGUF file's weights are de-quantised by jaxplain for both sides: what is compared is the arithmetic.
"""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from transformers import AutoConfig, AutoModelForCausalLM

from jaxplain.errors import JaxplainError
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.gguf import gguf_tensors, is_gguf, open_gguf
from jaxplain.subjects.loading import weights_of
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.subject import Subject, read_config

BOUNDS: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.25}
"""By the subject's dtype, how far an activation may be off, as a share of its layer's largest."""

_REFERENCE_DTYPE = {"float32": "float64", "bfloat16": "float32"}

Reference = Callable[[Int[np.ndarray, "T"]], Sequence[Float[np.ndarray, "T F"]]]
"""A sequence's activations in every layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """How far a layer's activations are from the reference's at most, and the reference's largest.

    Both are absolute values over all sequences, tokens and neurons.
    """

    layer: int
    difference: float
    largest: float

    @property
    def ratio(self) -> float:
        """The difference as a share of the largest activation."""
        if not self.largest:
            return math.inf if self.difference else 0.0
        return self.difference / self.largest


def require_torch() -> None:
    """Raise JaxplainError where torch is missing; asked before any work is done."""
    if importlib.util.find_spec("torch") is None:
        raise JaxplainError(
            "--check-parity needs the package torch; install it with pip install 'jaxplain[parity]', or "
            "leave the option out."
        )


def differences(
    model: Decoder, reference: Reference, tokens_NT: Int[np.ndarray, "N T"]
) -> list[LayerDifference]:
    """What separates the model's layers from the reference's over sequences; -1 stands for no token.

    Sequences go through one at a time, so that memory holds the activations of one.
    """
    graph, weights = nnx.split(model)
    layers = range(len(model.layers))

    @jax.jit
    def forward(weights: nnx.State, tokens_BT: jax.Array) -> list[jax.Array]:
        _, sown = nnx.capture(nnx.merge(graph, weights), Sown)(tokens_BT)
        return [sown["layers"][layer]["mlp"][MLP_ACTIVATION].get_value()[0] for layer in layers]

    off_NL, largest_NL = [], []
    for tokens_T in tokens_NT:
        here_T = tokens_T >= 0
        read_T = tokens_T.clip(0)
        found = forward(weights, jnp.asarray(read_T[None], jnp.int32))
        expected = reference(read_T)
        pairs = [
            (np.asarray(acts_BTF[0], np.float64)[here_T], acts_TF[here_T])
            for acts_BTF, acts_TF in zip(found, expected, strict=True)
        ]
        off_NL.append([np.abs(found_TF - acts_TF).max() for found_TF, acts_TF in pairs])
        largest_NL.append([np.abs(acts_TF).max() for _, acts_TF in pairs])
    return [
        LayerDifference(layer=layer, difference=float(off), largest=float(largest))
        for layer, (off, largest) in enumerate(
            zip(np.max(off_NL, axis=0), np.max(largest_NL, axis=0), strict=True)
        )
    ]


def require_parity(found: Sequence[LayerDifference], dtype: str) -> None:
    """Raise JaxplainError where a layer is further off than `BOUNDS` allows, or not a number."""
    bound = BOUNDS[dtype]
    for layer in found:
        if not layer.ratio <= bound:
            raise JaxplainError(
                f"layer {layer.layer} differs from torch's by {layer.ratio:.1e} of its largest activation, "
                f"where {bound:g} is allowed in {dtype}; its neurons would not be the model's, so do not use "
                "this subject, or leave --check-parity out if you know why."
            )


def table_of(found: Sequence[LayerDifference], *, sequences: int, dtype: str) -> str:
    """The differences as lines of text."""
    head = f"{dtype} against torch's {_REFERENCE_DTYPE[dtype]}, {sequences} sequences"
    rows = [
        f"{layer.layer:>5}  {layer.difference:>18.3e}  {layer.largest:>9.3e}  {layer.ratio:>7.1e}"
        for layer in found
    ]
    return "\n".join([head, "layer  largest difference    largest    ratio", *rows])


def torch_reference(subject: Subject, *, layers: int) -> Reference:
    """The first `layers` layers of the subject in torch, in float64 for a float32 subject, else in float32.

    Raises JaxplainError where torch is missing, or the family's neurons are not the input of one module of
    each layer.
    """
    require_torch()
    torch: Any = importlib.import_module("torch")
    names = list(_down_projections(subject))[:layers]
    if len(names) < layers:
        raise JaxplainError(
            f"--check-parity cannot compare {subject.id}, whose family has layers without one down "
            "projection; leave the option out."
        )
    model = _torch_model(torch, subject)
    found: list[np.ndarray] = []

    def keep(module: Any, inputs: Any) -> None:
        found.append(inputs[0].double().numpy())

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(keep)

    def activations(tokens_T: Int[np.ndarray, "T"]) -> Sequence[Float[np.ndarray, "T F"]]:
        found.clear()
        with torch.no_grad():
            model(torch.as_tensor(np.array(tokens_T[None], np.int64)), use_cache=False)
        return [acts.reshape(len(tokens_T), -1) for acts in found]

    return activations


def _down_projections(subject: Subject) -> Iterator[str]:
    """The torch modules whose input the neurons are: those of the tensors that project them down."""
    for weight in weights_of(subject.family, subject.arch):
        if weight.target.endswith(".mlp.down_FD"):
            yield weight.source.removesuffix(".weight")


def _torch_model(torch: Any, subject: Subject) -> Any:
    # The plain form of attention is the one that knows of every variant, soft caps among them.
    options = {
        "dtype": getattr(torch, _REFERENCE_DTYPE[subject.dtype.name]),
        "attn_implementation": "eager",
        "trust_remote_code": False,
    }
    if not is_gguf(subject.folder):
        model = AutoModelForCausalLM.from_pretrained(subject.folder, use_safetensors=True, **options)
        return model.eval()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read_config(subject.folder)), **options)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in gguf_tensors(open_gguf(subject.folder)).items():
            values = tensor[(slice(None),) * len(tensor.get_shape())]
            parameters.pop(name).copy_(torch.from_numpy(np.array(values)))
    if parameters:
        raise ValueError(f"the file has no tensor for torch's {min(parameters)}")
    return model.eval()
