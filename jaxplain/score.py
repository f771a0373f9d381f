"""python -m jaxplain.score: how well explanations predict what neurons do."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jaxplain.commands import config_parser, parse_config, require_plots, run
from jaxplain.configs.scoring import JudgeConfig, ScoreConfig
from jaxplain.errors import JaxplainError
from jaxplain.scoring.html_report import write_report
from jaxplain.scoring.judged import HEADLINE as JUDGED_HEADLINE
from jaxplain.scoring.report import Row, best_explanations, summarise
from jaxplain.scoring.scoring import Scored, score
from jaxplain.store.reader import open_store
from jaxplain.summary import summarised

_FILE_WIDTH = 120  # columns, where the output is no terminal


def main(arguments: Sequence[str]) -> None:
    """Parse, score, and show the means."""
    parser = config_parser(ScoreConfig, "score")
    config, options = parse_config(parser, ScoreConfig, arguments)
    require_plots()
    if config.output is not None:
        _make(Path(config.output))  # before hours of scoring
    with summarised(options) as summary:
        summary |= _score(config)


def _score(config: ScoreConfig) -> dict[str, Any]:
    """Score, say what came of it, and sum it up."""
    scored = score(config)
    rows = summarise(scored.explanations, config.bootstrap)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    if rows:
        console.print(_table(rows, config))
    judged = {judge.name: _say_judged(scored, judge, console) for judge in config.judges}
    for name, failed in scored.failures.items():
        if failed:
            console.print(f"{name}: {failed} questions without an answer; the same command asks them again")
    best = _say_best(scored, config, console) if len(config.splits) > 1 else {}
    folder, report = _report_folder(config), None
    if rows:
        report = write_report(folder, scored, rows, config)
        console.print(f"Report: {report}", soft_wrap=True)
    return {
        "scores": [dataclasses.asdict(row) for row in rows],
        "balanced_accuracy": judged,
        "best_explanations": best,
        "failures": scored.failures,
        "report": report,
    }


def _table(rows: Sequence[Row], config: ScoreConfig) -> Table:
    table = Table(title="mean correlation of simulated and real activations", box=SIMPLE)
    for name in ("split", "explained by", "simulator"):
        table.add_column(name)
    for name in (
        "explanations",
        "correlation",
        f"{config.bootstrap.level:.0%} interval",
        "top",
        "random",
        "without",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.split,
            row.provider,
            row.simulator,
            f"{row.explanations:,}",
            _number(row.correlation),
            f"{_number(row.low)} to {_number(row.high)}",
            _number(row.top),
            _number(row.random),
            f"{row.missing:,}",
        )
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _say_judged(scored: Scored, judge: JudgeConfig, console: Console) -> float:
    """A judge's mean balanced accuracy, which is printed."""
    metric = f"{judge.test}_{JUDGED_HEADLINE}"
    values = [s.value for s in scored.judged if (s.simulator, s.metric) == (judge.name, metric)]
    finite = [value for value in values if not math.isnan(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    console.print(
        f"{judge.test} by {judge.name}: mean balanced accuracy {_number(mean)} over {len(finite)} of "
        f"{len(values)} explanations (chance is 0.5)"
    )
    return mean


def _say_best(scored: Scored, config: ScoreConfig, console: Console) -> dict[str, float]:
    """The mean correlation of the best explanations by each simulator, which is printed."""
    choose_on, report_on = config.splits[-2:]
    found = best_explanations(scored.explanations, choose_on=choose_on, report_on=report_on)
    means = {}
    for simulator in config.simulators:
        values = [one.reported for one in found if one.simulator == simulator.name]
        finite = [value for value in values if not math.isnan(value)]
        if finite:
            means[simulator.name] = sum(finite) / len(finite)
            console.print(
                f"best explanation per neuron and sign by {simulator.name}, chosen on {choose_on}: "
                f"mean correlation {means[simulator.name]:.3f} on {report_on} "
                f"({len(finite)} neurons and signs)"
            )
    return means


def _report_folder(config: ScoreConfig) -> Path:
    database = open_store(config.store).database_path(config.explanations)
    assert database is not None  # what was scored
    return _make(database.parent / "reports" if config.output is None else Path(config.output))


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxplainError(f"output is {str(folder)!r}, which cannot be made: {error.strerror}.") from error
    return folder


if __name__ == "__main__":
    run(main)
