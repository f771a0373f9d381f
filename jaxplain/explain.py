"""python -m jaxplain.explain: say in words what neurons respond to, from the exemplars in a store."""

import contextlib
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import jaxplain
from jaxplain.commands import add_flag, config_parser, parse_config, run
from jaxplain.configs.explanation import ExplainConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.choosing import choose_neurons
from jaxplain.explainers.explaining import explain_neurons, is_remote, recipe_of
from jaxplain.explainers.models import open_model
from jaxplain.explainers.puzzles import grade_puzzles
from jaxplain.explainers.replies import Reply
from jaxplain.progress import Bar, progress_bars
from jaxplain.store.explanations import (
    DATABASE_NAME,
    ExplanationDatabase,
    Sample,
    open_explanations,
)
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Split, Store, open_store
from jaxplain.summary import summarised
from jaxplain.viewer.terminal import print_explanations

_SHOWN = 5


def main(arguments: Sequence[str]) -> None:
    """Parse, explain, and show a little of what was said."""
    parser = config_parser(ExplainConfig, "explain")
    add_flag(parser, "--overwrite", "Explain again what this config has explained before.")
    add_flag(parser, "--puzzles", "Grade the explainer on puzzles with known answers; the store is not read.")
    config, options = parse_config(parser, ExplainConfig, arguments)
    with summarised(options) as summary:
        if options.puzzles:
            grades = grade_puzzles(config, Console())
            summary["puzzles"] = [
                {"truth": grade.puzzle.truth, "explanation": grade.explanation, "right": grade.right}
                for grade in grades
            ]
            return
        summary |= explain(config, overwrite=options.overwrite)
        if failed := summary["failed"]:
            raise JaxplainError(
                f"{failed} samples failed; run the same command again to ask for those, and only those."
            )


def explain(config: ExplainConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Run an explaining run; one that was interrupted goes on where it stopped.

    Returns where the explanations are, how many neurons are complete of those chosen, how many samples
    there are by what became of them, how many `failed` and are still to be asked for, and what it cost.

    Raises JaxplainError for anything in the config that does not fit the store or the provider, and
    where the budget ends.
    """
    store = open_store(config.store)
    split = store[config.split]
    _check_kinds(config, split)
    neurons = choose_neurons(config.neurons, split)
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(_open_database(config, store))
        recipe = database.recipe(recipe_of(config), jaxplain.__version__)
        if overwrite:
            database.forget(recipe, neurons)
        done = database.done(recipe)
        left = [neuron for neuron in neurons if neuron not in done]
        progress = stack.enter_context(_Watcher(config, len(neurons), len(neurons) - len(left)))
        before = database.counts(recipe)
        if left:
            model = open_model(
                config.explainer,
                config.sampling,
                database=database,
                recipe=recipe,
                stack=stack,
                fresh=overwrite,
            )
            stack.enter_context(database.keeping_claims())
            try:
                explain_neurons(config, split, left, model, database, recipe, progress.finished)
            except JaxplainError as error:
                complete = len(database.done(recipe) & set(neurons))
                raise JaxplainError(
                    f"{str(error).rstrip('.')}. {complete} of the {len(neurons)} neurons are done, "
                    f"{len(neurons) - complete} are left."
                ) from error
        progress.close()
        complete = database.done(recipe) & set(neurons)
        return _report(config, database, recipe, before, complete, neurons)


def _check_kinds(config: ExplainConfig, split: Split) -> None:
    token_space = config.prompt.style in ("token_list", "activation_values")
    needed: list[str] = list(config.signs)
    if config.prompt.style == "contrastive" and not token_space:
        needed.append("random")
    for kind in needed:
        if kind not in split.kinds:
            raise JaxplainError(
                f"this config needs exemplars of kind {kind!r}, but the store holds "
                f"{', '.join(split.kinds)}; extract it, or choose other signs or another prompt.style."
            )


def _open_database(config: ExplainConfig, store: Store) -> ExplanationDatabase:
    path = store.explanations_path if config.output is None else Path(config.output) / DATABASE_NAME
    if path is None:
        raise JaxplainError(f"the store {config.store} is not on a local disk; name a folder as output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxplainError(
            f"output is {config.output!r}, which cannot be made: {error.strerror}."
        ) from error
    return open_explanations(
        path,
        fingerprint=store.fingerprint,
        subject=store.attributes["subject"]["id"],
        experts=store[config.split].experts is not None,
    )


class _Watcher:
    """A bar over neurons, with requests a minute, tokens, cost and failures."""

    def __init__(self, config: ExplainConfig, total: int, done: int):
        make = progress_bars(enabled=config.progress)
        self._bar: Bar = make(total=total, initial=done, desc="explain", unit="neurons")
        self._remote = is_remote(config.explainer)
        self._requests, self._tokens, self._cost, self._failures = 0, 0, 0.0, 0

    def __enter__(self) -> "_Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> None:
        """A neuron is done."""
        self._bar.update()
        self._requests += len(replies)
        self._tokens += sum(reply.input_tokens + reply.output_tokens for reply in replies)
        self._cost += sum(sample.cost_usd for sample in samples)
        self._failures += sum(sample.status not in ("explained", "silent") for sample in samples)
        elapsed = self._bar.format_dict["elapsed"] or 1.0
        shown = [f"{60 * self._requests / elapsed:,.0f} requests/min", f"{self._tokens:,} tokens"]
        shown += [f"${self._cost:.4f}"] if self._remote else []
        shown += [f"{self._failures} failures"] if self._failures else []
        self._bar.set_postfix_str(", ".join(shown) if replies else "", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _report(
    config: ExplainConfig,
    database: ExplanationDatabase,
    recipe: int,
    before: dict[str, int],
    complete: set[NeuronId],
    neurons: Sequence[NeuronId],
) -> dict[str, Any]:
    counts = Counter(database.counts(recipe))
    new = counts - Counter(before)
    outcomes = ", ".join(f"{count} {status}" for status, count in sorted(new.items())) or "nothing new"
    print(f"{len(complete)} of {len(neurons)} neurons are complete ({outcomes}); {database.path}")
    if is_remote(config.explainer):
        requests, cost = database.spent(recipe)
        priced = f", at most ${cost:.4f}" if config.explainer.prices else ""
        print(f"requests so far: {requests}{priced}")
    without = counts["unparsable"] + counts["refused"] + counts["failed"]
    if without:
        reason = database.commonest_detail(recipe, "unparsable", "refused", "failed")
        print(f"{without} samples have no explanation, most often because: {reason}")
        print(f"  all reasons: sqlite3 {shlex.quote(str(database.path))} 'SELECT * FROM failures'")
    for neuron in sorted(complete)[:: max(1, len(complete) // _SHOWN)][:_SHOWN]:
        found = database.explanations(neuron.layer, neuron.index, neuron.expert)
        print_explanations([e for e in found if e.recipe == recipe], Console())
    if counts["explained"]:
        print(
            f"All of them: python -m jaxplain.export {shlex.quote(str(database.path))} --explanations all.csv"
        )
    if len(complete) < len(neurons) and not counts["failed"]:
        print(f"{len(neurons) - len(complete)} neurons are with another process.")
    requests, cost = database.spent(recipe)
    return {
        "explanations": database.path,
        "complete": len(complete),
        "neurons": len(neurons),
        "new": new,
        "failed": counts["failed"],
        "requests": requests,
        "cost_usd": cost,
    }


if __name__ == "__main__":
    run(main)
