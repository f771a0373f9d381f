"""A scoring run: simulations that are still missing, then the scores of all of them."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxplain.configs.explanation import Sign
from jaxplain.configs.finetuning import PairsConfig
from jaxplain.configs.scoring import ScoreConfig, SimulatorConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.choosing import choose_neurons
from jaxplain.progress import Progress, progress_bars
from jaxplain.scoring.bootstrap import document_weights, interval
from jaxplain.scoring.calibration import Calibration, fit_calibration
from jaxplain.scoring.judged import judge_explanations
from jaxplain.scoring.metrics import (
    METRICS,
    Measured,
    correlation_per_sequence,
    leave_out_missing,
    measure,
    measure_per_sequence,
)
from jaxplain.scoring.strips import Strip, strip_lines
from jaxplain.scoring.targets import Target, subsets, target_of
from jaxplain.simulators.finetuned import about_simulator
from jaxplain.simulators.levels import extreme_of
from jaxplain.simulators.opening import open_simulator, simulator_identity
from jaxplain.simulators.pairs import is_held_out
from jaxplain.simulators.simulation import Job, Simulation
from jaxplain.store.explanations import (
    Explanation,
    ExplanationDatabase,
    open_explanations,
)
from jaxplain.store.neuron_id import NeuronId, neuron_of
from jaxplain.store.reader import Store, open_store
from jaxplain.store.scores import Score, ScoreDatabase, StoredSimulation
from jaxplain.subjects.subject import find_folder

PER_SEQUENCE = "correlation_per_sequence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredExplanation:
    """An explanation with its scores by one simulator, on one split.

    Attributes:
        resampled: The correlation over all sequences in each resample of the documents, float64 [R]; the
            resamples are the same for every explanation.
    """

    explanation: Explanation
    simulator: str
    split: str
    scores: Sequence[Score]
    resampled: Float[np.ndarray, "R"]

    def value(self, metric: str, sequences: str) -> float:
        """One score's value; NaN where there is none."""
        found = [s.value for s in self.scores if (s.metric, s.sequences) == (metric, sequences)]
        return found[0] if found else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a run came to.

    Attributes:
        explanations: Scores, by explanation, simulator and split.
        failures: How many sequences have no simulation, by simulator, and questions no verdict, by judge.
        judged: Scores by judges.
        strips: Some sequences with their real and simulated activations.
    """

    explanations: list[ScoredExplanation]
    failures: dict[str, int]
    judged: list[Score]
    strips: list[Strip]


def score(config: ScoreConfig) -> Scored:
    """Run a scoring run; simulations that are in the database already are not made again.

    Raises JaxplainError for anything in the config that does not fit store, explanations or models.
    """
    run = _Run(config)
    with run:
        return run.score()


class _Run:
    """What all steps of a run share."""

    def __init__(self, config: ScoreConfig):
        self._config = config
        self._store = open_store(config.store)
        for split in (config.train, *self._splits()):
            self._store[split]  # says so where there is none
        self._stack = contextlib.ExitStack()
        self._progress: Progress = progress_bars(enabled=config.progress)
        self._target = functools.lru_cache(maxsize=256)(self._read_target)

    def __enter__(self) -> "_Run":
        self._database = self._stack.enter_context(_open_database(self._config, self._store))
        self._scores = ScoreDatabase(self._database)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _splits(self) -> list[str]:
        """The splits to simulate on."""
        config = self._config
        calibration = [] if config.calibration.method == "none" else [config.calibration.split]
        return [*config.splits, *calibration]

    def score(self) -> Scored:
        config = self._config
        explanations = self._explanations()
        numbers: dict[str, int] = {}
        for simulator in config.simulators:
            numbers[simulator.name] = self._scores.simulator(simulator_identity(simulator))
            self._simulate(simulator, numbers[simulator.name], explanations)
        found: list[ScoredExplanation] = []
        failures = dict.fromkeys(numbers, 0)
        total = len(explanations) * len(numbers)
        with self._progress(total=total, desc="score", unit="explanations") as bar:
            for explanation in explanations:
                for name, number in numbers.items():
                    for split in config.splits:
                        scored, failed = self._scored(explanation, name, number, split)
                        found.append(scored)
                        failures[name] += failed
                        self._scores.add_scores(number, scored.scores, top=config.top, random=config.random)
                    bar.update()
        # Without simulators there is nothing to compare.
        shown = explanations[:: max(1, len(explanations) // max(config.strips, 1))][
            : config.strips if numbers else 0
        ]
        strips = [self._strip(explanation, numbers) for explanation in shown]
        if not config.keep_simulations:
            for number in numbers.values():
                self._scores.forget_simulations(number, [explanation.id for explanation in explanations])
        judged: list[Score] = []
        for judge in config.judges:
            scores, failures[judge.name] = judge_explanations(
                config, judge, explanations, self._store, self._database, self._progress
            )
            judged += scores
        return Scored(explanations=found, failures=failures, judged=judged, strips=strips)

    def _explanations(self) -> list[Explanation]:
        config = self._config
        neurons = set(choose_neurons(config.neurons, self._store[config.splits[-1]]))
        if config.neurons.held_out_of is not None:
            pairs = _pairs_of(config.neurons.held_out_of)
            neurons = {n for n in neurons if is_held_out(n.layer, n.index, pairs, expert=n.expert)}
        found = [
            explanation
            for explanation in self._database.each_explanation()
            if neuron_of(explanation) in neurons
            and explanation.sign in config.signs
            and (not config.providers or explanation.provider in config.providers)
        ]
        if not found:
            raise JaxplainError(
                "there are no explanations of the chosen neurons, signs and providers; make some with "
                "python -m jaxplain.explain, or choose others."
            )
        return found

    def _read_target(self, neuron: NeuronId, sign: Sign, split: str) -> Target:
        found = self._store[split].neuron_called(neuron)
        return target_of(found, sign, top=self._config.top, random=self._config.random)

    def _target_of(self, explanation: Explanation, split: str) -> Target:
        return self._target(neuron_of(explanation), _sign(explanation), split)

    def _simulate(self, simulator: SimulatorConfig, number: int, explanations: Sequence[Explanation]) -> None:
        """Have a simulator make what the database lacks."""
        wanted: list[tuple[Explanation, str, list[int]]] = []
        with self._progress(total=len(explanations), desc="look up", unit="explanations") as bar:
            for explanation, split in itertools.product(bar.over(explanations), self._splits()):
                kept = self._scores.simulations(number, explanation.id, split)
                missing = [
                    place
                    for place, sequence in enumerate(self._target_of(explanation, split).sequences)
                    if sequence not in kept or kept[sequence].expected is None
                ]
                if missing:
                    wanted.append((explanation, split, missing))
        if not wanted:
            return

        def jobs() -> Iterator[Job]:
            for explanation, split, missing in wanted:
                tokens = self._target_of(explanation, split).tokens
                job = Job(
                    layer=explanation.layer,
                    expert=explanation.expert,
                    index=explanation.index,
                    sign=_sign(explanation),
                    explanation=explanation.text,
                    sequences=[tokens[place] for place in missing],
                )
                of[id(job)] = (job, explanation, split, missing)
                yield job

        of: dict[int, tuple[Job, Explanation, str, list[int]]] = {}
        total = sum(len(missing) for _, _, missing in wanted)
        with contextlib.ExitStack() as stack:
            model = open_simulator(
                simulator, self._store, train=self._config.train, database=self._database, stack=stack
            )
            bar = stack.enter_context(
                self._progress(total=total, desc=f"simulate: {simulator.name}", unit="sequences")
            )
            for job, results in model.simulate(jobs()):
                _, explanation, split, missing = of.pop(id(job))
                sequences = self._target_of(explanation, split).sequences
                self._scores.add_simulations(
                    number,
                    explanation.id,
                    split,
                    {
                        sequences[place]: StoredSimulation(expected=result.expected)
                        if isinstance(result, Simulation)
                        else StoredSimulation(expected=None, detail=result.detail, reply=result.reply)
                        for place, result in zip(missing, results, strict=True)
                    },
                )
                bar.update(len(missing))

    def _predicted(self, explanation: Explanation, number: int, split: str) -> tuple[np.ndarray, int]:
        """Expected levels at every token of the target, NaN for none, and the failed sequences."""
        target = self._target_of(explanation, split)
        kept = self._scores.simulations(number, explanation.id, split)
        parts, failed = [np.zeros(0, np.float32)], 0
        for sequence, tokens in zip(target.sequences, target.tokens, strict=True):
            expected = kept[sequence].expected
            failed += expected is None
            parts.append(np.full(len(tokens), np.nan, np.float32) if expected is None else expected)
        return np.concatenate(parts), failed

    def _calibration(self, explanation: Explanation, number: int) -> Calibration:
        config = self._config.calibration
        neuron = self._store[self._config.train].neuron_called(neuron_of(explanation))
        extreme = extreme_of(neuron, _sign(explanation))
        if config.method == "none":
            nothing = np.zeros(0, np.float32)
            return fit_calibration("none", nothing, nothing, extreme=extreme)
        predicted_N, _ = self._predicted(explanation, number, config.split)
        truth_N = self._target_of(explanation, config.split).truth_N
        return fit_calibration(config.method, predicted_N, truth_N, extreme=extreme)

    def _scored(
        self, explanation: Explanation, name: str, number: int, split: str
    ) -> tuple[ScoredExplanation, int]:
        config = self._config
        target = self._target_of(explanation, split)
        levels_N, failed = self._predicted(explanation, number, split)
        try:
            predicted_N, unfit = self._calibration(explanation, number)(levels_N), None
        except JaxplainError as error:  # an explanation whose simulations all failed
            predicted_N, unfit = np.full(len(levels_N), np.nan), str(error)
        make = functools.partial(
            Score,
            explanation=explanation.id,
            sign=explanation.sign,
            simulator=name,
            split=split,
            calibration=config.calibration.method,
        )
        names = subsets(config.top, config.random)
        scores: list[Score] = []
        resampled = np.zeros(0)
        for sequences in names:
            kept_N = target.subset(sequences)
            truth_M, predicted_M, place_M = (
                target.truth_N[kept_N],
                predicted_N[kept_N],
                target.place_N[kept_N],
            )
            counted = leave_out_missing(truth_M, predicted_M)
            documents_N = target.document_N[kept_N][counted.counted_M]
            weight_RN = document_weights(documents_N, config.bootstrap.resamples, config.bootstrap.seed)
            measured: dict[str, tuple[Measured, Callable[[], np.ndarray]]] = {
                metric: (
                    measure(metric, truth_M, predicted_M),
                    functools.partial(METRICS[metric], counted.truth_N, counted.predicted_N, weight_RN),
                )
                for metric in METRICS
            }
            measured[PER_SEQUENCE] = (
                measure_per_sequence(truth_M, predicted_M, place_M),
                functools.partial(
                    correlation_per_sequence,
                    counted.truth_N,
                    counted.predicted_N,
                    place_M[counted.counted_M],
                    weight_RN,
                ),
            )
            for metric, (one, resample) in measured.items():
                low, high = math.nan, math.nan
                if metric in config.bootstrap.metrics and config.bootstrap.resamples and one.reason is None:
                    values_R = resample()
                    low, high = interval(values_R, config.bootstrap.level)
                    if metric == "correlation" and sequences == names[0]:
                        resampled = values_R
                scores.append(
                    make(
                        sequences=sequences,
                        metric=metric,
                        value=one.value,
                        reason=unfit or one.reason,
                        low=low,
                        high=high,
                    )
                )
        if not len(resampled):
            resampled = np.full(config.bootstrap.resamples, np.nan)
        scored = ScoredExplanation(
            explanation=explanation, simulator=name, split=split, scores=scores, resampled=resampled
        )
        return scored, failed

    def _strip(self, explanation: Explanation, numbers: Mapping[str, int]) -> Strip:
        """The strongest sequence of the split that is reported on."""
        split = self._config.splits[-1]
        target = self._target_of(explanation, split)
        first_N = target.place_N == 0
        simulated = {
            name: self._predicted(explanation, number, split)[0][first_N] for name, number in numbers.items()
        }
        return Strip(
            neuron=neuron_of(explanation),
            sign=explanation.sign,
            explanation=explanation.text,
            lines=strip_lines(self._store.vocabulary, target.tokens[0], target.truth_N[first_N], simulated),
        )


def _sign(explanation: Explanation) -> Sign:
    return "max" if explanation.sign == "max" else "min"


def _open_database(config: ScoreConfig, store: Store) -> ExplanationDatabase:
    path = store.database_path(config.explanations)
    if path is None:
        raise JaxplainError(f"the store {config.store} is not on a local disk; name explanations.")
    if not path.exists():
        raise JaxplainError(
            f"there are no explanations at {path}; make some with python -m jaxplain.explain."
        )
    return open_explanations(
        path,
        fingerprint=store.fingerprint,
        subject=store.attributes["subject"]["id"],
        experts=store[config.train].experts is not None,
    )


def _pairs_of(simulator: str) -> PairsConfig:
    about: dict[str, Any] | None = about_simulator(find_folder(simulator, field="neurons.held_out_of"))
    if about is None:
        raise JaxplainError(
            f"neurons.held_out_of is {simulator!r}, which does not say which neurons it was trained on."
        )
    return PairsConfig(**about["pairs"])
