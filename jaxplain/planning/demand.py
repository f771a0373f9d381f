"""What a run asks of its devices, from its config alone: shapes of weights and state, no values."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from transformers import AutoConfig

from jaxplain.configs.extraction import ExtractConfig, SubjectConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.exemplars.reduction import LayerReduction, empty_reduction
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.states import sampled_tokens, state_options
from jaxplain.exemplars.token_sums import choose_neurons
from jaxplain.mesh import mesh_over
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import architecture_of
from jaxplain.subjects.gguf import is_gguf, open_gguf
from jaxplain.subjects.gguf_config import gguf_config
from jaxplain.subjects.packaged import PACKAGED_SUBJECTS, packaged_folder

_BELOW_THE_NEURONS = ("down", "shared_down", "shared_router")
"""An MLP's parameters that its neurons do not depend on; which experts read a token they do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """A run without its devices: what is computed, what is kept, of how much.

    Attributes:
        sequences: By split, those that are read; empty where that is not known.
    """

    config: ExtractConfig
    selection: Selection
    sequences: dict[str, int]

    @property
    def arch(self) -> Architecture:
        """The subject's."""
        return self.selection.arch

    @property
    def tokens(self) -> int:
        """Of a sequence."""
        return self.config.corpus.sequence_length

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and arithmetic."""
        return jnp.dtype(self.config.subject.dtype)

    @property
    def saves(self) -> bool:
        """Whether checkpoints are saved as time goes by."""
        run = self.config.run
        return self.config.saves_in is not None and bool(run.checkpoint_minutes or run.checkpoint_steps)

    @property
    def weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters that the run loads, by name: those of the layers up to the last one asked for."""
        return parameter_shapes(self.arch, self.dtype, depth=self.selection.depth)

    @property
    def reads_last_attention(self) -> bool:
        """Not where attention and MLP stand side by side: the neurons do not see what attention adds."""
        return self.arch.residual == "sequential"

    def is_read(self, name: str) -> bool:
        """Whether the step reads a parameter: not where only layers that are not there would see a result."""
        if not name.startswith(f"layers.{self.selection.depth - 1}."):
            return True
        if ".attention." in name:
            return self.reads_last_attention
        return not any(f".mlp.{part}_" in name for part in _BELOW_THE_NEURONS)

    @property
    def neurons(self) -> int:
        """How many are kept, over all layers."""
        return sum(map(len, self.selection.indices.values()))

    @functools.cached_property
    def widths(self) -> list[int]:
        """How many neurons the subject has in each layer."""
        return [self.selection.width(layer) for layer in range(self.arch.layers)]

    @functools.cached_property
    def tabled(self) -> dict[int, Int[np.ndarray, "N"]]:
        """The numbers of each layer's neurons that get a table of mean activations by token."""
        wanted = self.config.statistics.tokens.neurons
        if not isinstance(wanted, int):
            wanted = [neuron for neuron in wanted if neuron[0] in self.selection.indices]
        return choose_neurons(wanted, self.selection, seed=self.config.corpus.seed)

    def state(self, *, parts: int, model: int) -> dict[int, LayerReduction]:
        """Every layer's reduction, as shapes: with `parts` data shards, for `model` devices that share it."""
        return {layer: _with_parts(self.layer_state(layer, model), parts) for layer in self.selection.indices}

    def padded_neurons(self, layer: int, model: int) -> int:
        """The neurons of a layer that the devices hold: a multiple of how many share them."""
        return -(-len(self.selection.indices[layer]) // model) * model

    def of_layers(self, layers: list[int]) -> "Demand":
        """The same run over some of its layers alone."""
        indices = {layer: self.selection.indices[layer] for layer in layers}
        return dataclasses.replace(self, selection=dataclasses.replace(self.selection, indices=indices))

    def layer_state(self, layer: int, model: int) -> LayerReduction:
        """A layer's reduction with one data shard, as shapes, for `model` devices that share it.

        It is of the split with the most sequences; where these are not known, of as many as can be drawn.
        """
        rows = max(self.sequences.values(), default=None)
        sampled = sampled_tokens(self.config.statistics, self.selection)
        options = state_options(
            self.config,
            self.selection,
            layer,
            shards=model,
            rows=rows,
            sampled=sampled if rows is None else min(sampled, rows * self.tokens),
            tabled=self.tabled,
        )
        return _layer_state(**{name: _as_key(value) for name, value in options.items()})


def demand_of(config: ExtractConfig, selection: Selection) -> Demand:
    """The demand of a config.

    Raises JaxplainError where it does not say how many sequences are read, or names neurons that are not
    selected.
    """
    corpus = config.corpus
    sequences = corpus.max_sequences or corpus.expected_sequences
    if sequences is None:
        raise JaxplainError(
            "corpus.max_sequences is 0; say with corpus.expected_sequences how many sequences a split has, "
            "so that the work can be counted."
        )
    choose_neurons(config.statistics.tokens.neurons, selection, seed=corpus.seed)
    return Demand(
        config=config,
        selection=selection,
        sequences=dict.fromkeys(config.exemplars.splits, sequences),
    )


@functools.cache
def parameter_shapes(
    arch: Architecture, dtype: jnp.dtype, *, depth: int | None = None, with_head: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a decoder's parameters, by their names; all layers where no depth is given."""
    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=dtype, depth=depth, with_head=with_head)
    )
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): _shape_of(variable.get_value()) for path, variable in flat}


def read_architecture(config: SubjectConfig) -> Architecture:
    """A subject's architecture from its config.json alone, which is all that is fetched of a hub model.

    Of a GGUF file it is read from the metadata.

    Raises JaxplainError where there is none, or it describes no supported model.
    """
    path = Path(config.id).expanduser()
    if path.is_file() and is_gguf(path):
        return architecture_of(AutoConfig.for_model(**gguf_config(open_gguf(path))))
    folder = packaged_folder(config.id) if config.id in PACKAGED_SUBJECTS else config.id
    try:
        found = AutoConfig.from_pretrained(folder, revision=config.revision)
    except Exception as error:  # every config class of transformers validates in its own way
        raise JaxplainError(
            f"subject.id is {config.id!r}, of which there is no config.json that describes a supported "
            f"model: {first_line(error)}."
        ) from error
    return architecture_of(found)


def _shape_of(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _as_key(value: Any) -> Any:
    """What a state's shapes depend on of an option: of arrays their length."""
    if isinstance(value, np.ndarray):
        return _Length(len(value))
    return tuple(value.items()) if isinstance(value, dict) else value


class _Length(int):
    """How long an array is."""


@functools.cache
def _layer_state(**options: Any) -> LayerReduction:
    """A reduction of one data shard, as shapes."""
    mesh = mesh_over(jax.local_devices()[:1], 1, 1)
    values: dict[str, Any] = {
        name: np.zeros(value, np.int32) if isinstance(value, _Length) else value
        for name, value in options.items()
    }
    values["draws"] = dict(options["draws"])
    return jax.eval_shape(lambda: empty_reduction(**values, mesh=mesh))


def _with_parts(state: LayerReduction, parts: int) -> LayerReduction:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, *x.shape[1:]), x.dtype), state)
