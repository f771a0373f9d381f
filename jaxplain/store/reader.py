"""Reading a store: `open_store`, then splits, neurons and their exemplars.

For example:

    store = jaxplain.open_store("runs/smollm2")
    neuron = store["train"].neuron(layer=10, index=42)
    for exemplar in neuron.exemplars("max", limit=5):
        print(exemplar.score, exemplar.text)
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Int

from jaxplain.errors import JaxplainError
from jaxplain.store import schema
from jaxplain.store.exemplar import Exemplar, Exemplars, NeuronStatistics, Vocabulary
from jaxplain.store.explanations import (
    DATABASE_NAME,
    Explanation,
    ExplanationDatabase,
    open_explanations,
)
from jaxplain.store.files import Files, partial_name
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.quantiles import lower_tail, quantiles, upper_tail
from jaxplain.store.scores import Score, read_scores
from jaxplain.store.token_means import TokenMean, estimated_means

if TYPE_CHECKING:
    import xarray


class Neuron:
    """One neuron of one split.

    Attributes:
        layer (int): Its layer, from 0.
        index (int): Its number in the layer, or in the expert, from 0.
        expert (int | None): Of which of the layer's experts, where the subject is a mixture of experts; else
            None.
    """

    def __init__(self, split: "Split", neuron: NeuronId, place: tuple[int, ...]):
        self.split, self.id = split, neuron
        self.layer, self.expert, self.index = neuron.layer, neuron.expert, neuron.index
        self._place = place

    def __repr__(self) -> str:
        expert = "" if self.expert is None else f"expert={self.expert}, "
        return f"Neuron(layer={self.layer}, {expert}index={self.index}, split={self.split.name!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from jaxplain.viewer.notebook import neuron_html  # only where a notebook asks for it

        return neuron_html(self)

    @property
    def is_shared(self) -> bool:
        """Whether the neuron's expert reads every token; True where there are no experts."""
        shared = self.split.shared
        return shared is None or bool(shared[self._place[:2]])

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

        In the tails they are exact; see `jaxplain.store.quantiles` for how far off the others may be.
        """
        split = self.split
        if not split.quantile_levels:
            return {}
        values = split._read({schema.QUANTILE: f"stats/{schema.QUANTILE}"}, self._place)[schema.QUANTILE]
        return dict(zip(split.quantile_levels, values.tolist(), strict=True))

    def quantile(self, level: float) -> float:
        """The activation below which a share of the tokens lies, at any level that the store knows of.

        At the levels of `quantiles` it is the same as there. Beyond the extreme of the last sequence of kind
        max or min it is exact, from the stored sequences. Elsewhere it lies on the straight line between the
        two nearest of `quantiles`, and tells no more than that the quantile is between those.

        Raises JaxplainError for a level that is not from 0 to 1, and for one beyond the outermost of
        `quantiles` that the stored sequences do not reach.
        """
        if not 0 <= level <= 1:
            raise JaxplainError(f"level is {level}; give a number from 0 to 1.")
        known = self.quantiles
        if level in known:
            return known[level]
        place = level * (self.stats.count - 1)
        for kind, tail_of, from_end in (("min", lower_tail, False), ("max", upper_tail, True)):
            if kind not in self.split.kinds:
                continue
            tail = tail_of(*self._ranked(kind))
            if (self.stats.count - 1 - np.floor(place) if from_end else np.ceil(place)) < tail.count_F[0]:
                tails = {"lower": None, "upper": None, "upper" if from_end else "lower": tail}
                nothing = np.zeros((1, 0), np.float32)
                return float(quantiles(np.array([level]), self.stats.count, nothing, **tails)[0, 0])
        levels = list(known)
        if not levels or not levels[0] < level < levels[-1]:
            held = f"from {levels[0]} to {levels[-1]}" if levels else "none"
            raise JaxplainError(
                f"the quantile at {level} is not known: the store's levels are {held}, and its sequences do "
                "not reach there; extract with that level in statistics.quantiles."
            )
        return float(np.interp(level, levels, list(known.values())))

    def tokens(self, sign: str = "max", *, limit: int | None = None) -> list[TokenMean]:
        """Vocabulary tokens by the neuron's mean activation, highest first, or with sign `min` lowest first.

        For neurons that the run chose for it (`statistics.tokens`) means are exact, over all tokens that
        count, and rare tokens left out as it says. For others they are estimated from the stored sequences of
        kinds `sign` and, where the store has it, `random`; see `jaxplain.store.token_means`.

        Raises JaxplainError for another sign, and for one of which the store has neither exact means nor
        exemplars.
        """
        if sign not in ("max", "min"):
            raise JaxplainError(f"sign is {sign!r}; give max or min.")
        split, row = self.split, self.split.token_table_row(self.id)
        if row is not None:
            names = [f"{schema.TOKEN_TABLE}/{sign}/{name}" for name in ("token", "mean", "count")]
            tokens, means, counts = split.store._files.read(*(split._array(name)[row] for name in names))
        else:
            extreme, random = (
                self.exemplars(sign),
                self.exemplars("random") if "random" in split.kinds else [],
            )
            tokens, means, counts = estimated_means(
                extreme,
                random,
                split.sequence_count,
                token_count=None if self.expert is None else self.stats.count,
            )
            order = np.argsort(means if sign == "min" else -means, kind="stable")
            tokens, means, counts = tokens[order], means[order], counts[order]
        vocabulary = split.store.vocabulary
        return [
            TokenMean(
                token=token,
                text=vocabulary.bytes_of(token).decode("utf-8", "replace"),
                mean=mean,
                count=count,
                exact=row is not None,
            )
            for token, mean, count in zip(tokens.tolist(), means.tolist(), counts.tolist(), strict=True)
            if token >= 0
        ][:limit]

    def exemplars(self, kind: str = "max", *, limit: int | None = None) -> Exemplars:
        """The sequences kept for a kind, strongest first, at most `limit` of them.

        Raises JaxplainError for a kind that the store does not hold.
        """
        split = self.split
        split._check_kind(kind)
        parted = ("stratum",) if kind == "quantile" else ()
        group = schema.group_of(kind)
        names = {name: f"{group}/{name}" for name in ("score", "sequence", "activation", *parted)}
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
                    stratum=split.strata[read["stratum"][rank]] if parted else None,
                    vocabulary=vocabulary,
                )
            )
        return Exemplars(found)

    def explanations(self, path: str | Path | None = None) -> list[Explanation]:
        """The neuron's explanations, by sign, recipe and sample; none where there are none yet.

        They are of the neuron rather than of this split. `path` is a database, or a folder that holds
        one, where that is not beside the store.
        """
        with self._database(path) as database:
            return database.explanations(self.layer, self.index, self.expert) if database else []

    def scores(self, path: str | Path | None = None) -> list[Score]:
        """The scores of the neuron's explanations, by sign, explanation and simulator; see `explanations`."""
        with self._database(path) as database:
            return list(read_scores(database, self.layer, self.index, self.expert)) if database else []

    def _ranked(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores [1, R] and activations [1, R, T] of a kind."""
        read = self.split._read({name: f"{kind}/{name}" for name in ("score", "activation")}, self._place)
        return read["score"][None], read["activation"][None]

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
        layers (np.ndarray): Layers that the store holds, ascending, int32 [L].
        neurons (np.ndarray): Neurons that it holds of each layer or expert, ascending, int32 [F].
        experts: Experts that it holds of each layer, ascending, int32 [E]; None where the subject is no
            mixture of experts.
        shared: Which of them read every token, bool [L, E]; None as well.
    """

    def __init__(self, store: "Store", name: str):
        self.store, self.name = store, name
        self.layers, self.neurons = store._files.read(self._array("layer"), self._array("neuron"))
        self.experts: Int[np.ndarray, "E"] | None = None
        self.shared: Bool[np.ndarray, "L E"] | None = None
        if self._array("stats/count").rank == 3:
            self.experts, shared = store._files.read(self._array("expert"), self._array("shared"))
            self.shared = shared.astype(bool)

    def __repr__(self) -> str:
        experts = "" if self.experts is None else f"{len(self.experts)} experts x "
        return (
            f"Split({self.name!r}, {self.sequence_count} sequences, {len(self.layers)} layers x "
            f"{experts}{len(self.neurons)} neurons, kinds {', '.join(self.kinds)})"
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of exemplars that the store holds."""
        return tuple(self.store.config["exemplars"]["kinds"])

    @property
    def quantile_levels(self) -> tuple[float, ...]:
        """The levels of `Neuron.quantiles`."""
        return tuple(self.store.config.get("statistics", {}).get("quantiles", ()))

    @functools.cached_property
    def strata(self) -> tuple[tuple[float, float], ...]:
        """The strata of kind quantile, weakest first: from which level of all maxima to which.

        Raises JaxplainError where the store does not hold that kind.
        """
        self._check_kind("quantile")
        (levels,) = self.store._files.read(self._array(f"{schema.group_of('quantile')}/level"))
        return tuple(itertools.pairwise(levels.tolist()))

    def token_table_row(self, neuron: NeuronId) -> int | None:
        """Where a neuron stands among those with exact means by token; None where it does not."""
        return self._token_table_rows.get(neuron)

    @functools.cached_property
    def _token_table_rows(self) -> dict[NeuronId, int]:
        if not self.store.config.get("statistics", {}).get("tokens", {}).get("neurons"):
            return {}
        axes = schema.name_axes(has_experts=self.experts is not None)
        arrays = (self._array(f"{schema.TOKEN_TABLE}/chosen_{axis}") for axis in axes)
        columns = (array.tolist() for array in self.store._files.read(*arrays))
        return {NeuronId(name): row for row, name in enumerate(zip(*columns, strict=True))}

    @property
    def sequence_count(self) -> int:
        """How many sequences were seen."""
        return self._array("sequences/token").shape[0]

    @property
    def sequence_length(self) -> int:
        """How many tokens the longest can have."""
        return self._array("sequences/token").shape[1]

    def rank_count(self, kind: str) -> int:
        """How many exemplars of a kind a neuron can have."""
        self._check_kind(kind)
        return self._array(f"{schema.group_of(kind)}/score").shape[-1]

    def neuron(self, layer: int, index: int, *, expert: int | None = None) -> Neuron:
        """One neuron, of an expert where the subject is a mixture of experts.

        Raises JaxplainError where the store does not hold it, or an expert is missing or too much.
        """
        if self.experts is None and expert is not None:
            raise JaxplainError(
                f"expert {expert} is asked for, but the subject is no mixture of experts; leave it out."
            )
        if self.experts is not None and expert is None:
            raise JaxplainError(
                f"neuron {index} of layer {layer} is asked for without an expert, but the subject is a "
                f"mixture of experts; give one from {self.experts[0]} to {self.experts[-1]}."
            )
        place = []
        axes = (
            ("layer", layer, self.layers),
            ("expert", expert, self.experts),
            ("neuron", index, self.neurons),
        )
        for what, value, axis in axes:
            if value is None or axis is None:
                continue
            at = int(np.searchsorted(axis, value))
            if at == len(axis) or axis[at] != value:
                raise JaxplainError(
                    f"{what} {value} is not in the store, which holds {len(axis)} {what}s from "
                    f"{axis[0]} to {axis[-1]}."
                )
            place.append(at)
        neuron = Neuron(self, NeuronId.of(layer, expert, index), tuple(place))
        if neuron.stats.count < 0:
            of_expert = "" if expert is None else f"of expert {expert} "
            raise JaxplainError(f"neuron {index} {of_expert}of layer {layer} was not among those extracted.")
        return neuron

    def neuron_called(self, neuron: NeuronId) -> Neuron:
        """The same by what the neuron is called."""
        return self.neuron(neuron.layer, neuron.index, expert=neuron.expert)

    def neurons_of(self, place: int) -> Iterator[tuple[NeuronId, tuple[int, ...]]]:
        """What the neurons of a layer are called, and their places in `layer_arrays`, of all that it holds.

        `place` is the layer's place on its axis.
        """
        (counts,) = self.layer_arrays(place, "stats/count")
        for at in zip(*np.nonzero(counts >= 0), strict=True):
            expert = None if self.experts is None else int(self.experts[at[0]])
            yield NeuronId.of(int(self.layers[place]), expert, int(self.neurons[at[-1]])), at

    def sequences(self, rows: Int[np.ndarray, "N"]) -> dict[str, np.ndarray]:
        """Rows of the token table by number: `token` [N, T] (-1 is padding) and where each comes from."""
        names = schema.sequence_arrays(sequences=0, tokens=1)
        arrays = [self._array(f"sequences/{name}")[rows] for name in names]
        return dict(zip(names, self.store._files.read(*arrays), strict=True))

    def layer_arrays(self, place: int, *names: str, within: tuple[int | slice, ...] = ()) -> list[np.ndarray]:
        """Whole-layer slices of arrays such as "max/score"; `place` is the layer's place on its axis.

        They begin with the axis of neurons, or with those of experts and neurons; `within` are places or
        slices of these.
        """
        return self.store._files.read(*(self._array(name)[(place, *within)] for name in names))

    def bytes_per_neuron(self, kind: str) -> int:
        """How large a neuron's activations of a kind are, uncompressed."""
        array = self._array(f"{schema.group_of(kind)}/activation")
        return math.prod(array.shape[-2:]) * array.dtype.numpy_dtype.itemsize

    def whole_array(self, name: str, *, last: int | slice | None = None) -> np.ndarray:
        """All values of an array such as "stats/mean", or those at one or some places of its last axis."""
        array = self._array(name)
        return self.store._files.read(array if last is None else array[..., last])[0]

    def peak_arrays(
        self, place: int, kind: str, neurons: slice, ranks: int, *, expert: int | None = None
    ) -> tuple[Int[np.ndarray, "F R"], Float[np.ndarray, "F R T"]]:
        """Sequences and activations of the first ranks of some neurons of a layer or, by its place, expert.

        Activations are not read where no neuron has a sequence; they are NaN there.
        """
        at = (place, neurons) if expert is None else (place, expert, neurons)
        group, ranks = schema.group_of(kind), min(ranks, self.rank_count(kind))
        sequences, activations = (self._array(f"{group}/{name}")[at] for name in ("sequence", "activation"))
        (sequence_FR,) = self.store._files.read(sequences[:, :ranks])
        if (sequence_FR < 0).all():
            return sequence_FR, np.full((*sequence_FR.shape, activations.shape[-1]), np.nan, np.float16)
        return sequence_FR, self.store._files.read(activations[:, :ranks])[0]

    def tokens(self, rows: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N T"]:
        """Rows of the token table by number; -1 is padding."""
        return self.store._files.read(self._array("sequences/token")[rows])[0]

    def to_xarray(self) -> "xarray.DataTree":
        """The split as an xarray DataTree of lazily read arrays, in the store's own structure."""
        import xarray

        return xarray.open_datatree(self.store.zarr_path, engine="zarr", group=self.name, consolidated=False)

    @functools.cache  # noqa: B019 - as long-lived as the split itself
    def _array(self, name: str) -> ts.TensorStore:
        return self.store._files.open_array(f"{self.name}/{name}")

    def _read(self, names: Mapping[str, str], place: tuple[int, ...]) -> dict[str, np.ndarray]:
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
        """SHA-256 of what exemplars were made from; place, layout of the run and statistics do not count."""
        made_from = {name: self.attributes.get(name) for name in ("subject", "corpora", "tokenizer_hash")}
        made_from["config"] = {
            k: v for k, v in self.config.items() if k not in ("output", "run", "statistics")
        }
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
