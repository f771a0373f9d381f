"""What pages show of a database of explanations: words found, scores of all neurons, strips of one."""

import dataclasses
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxplain.errors import JaxplainError, first_line
from jaxplain.store.explanations import Explanation, ExplanationDatabase
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.scores import Score, StoredSimulation, read_scores

HEADLINE = ("correlation", "top+random")
_WORD = re.compile(r'"([^"]*)"|([^\s"]+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    """One kind of score that explanations have."""

    simulator: str
    split: str
    sequences: str
    metric: str
    calibration: str

    @property
    def name(self) -> str:
        """What addresses call it."""
        return "score|" + "|".join(dataclasses.astuple(self))

    @property
    def label(self) -> str:
        """What pages call it."""
        calibration = "" if self.calibration == "none" else f", {self.calibration}"
        return f"{self.metric} by {self.simulator} ({self.sequences} of {self.split}{calibration})"

    @property
    def is_headline(self) -> bool:
        """Whether it is the one to look at first."""
        return (self.metric, self.sequences) == HEADLINE


def _rows(database: ExplanationDatabase, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """What a statement gives; nothing where its table is not there yet."""
    try:
        return database.connection.execute(statement, values).fetchall()
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return []
        raise JaxplainError(f"{database.path} could not be read: {first_line(error)}.") from error


def score_columns(database: ExplanationDatabase) -> list[ScoreColumn]:
    """The kinds of scores that there are, those to look at first before the others."""
    rows = _rows(database, "SELECT DISTINCT name, split, sequences, metric, calibration FROM scores")
    names = [field.name for field in dataclasses.fields(ScoreColumn)]
    found = [ScoreColumn(**dict(zip(names, row, strict=True))) for row in rows]
    return sorted(found, key=lambda column: (not column.is_headline, dataclasses.astuple(column)))


def best_scores(
    database: ExplanationDatabase, column: ScoreColumn
) -> tuple[Int[np.ndarray, "M A"], Float[np.ndarray, "M"]]:
    """Neurons, by name, and the highest score that one of their explanations has."""
    names = ", ".join(database.neuron_columns)
    rows = _rows(
        database,
        f"SELECT {names}, max(value) FROM scores JOIN samples ON samples.id = explanation "
        "WHERE value IS NOT NULL AND name = ? AND split = ? AND scores.sequences = ? AND metric = ? "
        f"AND calibration = ? GROUP BY {names}",
        dataclasses.astuple(column),
    )
    width = len(database.neuron_columns)
    name_MA = np.array([row[:width] for row in rows], np.int64).reshape(-1, width)
    return name_MA, np.array([row[width] for row in rows], np.float64)


def neurons_about(database: ExplanationDatabase, words: str) -> Int[np.ndarray, "M A"]:
    """Names of the neurons with an explanation that has all of some words, the best first.

    Words between quotation marks are a phrase; a word that ends in * stands for all that begin so.
    """
    query = full_text_query(words)
    width = len(database.neuron_columns)
    if not query:
        return np.zeros((0, width), np.int64)
    names = ", ".join(database.neuron_columns)
    rows = _rows(
        database,
        f"SELECT {names} FROM explanations_text JOIN samples ON samples.id = explanations_text.rowid "
        "WHERE explanations_text MATCH ? ORDER BY rank, samples.id",
        (query,),
    )
    return np.array(list(dict.fromkeys(rows)), np.int64).reshape(-1, width)


def full_text_query(words: str) -> str:
    """Words as SQLite's FTS5 understands them; nothing in them is an operator but the star."""
    parts = []
    for phrase, word in _WORD.findall(words.replace("\0", " ")):
        text = phrase or word.rstrip("*")
        if any(map(str.isalnum, text)):
            parts.append(f'"{text}"' + (" *" if word.endswith("*") else ""))
    return " ".join(parts)


def counts(database: ExplanationDatabase) -> list[tuple[str, str | None, str, str, int]]:
    """Provider, model, style, status and number of samples."""
    rows = _rows(
        database,
        "SELECT config, model, status, count(*) FROM samples JOIN recipes ON recipes.id = recipe "
        "GROUP BY recipe, model, status ORDER BY recipe, model, status",
    )
    found: dict[tuple[str, str | None, str, str], int] = {}
    for config, model, status, number in rows:
        made_by = json.loads(config)
        key = (_of(made_by, "explainer", "provider"), model, _of(made_by, "prompt", "style"), status)
        found[key] = found.get(key, 0) + number
    return [(*key, number) for key, number in found.items()]


def _of(config: Mapping[str, Any], block: str, field: str) -> str:
    return str((config.get(block) or {}).get(field, ""))


def explained_neurons(database: ExplanationDatabase) -> list[NeuronId]:
    """The neurons with an explanation."""
    names = ", ".join(database.neuron_columns)
    return [NeuronId(row) for row in _rows(database, f"SELECT DISTINCT {names} FROM explanations")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explained:
    """An explanation of a neuron, its scores, and what simulators made of it in one split.

    Attributes:
        simulations: By simulator and sequence.
    """

    explanation: Explanation
    scores: Sequence[Score]
    simulations: Mapping[str, Mapping[int, StoredSimulation]]

    @property
    def headlines(self) -> list[Score]:
        """The scores to look at first, one by each simulator and split; all where there is no such."""
        return [s for s in self.scores if (s.metric, s.sequences) == HEADLINE] or list(self.scores)


def explained(database: ExplanationDatabase, neuron: NeuronId, split: str) -> Iterator[Explained]:
    """A neuron's explanations."""
    scores = list(read_scores(database, neuron.layer, neuron.index, neuron.expert))
    for explanation in database.explanations(neuron.layer, neuron.index, neuron.expert):
        yield Explained(
            explanation=explanation,
            scores=[score for score in scores if score.explanation == explanation.id],
            simulations=_simulations(database, explanation.id, split),
        )


def _simulations(
    database: ExplanationDatabase, explanation: int, split: str
) -> dict[str, dict[int, StoredSimulation]]:
    named = dict(
        _rows(
            database,
            "SELECT DISTINCT simulator, name FROM scores WHERE explanation = ? ORDER BY name DESC",
            (explanation,),
        )
    )
    found: dict[str, dict[int, StoredSimulation]] = {}
    rows = _rows(
        database,
        "SELECT simulator, sequence, expected, detail FROM simulations "
        "WHERE explanation = ? AND split = ? ORDER BY simulator, sequence",
        (explanation, split),
    )
    for simulator, sequence, blob, detail in rows:
        expected = None if blob is None else np.frombuffer(blob, np.float16).astype(np.float32)
        name = named.get(simulator, f"simulator {simulator}")
        found.setdefault(name, {})[sequence] = StoredSimulation(expected=expected, detail=detail)
    return found
