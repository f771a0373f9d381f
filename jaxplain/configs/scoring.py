"""What `python -m jaxplain.score` is told."""

import dataclasses
from typing import Literal

from jaxplain.configs.checks import require
from jaxplain.configs.explanation import (
    ChosenNeuronsConfig,
    ExplainerConfig,
    LocalModelConfig,
    SamplingConfig,
    Sign,
)
from jaxplain.configs.simulation import ReadoutConfig

SimulatorKind = Literal["finetuned", "prompted", "logprob_free", "token_table"]
Metric = Literal[
    "correlation",
    "correlation_per_sequence",
    "r2_centred",
    "r2_uncentred",
    "absolute_deviation_explained_mean",
    "absolute_deviation_explained_median",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedConfig:
    """How a model that was not finetuned is asked.

    Args:
        few_shot: Solved examples before the question.
        unknown: What stands where an activation is to be predicted.
    """

    few_shot: int = 3
    unknown: str = "unknown"

    def __post_init__(self) -> None:
        require(self.few_shot >= 0, "simulators.prompted.few_shot", self.few_shot, "give 0 or more")
        require(bool(self.unknown.strip()), "simulators.prompted.unknown", self.unknown, "name a word")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """What predicts activations from an explanation.

    Args:
        name: What it is called in tables and in the database.
        kind: finetuned reads the levels' logits at the sequence's own tokens; prompted reads the digits'
            after each token of a list; logprob_free has Gemini or a server write activations as JSON;
            token_table looks tokens' mean activations up, whatever the explanation says.
        model: For finetuned and prompted: a finetuned simulator's folder, a packaged subject, a hub id
            or another folder.
        local: How such a model is run.
        readout: For finetuned: how a simulator is asked that was not made by jaxplain.
        prompted: For prompted.
        remote: For logprob_free: the provider, as in `explainer` of a config for jaxplain.explain.
        sampling: For logprob_free.
    """

    name: str
    kind: SimulatorKind
    model: str | None = None
    local: LocalModelConfig = LocalModelConfig()
    readout: ReadoutConfig = ReadoutConfig()
    prompted: PromptedConfig = PromptedConfig()
    remote: ExplainerConfig | None = None
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=4000)

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "simulators.name", self.name, "give each simulator a name")
        local = self.kind in ("finetuned", "prompted")
        require(
            local == bool(self.model),
            "simulators.model",
            self.model,
            "finetuned and prompted simulators need one, others have none",
        )
        require(
            (self.kind == "logprob_free") == (self.remote is not None),
            "simulators.remote",
            self.remote,
            "kind logprob_free needs it, others have none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A language model that says on which excerpts a neuron fires, given its explanation.

    Args:
        name: What it is called in tables and in the database.
        test: detection shows excerpts on which the neuron fires, and others; fuzzing shows tokens
            highlighted, rightly or wrongly (both as EleutherAI's delphi has them).
        model: The provider, as in `explainer` of a config for jaxplain.explain.
        sampling: How its replies are drawn.
        firing: Excerpts on which the neuron fires, the strongest ones, at most.
        silent: Random excerpts on which it does not, at most.
        threshold: The neuron fires where its activation is at least this share of its extreme.
        tokens: Tokens of an excerpt that are shown.
        at_once: Excerpts in one request.
    """

    name: str
    test: Literal["detection", "fuzzing"]
    model: ExplainerConfig
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=200)
    firing: int = 10
    silent: int = 10
    threshold: float = 0.3
    tokens: int = 32
    at_once: int = 5

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "judges.name", self.name, "give each judge a name")
        require(
            self.model.provider != "token_table",
            "judges.model.provider",
            self.model.provider,
            "a judge needs a language model",
        )
        for field in ("firing", "silent", "tokens", "at_once"):
            require(getattr(self, field) >= 1, f"judges.{field}", getattr(self, field), "give 1 or more")
        require(
            0 < self.threshold < 1,
            "judges.threshold",
            self.threshold,
            "give a share between 0 and 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How expected levels become activations. Correlations do not depend on `none` and `linear`.

    Args:
        method: none takes a level for a tenth of the neuron's extreme; linear fits a line; percentile gives
            the activation that is as rare as the level.
        split: Where to fit; never a split that is scored.
    """

    method: Literal["none", "linear", "percentile"] = "none"
    split: str = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """Confidence intervals, by drawing documents anew.

    Args:
        resamples: Draws; 0 for no intervals.
        level: Of the intervals.
        metrics: Which scores get an interval.
        seed: Of the draws.
    """

    resamples: int = 200
    level: float = 0.95
    metrics: list[Metric] = dataclasses.field(default_factory=lambda: ["correlation"])
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.resamples >= 0, "bootstrap.resamples", self.resamples, "give 0 or more")
        require(0 < self.level < 1, "bootstrap.level", self.level, "give a number between 0 and 1")
        require(self.seed >= 0, "bootstrap.seed", self.seed, "give a number from 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredNeuronsConfig(ChosenNeuronsConfig):
    """Which neurons' explanations to score.

    Args:
        layers: A list of layers by number from 0; all; or a range start:stop:step such as 0:30:3.
        indices: Neurons of each layer, or of each of the experts, given in the same ways.
        experts: Of a mixture of experts, the experts of each layer, given in the same ways; where indices are
            given, experts must be.
        file: A .npy of (layer, neuron) pairs, integers [N, 2], in place of the others; for a mixture of
            experts of (layer, expert, neuron), [N, 3].
        by: Take the neurons with the highest value of a statistic, or random ones.
        count: How many of them to take; needs `by`.
        seed: Of the random choice.
        held_out_of: Of all these, only neurons that this finetuned simulator was not trained on.
    """

    held_out_of: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score explanations: let simulators predict activations from them, and compare with the real ones.

    Args:
        store: The run's folder, or the store's path or URL.
        simulators: What predicts activations; every explanation is scored with each.
        judges: Language models that score explanations in another way; every explanation by each.
        explanations: Folder of explanations.sqlite, or the file, if not beside the store.
        train: The split that explanations were made from; token tables and extremes are from there.
        splits: Which splits' sequences to score on; the last is the one that best explanations are
            reported on, and the one before it, if any, the one that they are chosen on.
        neurons: Which neurons' explanations to score.
        signs: Explanations of what drives neurons up (max), down (min), or both.
        providers: Explanations by these alone; all where empty.
        top: The strongest sequences to score on.
        random: Random sequences to score on.
        calibration: How expected levels become activations.
        bootstrap: Confidence intervals.
        strips: Explanations for which the report shows real and simulated activations.
        keep_simulations: Keep every simulation in the database, so that scores can be computed anew
            without a model.
        output: Folder for the report, if not `reports` beside the database.
        progress: Show progress bars.
    """

    store: str
    simulators: list[SimulatorConfig] = dataclasses.field(default_factory=list)
    judges: list[JudgeConfig] = dataclasses.field(default_factory=list)
    explanations: str | None = None
    train: str = "train"
    splits: list[str] = dataclasses.field(default_factory=lambda: ["valid"])
    neurons: ScoredNeuronsConfig = ScoredNeuronsConfig()
    signs: list[Sign] = dataclasses.field(default_factory=lambda: ["max", "min"])
    providers: list[str] = dataclasses.field(default_factory=list)
    top: int = 10
    random: int = 10
    calibration: CalibrationConfig = CalibrationConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    strips: int = 10
    keep_simulations: bool = True
    output: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for field in ("splits", "signs"):
            value = getattr(self, field)
            require(
                bool(value) and len(set(value)) == len(value),
                field,
                value,
                "name one or more, and none twice",
            )
        require(
            self.train not in self.splits,
            "splits",
            self.splits,
            f"leave out {self.train}, which was explained",
        )
        names = [one.name for one in (*self.simulators, *self.judges)]
        require(
            bool(names) and len(set(names)) == len(names),
            "simulators",
            names,
            "list one or more, or judges, with different names",
        )
        for field in ("top", "random", "strips"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "give 0 or more")
        require(self.top + self.random >= 1, "top", self.top, "take some top or random sequences")
        require(
            self.calibration.method == "none" or self.calibration.split not in self.splits,
            "calibration.split",
            self.calibration.split,
            "calibrate on a split that is not scored",
        )
