"""Whether stores can be merged: all that decides what a neuron does, or what is kept of it, must be equal."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.store.reader import Store

KINDS = ("max", "min", "random")
"""The kinds of exemplars of which those of slices decide those of the whole."""

_MAY_DIFFER = (
    "corpus.expected_sequences",
    "corpus.max_sequences",
    "corpus.sources",
    "corpus.valueeval_dir",
    "corpus.when_exhausted",
    "neurons",  # what was chosen is compared instead
    "output",
    "run",
    "subject.id",  # the weights are compared instead
    "subject.revision",
    "subject.tokenizer",  # its hash is compared instead
)
"""Fields of the config in which slices of one corpus differ; all others must be equal."""

_UNORDERED = ("corpus.exclude.tokens", "exemplars.kinds", "exemplars.splits")

_MERGED_BLOCKS = {
    # The last two are of kind quantile, which is refused by itself.
    "exemplars": ("splits", "kinds", "k", "activation_dtype", "strata", "samples_per_quantile"),
    "statistics": ("active_above", "quantiles", "sampled_tokens"),
}
"""All that these blocks may ask for, and merging knows how to give."""

_NOT_GIVEN = "its default"


def require_agreement(stores: Sequence[Store]) -> None:
    """Check that stores are slices of one run.

    Raises JaxplainError that names the first field that differs and both its values, or what a store
    holds that cannot be merged.
    """
    first = stores[0]
    for store in stores:
        _require_extracted(store)
    _require_mergeable(first)
    expected = dict(_facts(first))
    for store in stores[1:]:
        found = dict(_facts(store))
        for field in dict.fromkeys([*expected, *found]):
            ours, theirs = (facts.get(field, _NOT_GIVEN) for facts in (expected, found))
            if ours != theirs:
                raise JaxplainError(
                    f"{field} is {_shown(ours)} in {first.zarr_path} and {_shown(theirs)} in "
                    f"{store.zarr_path}; only stores that agree in it can be merged, so extract one of "
                    "them anew."
                )
        _require_same_vocabulary(first, store)
        for split in first.splits:
            _require_same_neurons(first, store, split)


def merged_attributes(
    stores: Sequence[Store], *, output: str, sequences: Sequence[Mapping[str, int]]
) -> dict[str, Any]:
    """The root's attributes of a merged store.

    Its config is the first store's with the sources of all; `merged` lists what was put together, in order:
    of every run its config, the names of its corpora and how many `sequences` each split had.
    """
    first = stores[0]
    corpus = first.config["corpus"]
    limits = [store.config["corpus"]["max_sequences"] for store in stores]
    sources: list[Any] = []
    for store in stores:
        sources += [source for source in store.config["corpus"]["sources"] if source not in sources]
    config = first.config | {
        "corpus": corpus | {"sources": sources, "max_sequences": sum(limits) if all(limits) else 0},
        "output": output,
    }
    parts = [
        part
        for store, counts in zip(stores, sequences, strict=True)
        for part in store.attributes.get("merged", [_part(store, counts)])
    ]
    corpora, _ = merged_corpora([store.corpora for store in stores])
    made = {
        "config": config,
        "corpora": list(corpora),
        "merged": parts,
        "jaxplain_version": jaxplain.__version__,
    }
    of_one = ("complete", "begun", "seconds")
    return {name: value for name, value in first.attributes.items() if name not in of_one} | made


def _part(store: Store, sequences: Mapping[str, int]) -> dict[str, Any]:
    return {
        "config": store.config,
        "corpora": list(store.corpora),
        "sequences": dict(sequences),
        "seconds": store.attributes.get("seconds"),
        "jaxplain_version": store.attributes.get("jaxplain_version"),
    }


def merged_corpora(names: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The names of all corpora, and for each store the numbers that its own get among them.

    Corpora of one name are one; where a store has a name several times, the n-th is the n-th of the others.
    """
    numbers: dict[tuple[str, int], int] = {}
    renumbered = []
    for store_names in names:
        seen: dict[str, int] = {}
        own = []
        for name in store_names:
            seen[name] = seen.get(name, 0) + 1
            own.append(numbers.setdefault((name, seen[name]), len(numbers)))
        renumbered.append(np.array(own, np.int32))
    return tuple(name for name, _ in numbers), renumbered


def _require_extracted(store: Store) -> None:
    if "imported" in store.attributes:
        raise JaxplainError(
            f"{store.zarr_path} was imported from {store.attributes['imported']['format']}, which does not "
            "tell what merging needs; import what it was made of together, where that can be."
        )


def _require_mergeable(store: Store) -> None:
    for kind in store.config["exemplars"]["kinds"]:
        if kind not in KINDS:
            raise JaxplainError(
                f"exemplars.kinds of {store.zarr_path} has {kind}, which cannot be merged, since the slices' "
                f"exemplars do not decide the whole's; only {', '.join(KINDS)} can, so extract the slices "
                "without it."
            )
    for block, known in _MERGED_BLOCKS.items():
        for field in store.config.get(block, {}):
            if field == "tokens" and _asks_for_no_tables(store.config[block][field]):
                continue
            if field not in known:
                raise JaxplainError(
                    f"{block}.{field} of {store.zarr_path} is {_shown(store.config[block][field])}, which "
                    "cannot be merged; extract the slices without it."
                )


def _asks_for_no_tables(tokens: Any) -> bool:
    """Whether a block of token tables names no neurons; of tables only the strongest tokens are stored."""
    return isinstance(tokens, Mapping) and not tokens.get("neurons")


def _facts(store: Store) -> Iterator[tuple[str, Any]]:
    """What must be equal: fields of the attributes and of the config, and their values."""
    subject = store.attributes["subject"]
    for field in ("weight_hash", "architecture"):
        yield f"subject.{field}", subject.get(field, _NOT_GIVEN)
    yield "tokenizer_hash", store.attributes.get("tokenizer_hash", _NOT_GIVEN)
    free = _MAY_DIFFER if _draws(store.config) else (*_MAY_DIFFER, "corpus.seed")
    for field, value in _fields(store.config):
        if not any(field == other or field.startswith(f"{other}.") for other in free):
            yield field, sorted(value) if field in _UNORDERED else value


def _draws(config: Mapping[str, Any]) -> bool:
    """Whether anything but the order of documents is drawn by the seed."""
    return (
        "random" in config["exemplars"]["kinds"]
        or config["corpus"].get("windows") == "random"
        or bool(config.get("statistics", {}).get("quantiles"))
    )


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        field = f"{prefix}{name}"
        if field == "corpus.splits":
            # A document's split depends on the order of the shares too.
            yield field, list(value.items())
        elif isinstance(value, Mapping):
            yield from _fields(value, f"{field}.")
        else:
            yield field, value


def _require_same_vocabulary(first: Store, other: Store) -> None:
    ours, theirs = first.vocabulary.tokens(), other.vocabulary.tokens()
    if ours != theirs:
        pairs = itertools.zip_longest(ours, theirs)
        number, (our, their) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise JaxplainError(
            f"token {number} of the vocabulary is {_shown(our)} in {first.zarr_path} and {_shown(their)} in "
            f"{other.zarr_path}; only stores of one tokenizer can be merged, so extract one of them anew."
        )


def _require_same_neurons(first: Store, other: Store, split: str) -> None:
    ours, theirs = first[split], other[split]
    for what in ("layers", "experts", "neurons"):
        our_N, their_N = getattr(ours, what), getattr(theirs, what)
        if our_N is not None and not np.array_equal(our_N, their_N):
            raise JaxplainError(
                f"the {what} of split {split!r} are {_ranges(our_N)} in {first.zarr_path} and "
                f"{_ranges(their_N)} in {other.zarr_path}; merge stores of the same neurons."
            )
    for number, layer in enumerate(ours.layers):
        [our_F], [their_F] = (part.layer_arrays(number, "stats/count") for part in (ours, theirs))
        for place in zip(*np.nonzero((our_F < 0) != (their_F < 0)), strict=True):
            has, lacks = (first, other) if our_F[place] >= 0 else (other, first)
            of_expert = "" if ours.experts is None else f"of expert {ours.experts[place[0]]} "
            raise JaxplainError(
                f"neuron {ours.neurons[place[-1]]} {of_expert}of layer {layer} was extracted in "
                f"{has.zarr_path} but not in {lacks.zarr_path} (split {split!r}); merge stores of the same "
                "neurons."
            )


def _ranges(numbers_N: np.ndarray) -> str:
    """Ascending numbers as runs such as 0-3, 7."""
    runs = np.split(numbers_N, np.flatnonzero(np.diff(numbers_N) != 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts if len(texts) <= _MOST_RUNS else [*texts[:_MOST_RUNS], "..."])


_MOST_RUNS = 5
_MOST_CHARACTERS = 200


def _shown(value: Any) -> str:
    text = value if value is _NOT_GIVEN else repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
