"""The baseline: each token's mean activation in the train split, whatever the explanation says."""

from collections.abc import Iterator

import numpy as np

from jaxplain.explainers.token_means import TokenMeans, token_means
from jaxplain.simulators.levels import extreme_of
from jaxplain.simulators.simulation import LEVELS, Failure, Job, Simulation
from jaxplain.store.neuron_id import neuron_of
from jaxplain.store.reader import Split


class TokenTableSimulator:
    """Looks tokens up. A token that the table lacks has the neuron's overall mean."""

    def __init__(self, train: Split):
        self._train = train

    def simulate(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Simulation | Failure]]]:
        """Jobs with their simulations, in order."""
        for job in jobs:
            neuron = self._train.neuron_called(neuron_of(job))
            extreme = extreme_of(neuron, job.sign)
            if not extreme > 0:
                yield job, [Failure(detail="the neuron has no activation of this sign")] * len(job.sequences)
                continue
            overall = neuron.stats.mean if job.sign == "max" else -neuron.stats.mean
            table = token_means(neuron, job.sign)
            yield (
                job,
                [
                    Simulation(expected=_levels(table, sequence, overall) / extreme * (LEVELS - 1))
                    for sequence in job.sequences
                ],
            )


def _levels(table: TokenMeans, sequence: np.ndarray, overall: float) -> np.ndarray:
    means = dict(zip(table.tokens.tolist(), table.means.tolist(), strict=True))
    found = [means.get(token, overall) for token in sequence.tolist()]
    return np.maximum(np.array(found, np.float32), 0)
