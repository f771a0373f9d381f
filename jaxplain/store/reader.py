"""Reading a store: `open_store`, then splits, neurons and their exemplars.

store = jaxplain.open_store("runs/smollm2")
neuron = store["train"].neuron(layer=10, index=42)
for exemplar in neuron.exemplars("max", limit=5):
    print(exemplar.score, exemplar.text)
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int

from jaxplain.errors import JaxplainError
from jaxplain.store import schema
from jaxplain.store.explanations import (
    DATABASE_NAME,
    Explanation,
    ExplanationDatabase,
    open_explanations,
)
from jaxplain.store.files import Files, partial_name
from jaxplain.store.scores import Score, read_scores

if TYPE_CHECKING:
    import xarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exemplar:
    """One sequence kept for a neuron.

    Attributes:
        rank: 0 for the strongest.
        score: The highest activation for kind max, the lowest for min; the drawn number for random.
        sequence: The sequence's row in the split's token table.
        tokens: Token ids without padding, int32 [T].
        activations: The neuron's activation at each token, float32 [T]; NaN where a token does not count.
        corpus: Name of the source.
        document: Hash of the document in which the sequence begins, the same in every run.
        start: Number of that document's tokens that come before the sequence.
        vocabulary: The bytes of every token id.
    """

    rank: int
    score: float
    sequence: int
    tokens: Int[np.ndarray, "T"]
    activations: Float[np.ndarray, "T"]
    corpus: str
    document: int
    start: int
    vocabulary: "Vocabulary" = dataclasses.field(repr=False)

    @property
    def token_strings(self) -> list[str]:
        """The text that each token adds; joined they are `text`.

        A character whose bytes are spread over several tokens stands with the last of them.
        """
        return self.vocabulary.strings(self.tokens)

    @property
    def text(self) -> str:
        """The whole sequence as text."""
        return self.vocabulary.text(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronStatistics:
    """Over all tokens that count: how many, and the shape of the activation's distribution.

    Attributes:
        count: Tokens that count.
        mean: The activation's mean.
        variance: Its variance, divided by the count.
        skewness: Its third standardised moment, m3 / m2**1.5; NaN where the variance is 0.
        kurtosis: Its fourth standardised moment, m4 / m2**2, not the excess: a Gaussian has 3. NaN where
            the variance is 0.
        fraction_active: Share of the tokens with an activation above `statistics.active_above` of the run.
    """

    count: int
    mean: float
    variance: float
    skewness: float
    kurtosis: float
    fraction_active: float


class Vocabulary:
    """The bytes of every token id."""

    def __init__(self, text: np.ndarray, end: np.ndarray):
        self._text, self._end = text.tobytes(), end

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; none for padding."""
        if token < 0:
            return b""
        start = self._end[token - 1] if token else 0
        return self._text[start : self._end[token]]

    def tokens(self) -> list[bytes]:
        """The bytes of all tokens, by their ids."""
        return [self.bytes_of(token) for token in range(len(self._end))]

    def text(self, tokens: Int[np.ndarray, "T"]) -> str:
        """The text of a sequence of tokens."""
        return b"".join(map(self.bytes_of, tokens.tolist())).decode("utf-8", "replace")

    def strings(self, tokens: Int[np.ndarray, "T"]) -> list[str]:
        """The text that every token adds; joined they are the whole text.

        A character whose bytes are spread over several tokens stands with the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.bytes_of(token)) for token in tokens.tolist()]
        return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)] if texts else []


class Neuron:
    """One neuron of one split."""

    def __init__(self, split: "Split", layer: int, index: int, place: tuple[int, int]):
        self.split, self.layer, self.index = split, layer, index
        self._place = place

    def __repr__(self) -> str:
        return f"Neuron(layer={self.layer}, index={self.index}, split={self.split.name!r})"

    @functools.cached_property
    def stats(self) -> NeuronStatistics:
        """The neuron's statistics."""
        values = self.split._read({name: f"stats/{name}" for name in schema.STATISTICS}, self._place)
        return NeuronStatistics(
            count=int(values["count"]),
            mean=float(values["mean"]),
            variance=float(values["variance"]),
            skewness=float(values["skewness"]),
            kurtosis=float(values["kurtosis"]),
            fraction_active=float(values["fraction_active"]),
        )

    @functools.cached_property
    def quantiles(self) -> dict[float, float]:
        """The activation below which each of some shares of the tokens lies; none in stores without them.

        In the tails they are exact; see `jaxplain.exemplars.quantiles` for how far off the others may be.
        """
        split = self.split
        if not split.quantile_levels:
            return {}
        values = split._read({schema.QUANTILE: f"stats/{schema.QUANTILE}"}, self._place)[schema.QUANTILE]
        return dict(zip(split.quantile_levels, values.tolist(), strict=True))

    def exemplars(self, kind: str = "max", *, limit: int | None = None) -> list[Exemplar]:
        """The sequences kept for a kind, strongest first, at most `limit` of them.

        Raises JaxplainError for a kind that the store does not hold.
        """
        split = self.split
        split._check_kind(kind)
        names = {name: f"{kind}/{name}" for name in ("score", "sequence", "activation")}
        read = split._read(names, self._place)
        filled = int(np.count_nonzero(read["sequence"] >= 0))
        sequences = read["sequence"][: filled if limit is None else min(limit, filled)]
        rows = split.sequences(sequences)
        vocabulary = split.store.vocabulary
        found = []
        for rank, sequence in enumerate(sequences):
            tokens = rows["token"][rank]
            tokens = tokens[tokens >= 0]
            found.append(
                Exemplar(
                    rank=rank,
                    score=float(read["score"][rank]),
                    sequence=int(sequence),
                    tokens=tokens,
                    activations=read["activation"][rank, : len(tokens)].astype(np.float32),
                    corpus=split.store.corpora[rows["corpus"][rank]],
                    document=int(rows["document"][rank]),
                    start=int(rows["start"][rank]),
                    vocabulary=vocabulary,
                )
            )
        return found

    def explanations(self, path: str | Path | None = None) -> list[Explanation]:
        """The neuron's explanations, by sign, recipe and sample; none where there are none yet.

        They are of the neuron rather than of this split. `path` is a database, or a folder that holds
        one, where that is not beside the store.
        """
        with self._database(path) as database:
            return database.explanations(self.layer, self.index) if database else []

    def scores(self, path: str | Path | None = None) -> list[Score]:
        """The scores of the neuron's explanations, by sign, explanation and simulator; see `explanations`."""
        with self._database(path) as database:
            return list(read_scores(database, self.layer, self.index)) if database else []

    @contextlib.contextmanager
    def _database(self, path: str | Path | None) -> Iterator[ExplanationDatabase | None]:
        """The database, or None where none was named and there is none yet."""
        store = self.split.store
        place = store.database_path(path)
        if place is None or (path is None and not place.exists()):
            yield None
            return
        with open_explanations(place, fingerprint=store.fingerprint) as database:
            yield database


class Split:
    """One split of a store: its sequences, and exemplars and statistics of every neuron kept.

    Attributes:
        layers: Layers that the store holds, ascending, int32 [L].
        neurons: Neurons that it holds of each layer, ascending, int32 [F].
    """

    def __init__(self, store: "Store", name: str):
        self.store, self.name = store, name
        self.layers, self.neurons = store._files.read(self._array("layer"), self._array("neuron"))

    def __repr__(self) -> str:
        return (
            f"Split({self.name!r}, {self.sequence_count} sequences, {len(self.layers)} layers x "
            f"{len(self.neurons)} neurons, kinds {', '.join(self.kinds)})"
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of exemplars that the store holds."""
        return tuple(self.store.config["exemplars"]["kinds"])

    @property
    def quantile_levels(self) -> tuple[float, ...]:
        """The levels of `Neuron.quantiles`."""
        return tuple(self.store.config.get("statistics", {}).get("quantiles", ()))

    @property
    def sequence_count(self) -> int:
        """How many sequences were seen."""
        return self._array("sequences/token").shape[0]

    def neuron(self, layer: int, index: int) -> Neuron:
        """One neuron. Raises JaxplainError where the store does not hold it."""
        place = []
        for what, value, axis in (("layer", layer, self.layers), ("neuron", index, self.neurons)):
            at = int(np.searchsorted(axis, value))
            if at == len(axis) or axis[at] != value:
                raise JaxplainError(
                    f"{what} {value} is not in the store, which holds {len(axis)} {what}s from "
                    f"{axis[0]} to {axis[-1]}."
                )
            place.append(at)
        neuron = Neuron(self, layer, index, (place[0], place[1]))
        if neuron.stats.count < 0:
            raise JaxplainError(f"neuron {index} of layer {layer} was not among those extracted.")
        return neuron

    def sequences(self, rows: Int[np.ndarray, "N"]) -> dict[str, np.ndarray]:
        """Rows of the token table by number: `token` [N, T] (-1 is padding) and where each comes from."""
        names = schema.sequence_arrays(sequences=0, tokens=1)
        arrays = [self._array(f"sequences/{name}")[rows] for name in names]
        return dict(zip(names, self.store._files.read(*arrays), strict=True))

    def layer_arrays(self, place: int, *names: str) -> list[np.ndarray]:
        """Whole-layer slices of arrays such as "max/score"; `place` is the layer's place on its axis."""
        return self.store._files.read(*(self._array(name)[place] for name in names))

    def to_xarray(self) -> "xarray.DataTree":
        """The split as an xarray DataTree of lazily read arrays, in the store's own structure."""
        import xarray

        return xarray.open_datatree(self.store.zarr_path, engine="zarr", group=self.name, consolidated=False)

    @functools.cache  # noqa: B019 - as long-lived as the split itself
    def _array(self, name: str) -> ts.TensorStore:
        return self.store._files.open_array(f"{self.name}/{name}")

    def _read(self, names: Mapping[str, str], place: tuple[int, int]) -> dict[str, np.ndarray]:
        values = self.store._files.read(*(self._array(name)[place] for name in names.values()))
        return dict(zip(names, values, strict=True))

    def _check_kind(self, kind: str) -> None:
        if kind not in self.kinds:
            raise JaxplainError(
                f"the store holds no exemplars of kind {kind!r}; it holds {', '.join(self.kinds)}."
            )


class Store:
    """A complete store. Index it with a split's name; `attributes` are the root's."""

    def __init__(self, files: Files, attributes: dict[str, Any]):
        self._files, self.attributes = files, attributes
        self._splits: dict[str, Split] = {}

    def __repr__(self) -> str:
        subject = self.attributes["subject"]["id"]
        return f"Store({self._files.url!r}, subject {subject!r}, splits {', '.join(self.splits)})"

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise JaxplainError(f"the store has no split {split!r}; it has {', '.join(self.splits)}.")
        if split not in self._splits:
            self._splits[split] = Split(self, split)
        return self._splits[split]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.config["exemplars"]["splits"])

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run that made the store."""
        return self.attributes["config"]

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the sources, as `corpus` numbers them."""
        return tuple(self.attributes["corpora"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the store was made from; its place and the layout of the run do not count."""
        made_from = {name: self.attributes.get(name) for name in ("subject", "corpora", "tokenizer_hash")}
        made_from["config"] = {k: v for k, v in self.config.items() if k not in ("output", "run")}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    @property
    def explanations_path(self) -> Path | None:
        """Where explanations.sqlite lies, beside the store; None for a store that is not on a local disk."""
        path = self.zarr_path
        return None if "://" in path else Path(path).parent / DATABASE_NAME

    def database_path(self, given: str | Path | None = None) -> Path | None:
        """The database of explanations: a file or folder that is given, or the one beside the store."""
        if given is None:
            return self.explanations_path
        return Path(given) / DATABASE_NAME if Path(given).is_dir() else Path(given)

    @property
    def zarr_path(self) -> str:
        """Where other Zarr readers find the store: a path, or a URL."""
        url = self._files.url.rstrip("/")
        return unquote(url.removeprefix("file://")) if url.startswith("file://") else url

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token id."""
        return Vocabulary(
            *self._files.read(*(self._files.open_array(f"vocabulary/{name}") for name in ("text", "end")))
        )


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Args:
        path: The store, or the run's folder that holds it: a local path, or a gs://, s3:// or
            http(s):// URL.

    Raises:
        JaxplainError: There is no store, it is not one of jaxplain's, or it was not completed.
    """
    root = None
    inside = f"{str(path).rstrip('/')}/{schema.STORE_NAME}"
    for candidate in (str(path), inside, partial_name(path), partial_name(inside)):
        files = Files(candidate)
        root = files.read_json("zarr.json")
        if root is not None:
            break
    if root is None:
        raise JaxplainError(f"there is no store at {path}.")
    attributes = root.get("attributes") or {}
    if attributes.get("format") != schema.FORMAT:
        raise JaxplainError(f"{path} is a Zarr group, but not a store of jaxplain's.")
    if attributes.get("version") != schema.VERSION:
        raise JaxplainError(
            f"{path} is a store of version {attributes.get('version')}, and this jaxplain reads "
            f"version {schema.VERSION}."
        )
    if not attributes.get("complete"):
        raise JaxplainError(
            f"the store at {path} is incomplete: the run that writes it has not finished; run it to the end."
        )
    missing = [name for name in ("config", "subject", "corpora") if name not in attributes]
    if missing:
        raise JaxplainError(f"the store at {path} is damaged: its attributes lack {', '.join(missing)}.")
    return Store(files, attributes)
