"""One step of training, and evaluation: cross-entropy of the levels at a sequence's tokens.

Master weights and optimiser are float32, sharded over the whole mesh (as in FSDP, Zhao et al., 2023); the
arithmetic is done in `training.compute_dtype`. A step's result does not depend on how its batch is
accumulated or spread.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxplain.configs.finetuning import TrainingConfig
from jaxplain.simulators.pairs import Batch
from jaxplain.simulators.parts import (
    Parameters,
    assemble,
    decays,
    decoder_of,
    divide,
    fully_sharded,
    parameters_of,
)
from jaxplain.simulators.simulation import LEVELS
from jaxplain.subjects.decoder import Decoder

_LOWEST_RATE = 0.1  # of the highest, at the end of the cosine


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    trained: Parameters
    optimiser: optax.OptState


class StepMetrics(NamedTuple):
    """Of one step: mean cross-entropy in nats per token, the gradient's norm before clipping, the rate."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Over all tokens that count.

    Attributes:
        loss: Mean cross-entropy, in nats per token.
        constant_loss: The same of the best prediction that is the same at every token.
        correlation: Of expected with real levels; NaN where one of the two is constant.
    """

    loss: float
    constant_loss: float
    correlation: float


class _Sums(NamedTuple):
    loss: Float[Array, ""]
    levels_L: Float[Array, "11"]
    expected: Float[Array, ""]
    expected_squared: Float[Array, ""]
    product: Float[Array, ""]


class Trainer:
    """A decoder in training on a mesh."""

    def __init__(
        self, decoder: Decoder, config: TrainingConfig, level_ids: Int[np.ndarray, "11"], mesh: Mesh
    ):
        self._config, self._level_ids, self._mesh = config, level_ids, mesh
        self._graph, parameters = parameters_of(decoder)
        trained, frozen = divide(parameters, config, decoder.arch, level_ids)
        self._initial, self._frozen = self._sharded(trained), self._sharded(frozen)
        self._rate = learning_rate(config)
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.adamw(
                self._rate,
                weight_decay=config.weight_decay,
                mask={name: decays(name, value) for name, value in trained.items()},
            ),
        )
        self._step = jax.jit(self._take_step, donate_argnums=0)
        self._sums = jax.jit(self._evaluation_sums)
        self._assemble = jax.jit(self._assembled, static_argnums=2)

    def _sharded(self, parameters: Parameters) -> Parameters:
        return {
            name: jax.device_put(value, fully_sharded(name, value.shape, self._mesh))
            for name, value in parameters.items()
        }

    def start(self) -> TrainState:
        """The state before the first step."""
        # A copy, since steps donate their state.
        trained = jax.tree.map(jnp.copy, self._initial)
        everywhere = NamedSharding(self._mesh, P())
        optimiser = jax.tree.map(
            # Moments lie as their parameters do; counters everywhere.
            lambda leaf: jax.device_put(leaf, everywhere) if leaf.ndim == 0 else leaf,
            self._optimiser.init(trained),
        )
        return TrainState(jax.device_put(jnp.int32(0), everywhere), trained, optimiser)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One optimiser step; the state that it was given is gone."""
        pieces = self._config.accumulate
        return self._step(state, self._frozen, *(self._placed(x, pieces) for x in _arrays(batch)))

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Evaluation:
        """How well the state does on batches."""
        total = None
        for batch in batches:
            arrays = (self._placed(x, 1)[0] for x in _arrays(batch))
            sums = self._sums(state.trained, self._frozen, *arrays)
            found = jax.tree.map(lambda value: np.asarray(value, np.float64), sums)
            total = found if total is None else jax.tree.map(np.add, total, found)
        if total is None:
            raise ValueError("there is nothing to evaluate on")
        return _evaluation(total)

    def decoder(self, state: TrainState) -> Decoder:
        """The model as it is now, in float32."""
        assembled = self._assemble(state.trained, self._frozen, jnp.dtype("float32"))
        return decoder_of(self._graph, assembled)

    def _placed(self, x_BT: np.ndarray, pieces: int) -> Array:
        shaped = x_BT.reshape((pieces, -1, x_BT.shape[-1]))
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, P(None, "data")), shaped)

    def _assembled(self, trained: Parameters, frozen: Parameters, dtype: jnp.dtype) -> Parameters:
        return assemble(trained, frozen, self._config, self._level_ids, dtype)

    def _log_probabilities(
        self, trained: Parameters, frozen: Parameters, tokens_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T 11"]:
        dtype = jnp.dtype(self._config.compute_dtype)
        decoder = decoder_of(self._graph, self._assembled(trained, frozen, dtype))
        return jax.nn.log_softmax(level_logits(decoder, tokens_BT, self._level_ids, remat=self._config.remat))

    def _loss(
        self, trained: Parameters, frozen: Parameters, tokens_BT: Array, levels_BT: Array
    ) -> Float[Array, ""]:
        """Cross-entropy, summed over the tokens that count."""
        log_probabilities_BTL = self._log_probabilities(trained, frozen, tokens_BT)
        return _cross_entropy(log_probabilities_BTL, levels_BT)

    def _take_step(
        self, state: TrainState, frozen: Parameters, tokens_ABT: Array, levels_ABT: Array
    ) -> tuple[TrainState, StepMetrics]:
        count = jnp.maximum((levels_ABT >= 0).sum(), 1).astype(jnp.float32)

        def add(total: tuple, piece: tuple) -> tuple[tuple, None]:
            found = jax.value_and_grad(self._loss)(state.trained, frozen, *piece)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
        if len(tokens_ABT) == 1:
            total, _ = add(zero, (tokens_ABT[0], levels_ABT[0]))
        else:
            total, _ = jax.lax.scan(add, zero, (tokens_ABT, levels_ABT))
        loss, gradient = jax.tree.map(lambda x: x / count, total)
        updates, optimiser = self._optimiser.update(gradient, state.optimiser, state.trained)
        trained = jax.tree.map(jnp.add, state.trained, updates)
        metrics = StepMetrics(loss, optax.tree.norm(gradient), jnp.asarray(self._rate(state.step)))
        return TrainState(state.step + 1, trained, optimiser), metrics

    def _evaluation_sums(
        self, trained: Parameters, frozen: Parameters, tokens_BT: Array, levels_BT: Array
    ) -> _Sums:
        log_probabilities_BTL = self._log_probabilities(trained, frozen, tokens_BT)
        counted_BT = levels_BT >= 0
        expected_BT = jnp.exp(log_probabilities_BTL) @ jnp.arange(LEVELS, dtype=jnp.float32)
        expected_BT = jnp.where(counted_BT, expected_BT, 0)
        return _Sums(
            loss=_cross_entropy(log_probabilities_BTL, levels_BT),
            levels_L=jax.nn.one_hot(levels_BT, LEVELS).sum((0, 1)),  # -1 is no level
            expected=expected_BT.sum(),
            expected_squared=jnp.square(expected_BT).sum(),
            product=(expected_BT * jnp.maximum(levels_BT, 0)).sum(),
        )


def level_logits(
    decoder: Decoder, tokens_BT: Int[Array, "B T"], level_ids: Int[np.ndarray, "11"], *, remat: bool = False
) -> Float[Array, "B T 11"]:
    """The logits of levels 0 to 10 at every token, float32."""
    return decoder.unembed(decoder(tokens_BT, remat=remat), level_ids).astype(jnp.float32)


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """Linear to the highest rate over `warmup` steps, then along a cosine to a tenth of it."""
    warmup = min(config.warmup, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),  # not 0, which would waste the first step
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=config.learning_rate * _LOWEST_RATE,
    )


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return batch.tokens_BT, batch.levels_BT


def _cross_entropy(
    log_probabilities_BTL: Float[Array, "B T 11"], levels_BT: Int[Array, "B T"]
) -> Float[Array, ""]:
    place_BTL = jnp.maximum(levels_BT, 0)[..., None]
    at_BT = jnp.take_along_axis(log_probabilities_BTL, place_BTL, axis=-1)[..., 0]
    return -jnp.where(levels_BT >= 0, at_BT, 0).sum()


def _evaluation(sums: _Sums) -> Evaluation:
    count = float(sums.levels_L.sum())
    share_L = np.asarray(sums.levels_L) / count
    entropy = -float(sum(share * math.log(share) for share in share_L if share > 0))
    level_L = np.arange(LEVELS)
    mean, squared = float(share_L @ level_L), float(share_L @ level_L**2)
    expected = float(sums.expected) / count
    variances = (squared - mean**2) * (float(sums.expected_squared) / count - expected**2)
    covariance = float(sums.product) / count - expected * mean
    return Evaluation(
        loss=float(sums.loss) / count,
        constant_loss=entropy,
        correlation=covariance / math.sqrt(variances) if variances > 0 else math.nan,
    )
