"""What a run asks of its devices, from its config alone: shapes of weights and state, no values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import AutoConfig

from jaxplain.configs.extraction import ExtractConfig, SubjectConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.exemplars.reduction import LayerReduction, empty_reduction
from jaxplain.exemplars.selection import Selection
from jaxplain.mesh import mesh_over
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import architecture_of
from jaxplain.subjects.packaged import PACKAGED_SUBJECTS, packaged_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """A run without its devices: what is computed, what is kept, of how much.

    Attributes:
        sequences: By split, those that are read.
    """

    config: ExtractConfig
    arch: Architecture
    selection: Selection
    sequences: dict[str, int]

    @property
    def tokens(self) -> int:
        """Of a sequence."""
        return self.config.corpus.sequence_length

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and arithmetic."""
        return jnp.dtype(self.config.subject.dtype)

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
        return ".mlp.down_" not in name and (".attention." not in name or self.reads_last_attention)

    @property
    def neurons(self) -> int:
        """How many are kept, over all layers."""
        return sum(map(len, self.selection.indices.values()))

    def state(self, *, parts: int, model: int) -> dict[int, LayerReduction]:
        """Every layer's reduction, as shapes: with `parts` data shards, for `model` devices that share it."""
        return {
            layer: _with_parts(self.layer_state(self.padded_neurons(layer, model)), parts)
            for layer in self.selection.indices
        }

    def padded_neurons(self, layer: int, model: int) -> int:
        """The neurons of a layer that the devices hold: a multiple of how many share them."""
        return -(-len(self.selection.indices[layer]) // model) * model

    def of_layers(self, layers: list[int]) -> "Demand":
        """The same run over some of its layers alone."""
        indices = {layer: self.selection.indices[layer] for layer in layers}
        return dataclasses.replace(self, selection=Selection(indices=indices))

    def layer_state(self, neurons: int) -> LayerReduction:
        """A layer's reduction with one data shard, as shapes, if so many of its neurons are kept."""
        exemplars = self.config.exemplars
        return _layer_state(
            tuple(exemplars.kinds),
            neurons,
            exemplars.k,
            self.tokens,
            self.config.statistics.sampled_tokens,
            exemplars.activation_dtype,
        )


def demand_of(config: ExtractConfig, arch: Architecture, selection: Selection) -> Demand:
    """The demand of a config. Raises JaxplainError where it does not say how many sequences are read."""
    corpus = config.corpus
    sequences = corpus.max_sequences or corpus.expected_sequences
    if sequences is None:
        raise JaxplainError(
            "corpus.max_sequences is 0; say with corpus.expected_sequences how many sequences a split has, "
            "so that the work can be counted."
        )
    return Demand(
        config=config,
        arch=arch,
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

    Raises JaxplainError where there is none, or it describes no supported model.
    """
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


@functools.cache
def _layer_state(
    kinds: tuple[Any, ...], neurons: int, k: int, tokens: int, sampled_tokens: int, dtype: str
) -> LayerReduction:
    """A reduction of one data shard, as shapes."""
    mesh = mesh_over(jax.devices()[:1], 1, 1)
    return jax.eval_shape(
        lambda: empty_reduction(
            kinds=kinds,
            neurons=neurons,
            k=k,
            tokens=tokens,
            sampled_tokens=sampled_tokens,
            dtype=jnp.dtype(dtype),
            mesh=mesh,
        )
    )


def _with_parts(state: LayerReduction, parts: int) -> LayerReduction:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, *x.shape[1:]), x.dtype), state)
