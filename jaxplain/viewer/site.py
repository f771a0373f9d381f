"""A run as pages see it: the store, its explanations, and what is known of all of its neurons."""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

from jaxplain.errors import JaxplainError
from jaxplain.store.explanations import ExplanationDatabase, open_explanations
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Store
from jaxplain.viewer import explained
from jaxplain.viewer.catalogue import Catalogue, no_value
from jaxplain.viewer.explained import ScoreColumn
from jaxplain.viewer.holding import Holding
from jaxplain.viewer.peaks import PeakIndex, index_folder, open_index

T = TypeVar("T")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")


class Site:
    """One store, for any number of threads.

    Attributes:
        explanations: Where the database of explanations is; None where there can be none.
        index: Where the index of tokens is; None where there can be none.
        chosen: The neurons that there are pages of; None for all.
        trouble: Why the explanations beside the store are of no use; None where they are.
    """

    def __init__(
        self,
        store: Store,
        *,
        explanations: str | Path | None = None,
        index: Path | None = None,
        chosen: Collection[NeuronId] | None = None,
    ):
        for split in store.splits:
            if _SPLIT.fullmatch(split) is None:
                raise JaxplainError(f"the store has a split {split!r}, which is no name for one.")
        self.store, self.chosen = store, chosen
        self.explanations = store.database_path(explanations)
        self.index = index or index_folder(store)
        self.trouble = self._trouble(named=explanations is not None)
        if self.trouble is not None:
            self.explanations = None
        self._catalogues: dict[str, Catalogue] = {}
        self._peaks: PeakIndex | None = None
        self._holdings: dict[str, Holding] = {}
        self._kept: dict[object, tuple[object, object]] = {}
        self._lock = threading.RLock()

    def _trouble(self, *, named: bool) -> str | None:
        try:
            with self.database() as database:
                if database is None and named:
                    raise JaxplainError(f"there are no explanations at {self.explanations}.")
        except JaxplainError as error:  # of another store, for one; the exemplars are none the worse for it
            if named:
                raise
            return str(error)
        return None

    def catalogue(self, split: str) -> Catalogue:
        """What is known of all neurons of a split. Raises JaxplainError where there is no such split."""
        with self._lock:
            if split not in self._catalogues:
                self._catalogues[split] = Catalogue(self.store[split], self.chosen)
            return self._catalogues[split]

    def holding(self, split: str) -> Holding:
        """Which neurons' exemplars have which tokens."""
        with self._lock:
            return self._holdings.setdefault(split, Holding(self.store[split]))

    @contextlib.contextmanager
    def database(self) -> Iterator[ExplanationDatabase | None]:
        """The database of explanations, for reading; None where there is none yet."""
        if self.explanations is None or not self.explanations.exists():
            yield None
            return
        with open_explanations(self.explanations, fingerprint=self.store.fingerprint) as database:
            yield database

    def _from_database(self, key: object, read: Callable[[ExplanationDatabase], T], otherwise: T) -> T:
        """What was read of the database, anew only where it has changed."""
        with self.database() as database:
            if database is None:
                return otherwise
            state = [
                (status.st_size, status.st_mtime_ns)
                for suffix in ("", "-wal")
                if (path := Path(f"{database.path}{suffix}")).exists() and (status := path.stat())
            ]
            with self._lock:
                if key not in self._kept or self._kept[key][0] != state:
                    self._kept[key] = (state, read(database))
                return self._kept[key][1]  # type: ignore[return-value]

    def score_columns(self) -> list[ScoreColumn]:
        """The kinds of scores that there are."""
        return self._from_database("columns", explained.score_columns, [])

    def sample_counts(self) -> list[tuple[str, str | None, str, str, int]]:
        """Provider, model, style, status and number of samples."""
        return self._from_database("counts", explained.counts, [])

    def labels(self, split: str) -> dict[str, str]:
        """All columns of neurons: statistics and scores, and what pages call them."""
        scores = {column.name: column.label for column in self.score_columns()}
        return self.catalogue(split).labels | scores

    def column(self, split: str, name: str) -> Shaped[np.ndarray, "N"]:
        """One number of every neuron; of scores the highest that an explanation of it has.

        Raises JaxplainError for a column that there is not.
        """
        catalogue = self.catalogue(split)
        scores = {column.name: column for column in self.score_columns()}
        if name not in scores:
            return catalogue.column(name)

        def read(database: ExplanationDatabase) -> np.ndarray:
            name_MA, value_M = explained.best_scores(database, scores[name])
            row_M = catalogue.rows_of(name_MA)
            values_N = no_value(catalogue)
            values_N[row_M[row_M >= 0]] = value_M[row_M >= 0]
            return values_N

        return self._from_database((split, name), read, no_value(catalogue))

    @property
    def peaks(self) -> PeakIndex | None:
        """The index of tokens, if there is one; one that is made while pages are served is found."""
        if self._peaks is None:
            self._peaks = open_index(self.store, self.index)
        return self._peaks

    @functools.cached_property
    def _vocabulary(self) -> list[str]:
        tokens = self.store.vocabulary.tokens()
        return [token.decode("utf-8", "replace").strip().casefold() for token in tokens]

    def tokens_like(self, text: str) -> np.ndarray:
        """Which vocabulary tokens are like some text, bool [V]: equal, but for case and blanks around.

        A star at its end or beginning stands for anything.
        """
        text = text.strip().casefold()
        core = text.strip("*")
        tests: dict[tuple[bool, bool], Callable[[str], bool]] = {
            (False, False): lambda token: token == core,
            (False, True): lambda token: token.startswith(core),
            (True, False): lambda token: token.endswith(core),
            (True, True): lambda token: core in token,
        }
        is_like = tests[text.startswith("*"), text.endswith("*")]
        return np.array([bool(core) and is_like(token) for token in self._vocabulary], bool)
