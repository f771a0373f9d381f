"""What a simulator is asked, and what it answers: predicted activations on a scale from 0 to 10."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jaxplain.configs.explanation import Sign

LEVELS = 11
"""Simulated activations are levels 0 to 10: tenths of the neuron's extreme (Bills et al., 2023)."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """An explanation, and sequences of the subject's tokens at which to predict activations."""

    layer: int
    index: int
    expert: int | None = None
    sign: Sign
    explanation: str
    sequences: Sequence[Int[np.ndarray, "_"]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """Activations predicted for one sequence.

    Attributes:
        expected: Expected level at each token, from 0 to 10, float32 [T]; NaN where there is none.
        probabilities: The probability of each level, float32 [T, 11], where the simulator has them.
    """

    expected: Float[np.ndarray, "T"]
    probabilities: Float[np.ndarray, "T 11"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """Why there is no simulation of a sequence, and the reply. It counts as missing, never as 0."""

    detail: str
    reply: str | None = None


@runtime_checkable
class Simulator(Protocol):
    """What predicts activations."""

    def simulate(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Simulation | Failure]]]:
        """Jobs with what came of each of their sequences, in whatever order they are finished."""
        ...
