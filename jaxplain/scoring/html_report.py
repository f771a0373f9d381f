"""The report of a scoring run: scores.html, which needs nothing beside it, scores.png and scores.csv."""

import base64
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2

from jaxplain.configs.scoring import ScoreConfig
from jaxplain.errors import JaxplainError
from jaxplain.scoring.report import HEADLINE, Row, by_layer, draw_scores
from jaxplain.scoring.scoring import Scored, ScoredExplanation

_PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxplain.scoring", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_report(folder: Path, scored: Scored, rows: Sequence[Row], config: ScoreConfig) -> Path:
    """Write the three files, and give the path of the page.

    Raises JaxplainError where they cannot be written.
    """
    page = folder / "scores.html"
    try:
        picture = folder / "scores.png"
        draw_scores(scored.explanations, picture)
        _write_table(scored.explanations, folder / "scores.csv")
        layers = {
            f"{split}, {simulator}": means
            for (split, simulator), means in by_layer(scored.explanations).items()
        }
        text = _PAGE.get_template("report.html").render(
            rows=rows,
            layers=layers,
            layer_numbers=sorted({layer for means in layers.values() for layer in means}),
            picture=base64.b64encode(picture.read_bytes()).decode(),
            strips=scored.strips,
            config=config,
            headline=HEADLINE,
        )
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise JaxplainError(f"the report could not be written to {folder}: {error.strerror}.") from error
    return page


def _write_table(scored: Sequence[ScoredExplanation], path: Path) -> None:
    """Every score, one a line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for one in scored:
            e = one.explanation
            about = {
                "layer": e.layer,
                "expert": e.expert,
                "index": e.index,
                "provider": e.provider,
                "style": e.style,
                "text": e.text,
            }
            for score in one.scores:
                line = about | dataclasses.asdict(score)
                if writer is None:
                    writer = csv.DictWriter(file, list(line))
                    writer.writeheader()
                writer.writerow(line)
