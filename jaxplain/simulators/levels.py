"""Real activations on the simulators' scale: tenths of the neuron's extreme, the other sign as 0."""

import numpy as np
from jaxtyping import Float, Int

from jaxplain.configs.explanation import Sign
from jaxplain.simulators.simulation import LEVELS
from jaxplain.store.reader import Neuron

NOT_COUNTED = -1


def rectified(activations: Float[np.ndarray, "..."], sign: Sign) -> Float[np.ndarray, "..."]:
    """Activations of one sign, counted upwards; those of the other are 0, and NaN stays."""
    return np.maximum(activations if sign == "max" else -activations, 0.0)


def extreme_of(neuron: Neuron, sign: Sign) -> float:
    """The neuron's furthest activation in a direction, over the split; 0 where it has none."""
    strongest = neuron.exemplars(sign, limit=1)
    return max(strongest[0].score * (1 if sign == "max" else -1), 0.0) if strongest else 0.0


def discretised(activations: Float[np.ndarray, "..."], sign: Sign, extreme: float) -> Int[np.ndarray, "..."]:
    """The nearest level of each activation, int8; -1 where a token does not count.

    Raises ValueError unless `extreme` is positive.
    """
    if not extreme > 0:
        raise ValueError(f"the extreme is {extreme}, and levels are its tenths")
    levels = np.rint(np.minimum(rectified(activations, sign) / extreme, 1.0) * (LEVELS - 1))
    return np.where(np.isnan(levels), NOT_COUNTED, np.nan_to_num(levels)).astype(np.int8)
