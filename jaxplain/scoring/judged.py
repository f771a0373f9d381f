"""Scores by judges: language models that say on which excerpts an explained neuron fires."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import jaxplain
from jaxplain.configs.scoring import JudgeConfig, ScoreConfig
from jaxplain.explainers.models import open_model
from jaxplain.progress import Progress
from jaxplain.scoring.judging import (
    Trial,
    detection_questions,
    fuzzing_questions,
    judge,
    judged_score,
)
from jaxplain.simulators.levels import extreme_of
from jaxplain.simulators.opening import remote_identity
from jaxplain.store.explanations import Explanation, ExplanationDatabase
from jaxplain.store.neuron_id import neuron_of
from jaxplain.store.reader import Store
from jaxplain.store.scores import Score, ScoreDatabase

HEADLINE = "balanced_accuracy"
_METRICS = (HEADLINE, "accuracy", "precision", "recall", "true_negative_rate", "f1")


def judge_explanations(
    config: ScoreConfig,
    judge_config: JudgeConfig,
    explanations: Sequence[Explanation],
    store: Store,
    database: ExplanationDatabase,
    progress: Progress,
) -> tuple[list[Score], int]:
    """Scores of all explanations by one judge, and how many questions it did not answer.

    Those are left out of the scores; the next run asks them again, and others come from the cache.

    Raises JaxplainError where the model does.
    """
    identity = {"kind": judge_config.test, **remote_identity(judge_config.model, judge_config.sampling)}
    number = ScoreDatabase(database).simulator(identity)
    asked: dict[int, tuple[Explanation, str]] = {}

    def trials() -> Iterator[Trial]:
        for explanation in explanations:
            for split in config.splits:
                trial = _trial(explanation, judge_config, store, train=config.train, split=split)
                asked[id(trial)] = (explanation, split)
                yield trial

    found: list[Score] = []
    unanswered = 0
    with contextlib.ExitStack() as stack:
        recipe = database.recipe(identity, jaxplain.__version__)
        model = open_model(
            judge_config.model, judge_config.sampling, database=database, recipe=recipe, stack=stack
        )
        assert model is not None  # the config refuses token tables
        total = len(explanations) * len(config.splits)
        bar = stack.enter_context(
            progress(total=total, desc=f"judge: {judge_config.name}", unit="explanations")
        )
        seed = judge_config.sampling.seed
        for trial, verdicts in judge(model, trials(), at_once=judge_config.at_once, seed=seed):
            explanation, split = asked.pop(id(trial))
            result = judged_score(trial.questions, verdicts)
            unanswered += result.failed
            scores = [
                Score(
                    explanation=explanation.id,
                    sign=explanation.sign,
                    simulator=judge_config.name,
                    split=split,
                    sequences="top+random",
                    metric=f"{judge_config.test}_{metric}",
                    calibration="none",
                    value=getattr(result, metric),
                    reason=result.reasons.get(metric),
                    low=math.nan,
                    high=math.nan,
                )
                for metric in _METRICS
            ]
            ScoreDatabase(database).add_scores(
                number, scores, top=judge_config.firing, random=judge_config.silent
            )
            found += scores
            bar.update()
    return found, unanswered


def _trial(explanation: Explanation, config: JudgeConfig, store: Store, *, train: str, split: str) -> Trial:
    sign = "max" if explanation.sign == "max" else "min"
    name = neuron_of(explanation)
    neuron = store[split].neuron_called(name)
    extreme = extreme_of(store[train].neuron_called(name), sign)
    ask = detection_questions if config.test == "detection" else fuzzing_questions
    questions = functools.partial(
        ask,
        neuron.exemplars(sign, limit=config.firing),
        neuron.exemplars("random"),
        sign,
        quantiles=1,
        per_quantile=config.firing,
        silent=config.silent,
        pieces=config.tokens,
        # Neither depends on the explanation, so that all of a neuron's get the same questions.
        seed=config.sampling.seed + 1_000_003 * name.layer + 10_007 * (name.expert or 0) + name.index,
    )
    return Trial(
        layer=explanation.layer,
        expert=explanation.expert,
        index=explanation.index,
        sign=explanation.sign,
        test=config.test,
        explanation=explanation.text,
        questions=questions(threshold=config.threshold * extreme) if extreme > 0 else [],
    )
