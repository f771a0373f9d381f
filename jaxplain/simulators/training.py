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
    READOUT,
    Parameters,
    assemble,
    decays,
    decoder_of,
    divide,
    fully_sharded,
    parameters_of,
)
from jaxplain.simulators.reading import read_sequences
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
            optax.partition(
                {"readout": optax.scale(config.readout_rate), "rest": optax.identity()},
                {name: "readout" if name == READOUT else "rest" for name in trained},
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
        return self._step(state, self._frozen, self._placed(batch, self._config.accumulate))

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Evaluation:
        """How well the state does on batches."""
        total = None
        for batch in batches:
            piece = jax.tree.map(lambda x: x[0], self._placed(batch, 1))
            sums = self._sums(state.trained, self._frozen, piece)
            found = jax.tree.map(lambda value: np.asarray(value, np.float64), sums)
            total = found if total is None else jax.tree.map(np.add, total, found)
        if total is None:
            raise ValueError("there is nothing to evaluate on")
        return _evaluation(total)

    def decoder(self, state: TrainState) -> Decoder:
        """The model as it is now, in float32."""
        assembled = self._assemble(state.trained, self._frozen, jnp.dtype("float32"))
        return decoder_of(self._graph, assembled)

    def _placed(self, batch: Batch, pieces: int) -> Batch:
        """The batch on the devices, cut into pieces along a new first axis."""
        place = NamedSharding(self._mesh, P(None, "data"))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(place, x.reshape((pieces, -1, *x.shape[1:]))),
            batch,
        )

    def _assembled(self, trained: Parameters, frozen: Parameters, dtype: jnp.dtype) -> Parameters:
        return assemble(trained, frozen, self._config, self._level_ids, dtype)

    def _log_probabilities(
        self, trained: Parameters, frozen: Parameters, batch: Batch
    ) -> Float[Array, "E S T 11"]:
        dtype = jnp.dtype(self._config.compute_dtype)
        decoder = decoder_of(self._graph, self._assembled(trained, frozen, dtype))
        x_BTD = read_sequences(decoder, batch.prompts_EP, batch.tokens_EST, remat=self._config.remat)
        logits_BTL = decoder.unembed_by(x_BTD, trained[READOUT].astype(dtype), self._level_ids)
        return jax.nn.log_softmax(logits_BTL).reshape((*batch.tokens_EST.shape, LEVELS))

    def _loss(self, trained: Parameters, frozen: Parameters, batch: Batch) -> Float[Array, ""]:
        """Cross-entropy, summed over the tokens that count."""
        return _cross_entropy(self._log_probabilities(trained, frozen, batch), batch.levels_EST)

    def _take_step(
        self, state: TrainState, frozen: Parameters, pieces: Batch
    ) -> tuple[TrainState, StepMetrics]:
        count = jnp.maximum((pieces.levels_EST >= 0).sum(), 1).astype(jnp.float32)

        def add(total: tuple, piece: Batch) -> tuple[tuple, None]:
            found = jax.value_and_grad(self._loss)(state.trained, frozen, piece)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
        if self._config.accumulate == 1:
            total, _ = add(zero, jax.tree.map(lambda x: x[0], pieces))
        else:
            total, _ = jax.lax.scan(add, zero, pieces)
        loss, gradient = jax.tree.map(lambda x: x / count, total)
        updates, optimiser = self._optimiser.update(gradient, state.optimiser, state.trained)
        trained = jax.tree.map(jnp.add, state.trained, updates)
        metrics = StepMetrics(loss, optax.tree.norm(gradient), jnp.asarray(self._rate(state.step)))
        return TrainState(state.step + 1, trained, optimiser), metrics

    def _evaluation_sums(self, trained: Parameters, frozen: Parameters, batch: Batch) -> _Sums:
        log_probabilities_ESTL = self._log_probabilities(trained, frozen, batch)
        levels_EST = batch.levels_EST
        expected_EST = jnp.exp(log_probabilities_ESTL) @ jnp.arange(LEVELS, dtype=jnp.float32)
        expected_EST = jnp.where(levels_EST >= 0, expected_EST, 0)
        return _Sums(
            loss=_cross_entropy(log_probabilities_ESTL, levels_EST),
            levels_L=jax.nn.one_hot(levels_EST, LEVELS).sum((0, 1, 2)),  # -1 is no level
            expected=expected_EST.sum(),
            expected_squared=jnp.square(expected_EST).sum(),
            product=(expected_EST * jnp.maximum(levels_EST, 0)).sum(),
        )


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


def _cross_entropy(
    log_probabilities_ESTL: Float[Array, "E S T 11"], levels_EST: Int[Array, "E S T"]
) -> Float[Array, ""]:
    place_ESTL = jnp.maximum(levels_EST, 0)[..., None]
    at_EST = jnp.take_along_axis(log_probabilities_ESTL, place_ESTL, axis=-1)[..., 0]
    return -jnp.where(levels_EST >= 0, at_EST, 0).sum()


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
