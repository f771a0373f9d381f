"""Simulations and scores, in the database of the explanations that they are about.

    simulators(config)            one row for every simulator that was used, whatever it was called
    simulations(simulator, explanation, split, sequence, expected, ...)
                                  expected levels, float16, 0 to 10 and NaN for none; or why there are none
    scores(simulator, explanation, split, sequences, metric, calibration, ...)
                                  a value with its confidence interval, or the reason why there is none

Where an explanation is deleted, what is about it goes with it.
"""

import dataclasses
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxplain.errors import JaxplainError, first_line
from jaxplain.store.explanation_tables import statements
from jaxplain.store.explanations import ExplanationDatabase

_SCHEMA = """
CREATE TABLE IF NOT EXISTS simulators (
    id INTEGER PRIMARY KEY, config TEXT NOT NULL UNIQUE, created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS simulations (
    simulator INTEGER NOT NULL REFERENCES simulators, explanation INTEGER NOT NULL REFERENCES samples,
    split TEXT NOT NULL, sequence INTEGER NOT NULL,
    expected BLOB, detail TEXT, reply TEXT,
    CHECK ((expected IS NULL) = (detail IS NOT NULL)),
    PRIMARY KEY (simulator, explanation, split, sequence)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS simulations_of_explanation ON simulations (explanation);
CREATE TABLE IF NOT EXISTS scores (
    simulator INTEGER NOT NULL REFERENCES simulators, name TEXT NOT NULL,
    explanation INTEGER NOT NULL REFERENCES samples, split TEXT NOT NULL,
    sequences TEXT NOT NULL, metric TEXT NOT NULL, calibration TEXT NOT NULL,
    value REAL, reason TEXT, low REAL, high REAL, top INTEGER NOT NULL, random INTEGER NOT NULL,
    created REAL NOT NULL,
    CHECK ((value IS NULL) = (reason IS NOT NULL)),
    PRIMARY KEY (explanation, simulator, split, sequences, metric, calibration)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS scores_deleted AFTER DELETE ON samples BEGIN
    DELETE FROM simulations WHERE explanation = old.id;
    DELETE FROM scores WHERE explanation = old.id;
END;
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How well a simulator's activations agree with the real ones.

    Attributes:
        explanation: The explanation's number in the database.
        sign: max or min, as the explanation's.
        simulator: What the simulator was called.
        split: The split that was scored on.
        sequences: top+random, top or random.
        metric: correlation, correlation_per_sequence, r2_centred, r2_uncentred,
            absolute_deviation_explained_mean or absolute_deviation_explained_median; or one of a judge's.
        calibration: none, linear or percentile.
        value: NaN where there is none, for `reason`.
        low: The lower end of a confidence interval over documents; NaN where there is none.
        high: Its upper end.
    """

    explanation: int
    sign: str
    simulator: str
    split: str
    sequences: str
    metric: str
    calibration: str
    value: float
    reason: str | None
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredSimulation:
    """Expected levels at a sequence's tokens, float32 [T]; or None, and why."""

    expected: Float[np.ndarray, "T"] | None
    detail: str | None = None
    reply: str | None = None


class ScoreDatabase:
    """Simulations and scores, within an open database of explanations."""

    def __init__(self, database: ExplanationDatabase):
        self._database = database
        with database.transaction() as c:
            for statement in statements(_SCHEMA):
                c.execute(statement)

    def simulator(self, config: Mapping[str, Any]) -> int:
        """The number of a simulator, added if it is new; `config` decides whether it is."""
        text = json.dumps(config, sort_keys=True)
        with self._database.transaction() as c:
            c.execute("INSERT OR IGNORE INTO simulators (config, created) VALUES (?, ?)", (text, time.time()))
            return c.execute("SELECT id FROM simulators WHERE config = ?", (text,)).fetchone()[0]

    def add_simulations(
        self, simulator: int, explanation: int, split: str, found: Mapping[int, StoredSimulation]
    ) -> None:
        """Keep what came of some sequences, by their row in the split's token table."""
        with self._database.transaction() as c:
            c.executemany(
                "INSERT OR REPLACE INTO simulations VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(simulator, explanation, split, sequence),
                        None if one.expected is None else one.expected.astype(np.float16).tobytes(),
                        one.detail,
                        one.reply,
                    )
                    for sequence, one in found.items()
                ],
            )

    def simulations(self, simulator: int, explanation: int, split: str) -> dict[int, StoredSimulation]:
        """What is kept, by sequence."""
        rows = self._database.connection.execute(
            "SELECT sequence, expected, detail, reply FROM simulations "
            "WHERE simulator = ? AND explanation = ? AND split = ?",
            (simulator, explanation, split),
        )
        return {
            sequence: StoredSimulation(
                expected=None if blob is None else np.frombuffer(blob, np.float16).astype(np.float32),
                detail=detail,
                reply=reply,
            )
            for sequence, blob, detail, reply in rows
        }

    def forget_simulations(self, simulator: int, explanations: Iterable[int]) -> None:
        """Remove a simulator's simulations of some explanations."""
        with self._database.transaction() as c:
            c.executemany(
                "DELETE FROM simulations WHERE simulator = ? AND explanation = ?",
                [(simulator, explanation) for explanation in explanations],
            )

    def add_scores(self, simulator: int, scores: Sequence[Score], *, top: int, random: int) -> None:
        """Keep scores, in place of earlier ones of the same kind."""
        now = time.time()
        with self._database.transaction() as c:
            c.executemany(
                f"INSERT OR REPLACE INTO scores VALUES ({', '.join('?' * 14)})",
                [
                    (
                        *(simulator, s.simulator, s.explanation, s.split),
                        *(s.sequences, s.metric, s.calibration),
                        *(_null(s.value), s.reason, _null(s.low), _null(s.high)),
                        *(top, random, now),
                    )
                    for s in scores
                ],
            )

    def scores(self) -> Iterator[Score]:
        """All scores."""
        return read_scores(self._database)


def read_scores(
    database: ExplanationDatabase,
    layer: int | None = None,
    index: int | None = None,
    expert: int | None = None,
) -> Iterator[Score]:
    """All scores in a database, or those of a neuron; none where nothing was scored yet."""
    where, values = database.where_neuron(layer, index, expert)
    try:
        rows = database.connection.execute(
            "SELECT explanation, sign, name, split, scores.sequences, metric, calibration, "
            "value, reason, low, high "
            "FROM scores JOIN samples ON samples.id = explanation "
            f"WHERE {where} ORDER BY {', '.join(database.neuron_columns)}, "
            "sign, explanation, name, split, scores.sequences, metric, calibration",
            values,
        )
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return
        raise JaxplainError(f"{database.path} could not be read: {first_line(error)}.") from error
    names = [field.name for field in dataclasses.fields(Score)]
    for row in rows:
        found: dict[str, Any] = dict(zip(names, row, strict=True))
        found.update({name: _nan(found[name]) for name in ("value", "low", "high")})
        yield Score(**found)


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
