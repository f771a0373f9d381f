"""Comparing a subject's activations with those of torch and transformers, layer by layer.

The reference computes in a finer type than the subject, so that what is found is the subject's own error. A
GGUF file's weights are de-quantised by jaxplain for both sides: what is compared is the arithmetic.

Where a router finds two experts all but equal, rounding decides which one reads a token, and the token's
activations in the layers after that are others. So of a mixture two things are compared: which experts read
each token, and the activations of tokens that the same experts have read in all layers before.
"""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from transformers import AutoConfig, AutoModelForCausalLM

from jaxplain.errors import JaxplainError
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.gguf import gguf_tensors, is_gguf, open_gguf
from jaxplain.subjects.loading import weights_of
from jaxplain.subjects.mixture import Mixture, Routed
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.subject import Subject, read_config

BOUNDS: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.25}
"""By the subject's dtype, how far an activation may be off, as a share of its layer's largest."""

REROUTED: Mapping[str, float] = {"float32": 1e-2, "bfloat16": 0.25}
"""By the subject's dtype, the share of a layer's tokens that other experts may read than in the reference."""

_REFERENCE_DTYPE = {"float32": "float64", "bfloat16": "float32"}

Reference = Callable[[Int[np.ndarray, "T"]], Sequence[Float[np.ndarray, "T F"]]]
"""A sequence's activations in every layer; NaN at tokens that a neuron's expert does not read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """How far a layer's activations are from the reference's at most, and the reference's largest.

    Both are absolute values over all sequences, tokens and neurons that are compared. `rerouted` is the share
    of the tokens compared that other experts read, None in layers without experts.
    """

    layer: int
    difference: float
    largest: float
    rerouted: float | None = None

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
        merged = nnx.merge(graph, weights)
        _, sown = cast(Callable[..., Any], nnx.capture(merged, Sown))(tokens_BT)
        return [
            _neurons(merged.layers[layer].mlp, sown["layers"][layer]["mlp"][MLP_ACTIVATION].get_value()[0])
            for layer in layers
        ]

    compared = [_Compared(isinstance(layer.mlp, Mixture)) for layer in model.layers]
    for tokens_T in tokens_NT:
        read_T = tokens_T.clip(0)
        found = forward(weights, jnp.asarray(read_T[None], jnp.int32))
        alike_T = tokens_T >= 0
        for so_far, acts_BTF, expected_TF in zip(compared, found, reference(read_T), strict=True):
            alike_T = so_far.add(np.asarray(acts_BTF[0], np.float64), expected_TF, alike_T)
    return [so_far.result(layer) for layer, so_far in enumerate(compared)]


def _neurons(mlp: nnx.Module, sown: jax.Array | Routed) -> Float[Array, "B T F"]:
    """Sown activations, NaN at tokens that a neuron's expert does not read."""
    if not isinstance(sown, Routed):
        return sown
    assert isinstance(mlp, Mixture)
    widths = np.array(mlp.widths)
    routed_BTF = jnp.repeat(sown.routed_BTE, widths, axis=2, total_repeat_length=int(widths.sum()))
    return jnp.where(routed_BTF, sown.acts_BTF, jnp.nan)


class _Compared:
    """What has been found of a layer, which is a mixture of experts or not."""

    def __init__(self, mixture: bool):
        self._mixture = mixture
        self._off = self._largest = 0.0
        self._tokens = self._rerouted = 0

    def add(
        self,
        found_TF: Float[np.ndarray, "T F"],
        expected_TF: Float[np.ndarray, "T F"],
        alike_T: Bool[np.ndarray, "T"],
    ) -> Bool[np.ndarray, "T"]:
        """Compare the tokens of a sequence that are alike so far; those that are alike after the layer."""
        off_TF, size_TF = np.abs(found_TF - expected_TF)[alike_T], np.abs(expected_TF)[alike_T]
        if self._mixture:
            rerouted_T = alike_T & (np.isnan(found_TF) != np.isnan(expected_TF)).any(axis=1)
            self._tokens += int(alike_T.sum())
            self._rerouted += int(rerouted_T.sum())
            alike_T = alike_T & ~rerouted_T
            off_TF, size_TF = np.nan_to_num(off_TF, posinf=np.inf), np.nan_to_num(size_TF, posinf=np.inf)
        # np.maximum keeps what is not a number, and max would not.
        self._off = float(np.maximum(self._off, off_TF.max(initial=0)))
        self._largest = float(np.maximum(self._largest, size_TF.max(initial=0)))
        return alike_T

    def result(self, layer: int) -> LayerDifference:
        rerouted = self._rerouted / max(self._tokens, 1) if self._mixture else None
        return LayerDifference(layer=layer, difference=self._off, largest=self._largest, rerouted=rerouted)


def require_parity(found: Sequence[LayerDifference], dtype: str) -> None:
    """Raise JaxplainError where a layer is not a number, or further off than `BOUNDS` or `REROUTED` allow."""
    bound, most_rerouted = BOUNDS[dtype], REROUTED[dtype]
    for layer in found:
        if layer.rerouted is not None and not layer.rerouted <= most_rerouted:
            raise JaxplainError(
                f"in layer {layer.layer} other experts than torch's read {layer.rerouted:.1%} of the tokens, "
                f"where {most_rerouted:.0%} is allowed in {dtype}; its neurons would not be the model's, so "
                "do not use this subject, or leave --check-parity out if you know why."
            )
        if not layer.ratio <= bound:
            raise JaxplainError(
                f"layer {layer.layer} differs from torch's by {layer.ratio:.1e} of its largest activation, "
                f"where {bound:g} is allowed in {dtype}; its neurons would not be the model's, so do not use "
                "this subject, or leave --check-parity out if you know why."
            )


def table_of(found: Sequence[LayerDifference], *, sequences: int, dtype: str) -> str:
    """The differences as lines of text."""
    title = f"{dtype} against torch's {_REFERENCE_DTYPE[dtype]}, {sequences} sequences"
    head = "layer  largest difference    largest    ratio"
    rows = [
        f"{layer.layer:>5}  {layer.difference:>18.3e}  {layer.largest:>9.3e}  {layer.ratio:>7.1e}"
        for layer in found
    ]
    if any(layer.rerouted is not None for layer in found):
        head += "  tokens to other experts"
        shares = ["" if layer.rerouted is None else f"{layer.rerouted:.2%}" for layer in found]
        rows = [f"{row}  {share:>23}".rstrip() for row, share in zip(rows, shares, strict=True)]
    return "\n".join([title, head, *rows])


def torch_reference(subject: Subject, *, layers: int) -> Reference:
    """The first `layers` layers of the subject in torch, in float64 for a float32 subject, else in float32.

    Raises JaxplainError where torch is missing, or the neurons of a layer without experts are not the input
    of one module.
    """
    require_torch()
    torch: Any = importlib.import_module("torch")
    names = _down_projections(subject)
    plain = [layer for layer in range(layers) if not subject.arch.routed_experts(layer)]
    if not names.keys() >= set(plain):
        raise JaxplainError(
            f"--check-parity cannot compare {subject.id}, whose family has layers without one down "
            "projection; leave the option out."
        )
    model = _torch_model(torch, subject)
    found: list[np.ndarray] = []

    def keep(acts: Any) -> None:
        found.append(acts.double().numpy())

    for layer in plain:
        model.get_submodule(names[layer]).register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    blocks = [module for module in model.modules() if hasattr(module, "experts")]
    for block in blocks[: layers - len(plain)]:
        _watch_experts(torch, block, keep)

    def activations(tokens_T: Int[np.ndarray, "T"]) -> Sequence[Float[np.ndarray, "T F"]]:
        found.clear()
        with torch.no_grad():
            model(torch.as_tensor(np.array(tokens_T[None], np.int64)), use_cache=False)
        return [acts.reshape(len(tokens_T), -1) for acts in found]

    return activations


def _down_projections(subject: Subject) -> dict[int, str]:
    """By layer, the torch module whose input the neurons are: that of the tensor which projects them down."""
    return {
        int(weight.target.split(".")[1]): weight.source.removesuffix(".weight")
        for weight in weights_of(subject.family, subject.arch)
        if weight.target.endswith(".mlp.down_FD")
    }


def _watch_experts(torch: Any, block: Any, keep: Callable[[Any], None]) -> None:
    """Have `keep` given the neurons of a layer of experts, NaN at tokens that an expert does not read."""
    experts, found = block.experts, {}

    def keep_routed(_: Any, inputs: Any) -> None:
        # torch shows what experts read and give, but not their neurons: those are computed again.
        hidden_ND, chosen_NK, _ = inputs
        count, _, neurons = experts.down_proj.shape
        acts_NEI = torch.full((len(hidden_ND), count, neurons), torch.nan, dtype=hidden_ND.dtype)
        for expert in range(count):
            read_N = (chosen_NK == expert).any(dim=1)
            both = torch.nn.functional.linear(hidden_ND[read_N], experts.gate_up_proj[expert])
            gate, up = both.chunk(2, dim=-1)
            acts_NEI[read_N, expert] = experts.act_fn(gate) * up
        found["routed"] = acts_NEI.flatten(1)

    def keep_shared(_: Any, inputs: Any) -> None:
        found["shared"] = inputs[0]

    experts.register_forward_pre_hook(keep_routed)
    if hasattr(block, "shared_expert"):
        block.shared_expert.down_proj.register_forward_pre_hook(keep_shared)
    names = ("routed", "shared")
    block.register_forward_hook(
        lambda *_: keep(torch.cat([found[name] for name in names if name in found], dim=1))
    )


def _torch_model(torch: Any, subject: Subject) -> Any:
    # The plain form of attention is the one that knows of every variant, soft caps among them, and that of
    # experts the one that knows of float64.
    options = {
        "dtype": getattr(torch, _REFERENCE_DTYPE[subject.dtype.name]),
        "attn_implementation": "eager",
        "experts_implementation": "eager",
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
