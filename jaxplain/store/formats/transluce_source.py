"""Making a store of arrays of Transluce's observatory; `transluce` says what they are.

Arrays are mapped into memory, and never unpickled: quantiles (layer*_act_percs.npy) and single neurons
(neuron_level/*.pkl), which are pickles, are passed over. Each split is read twice, first for its sequences,
which are kept once each, then for the activations.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError, first_line
from jaxplain.progress import Progress
from jaxplain.store.formats.imported import (
    NOT_STATED,
    Imported,
    imported_attributes,
    new_store,
    statistics_of,
    write_ranked,
)
from jaxplain.store.formats.sequence_table import SequenceTable
from jaxplain.store.formats.transluce import (
    CONFIG_NAME,
    FORMAT,
    PADDING,
    RANDOM,
    SPLITS,
    dataset_name,
    layer_folders,
)
from jaxplain.store.repeats import spans
from jaxplain.store.writer import StoreWriter

_BLOCK_BYTES = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What is to be known of the subject's tokenizer: the bytes of every id, the padding's id, its hash."""

    vocabulary: Sequence[bytes]
    pad_token: int
    hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lists:
    """A layer's exemplars of one kind: activations and token ids [F, R, T], and places of corpora [F, R]."""

    kind: str
    seq_acts: np.ndarray
    seq_ids: np.ndarray
    dataset_ids: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    number: int
    lists: tuple[_Lists, ...]
    tokens_seen: int

    @property
    def neurons(self) -> int:
        return self.lists[0].seq_ids.shape[0]


def is_transluce(path: Path) -> bool:
    """Whether a folder holds such arrays."""
    return (path / CONFIG_NAME).is_file()


def transluce_config(path: Path) -> dict[str, Any]:
    """The observatory's ExemplarConfig.

    Raises JaxplainError where it cannot be read, or lacks the model or the corpora.
    """
    try:
        config = json.loads((path / CONFIG_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise JaxplainError(f"{path / CONFIG_NAME} could not be read: {first_line(error)}.") from error
    for field in ("hf_model_id", "hf_dataset_configs"):
        if field not in config:
            raise JaxplainError(f"{path / CONFIG_NAME} has no {field}; is it an exemplar config?")
    return config


def import_transluce(
    path: Path,
    out: str,
    progress: Progress,
    *,
    tokenizer: Tokenizer,
    k: int | None = None,
    activation_dtype: str = "float16",
    overwrite: bool = False,
) -> Imported:
    """Make a store with the splits of a folder of arrays.

    Args:
        path: The folder with exemplar_config.json.
        out: The folder that gets the store.
        progress: Makes bars.
        tokenizer: The subject's.
        k: The most exemplars of each kind; by default as many as there are.
        activation_dtype: Of the stored activations.
        overwrite: Whether to replace a store in `out`.

    Raises JaxplainError where the folder cannot be read, its arrays do not fit one another or the tokenizer,
    or `out` holds a store already.
    """
    config = transluce_config(path)
    target = new_store(out, overwrite=overwrite)
    splits = {name: layers for name in SPLITS if (layers := _layers(path, name))}
    if not splits:
        raise JaxplainError(f"{path} holds no arrays of the splits {', '.join(SPLITS)}.")
    lists = [one for layers in splits.values() for layer in layers for one in layer.lists]
    kinds = [kind for kind in ("max", "min", "random") if any(one.kind == kind for one in lists)]
    tokens = lists[0].seq_ids.shape[2]
    ranks = max(_ranks(layer, kind) for layers in splits.values() for layer in layers for kind in kinds)
    exemplars = {"kinds": kinds, "k": min(k or ranks, ranks), "activation_dtype": activation_dtype}
    not_known = [
        *(f"exemplars of kind {kind}" for kind in ("max", "min", "random") if kind not in kinds),
        "mean, variance, skewness, kurtosis and fraction_active",
    ]
    if not all(layer.tokens_seen for layers in splits.values() for layer in layers):
        not_known.append("count of layers that do not say how many tokens were seen")
    corpora = sorted({dataset_name(one["hf_dataset_id"]) for one in config["hf_dataset_configs"]})
    attributes = imported_attributes(
        subject=config["hf_model_id"],
        corpora=corpora,
        splits=list(splits),
        exemplars=exemplars,
        tokens=tokens,
        sequences="",
        form=FORMAT,
        sources=[path],
        not_known=not_known,
        tokenizer_hash=tokenizer.hash,
    )
    attributes["imported"]["config"] = config
    writer = StoreWriter(target, attributes)
    writer.write_vocabulary(tokenizer.vocabulary)
    sequences, digests = 0, []
    for name, layers in splits.items():
        total = sum(layer.neurons for layer in layers)
        with SequenceTable(Path(out)) as table:
            with progress(total=total, desc=f"{name}: sequences", unit="neurons") as bar:
                for layer, span in _blocks(layers):
                    for one in layer.lists:
                        _read(one, span, tokenizer).add_to(table)
                    bar.update(span.stop - span.start)
            if not len(table):
                raise JaxplainError(f"split {name} of {path} holds no sequences.")
            writer.write_sequences(name, table.blocks(), tokens=table.longest)
            with progress(total=total, desc=f"{name}: activations", unit="neurons") as bar:
                _write_split(writer, name, layers, table, tokenizer, exemplars, bar.update)
            sequences += len(table)
            digests.append(table.digest(tokenizer.vocabulary))
        writer.finish_split(name)
    config = attributes["config"]
    # Known at the end only.
    writer.finish(config=config | {"corpus": config["corpus"] | {"sequences": " ".join(digests)}})
    neurons = sum(layer.neurons for layer in max(splits.values(), key=len))
    return Imported(
        path=target,
        neurons=neurons,
        sequences=sequences,
        not_known=tuple(attributes["imported"]["not_known"]),
    )


class _Block:
    """Some neurons' exemplars of one kind, their sequences at the end of `token_NRT`, after padding."""

    def __init__(self, token_NRT: np.ndarray, activation_NRT: np.ndarray, corpus_NR: np.ndarray, pad: int):
        self.token_NRT, self.corpus_NR = token_NRT, corpus_NR
        self.padded_NR = np.cumprod(token_NRT == pad, axis=-1).sum(axis=-1)
        tokens = token_NRT.shape[-1]
        self.filled_NR = self.padded_NR < tokens
        place_NRT = self.padded_NR[..., None] + np.arange(tokens)
        taken_NRT = np.take_along_axis(activation_NRT, np.minimum(place_NRT, tokens - 1), -1)
        self.activation_NRT = np.where(place_NRT < tokens, taken_NRT, np.float32(np.nan))

    def add_to(self, table: SequenceTable) -> None:
        """Add the sequences to a table."""
        for n, r in np.argwhere(self.filled_NR).tolist():
            table.add(self._tokens(n, r), int(self.corpus_NR[n, r]))

    def numbers(self, table: SequenceTable) -> np.ndarray:
        """The sequences' numbers in a table, -1 where there is none."""
        number_NR = np.full(self.filled_NR.shape, -1, np.int32)
        for n, r in np.argwhere(self.filled_NR).tolist():
            number_NR[n, r] = table.number(self._tokens(n, r))
        return number_NR

    def _tokens(self, n: int, r: int) -> np.ndarray:
        return self.token_NRT[n, r, self.padded_NR[n, r] :]


def _read(one: _Lists, span: slice, tokenizer: Tokenizer) -> _Block:
    """A block of lists, checked against the tokenizer."""
    token_NRT = np.asarray(one.seq_ids[span], np.int32)
    activation_NRT = np.asarray(one.seq_acts[span], np.float32)
    lowest, highest = int(token_NRT.min()), int(token_NRT.max())
    if lowest < 0 or highest >= len(tokenizer.vocabulary):
        raise JaxplainError(
            f"the arrays have token {lowest if lowest < 0 else highest}, but the tokenizer's are 0 to "
            f"{len(tokenizer.vocabulary) - 1}; name the subject's with --tokenizer."
        )
    block = _Block(token_NRT, activation_NRT, one.dataset_ids[span], tokenizer.pad_token)
    if one.kind in PADDING:
        masked_NRT = np.isinf(activation_NRT) & (np.arange(token_NRT.shape[-1]) >= block.padded_NR[..., None])
        if masked_NRT.any():
            token = int(token_NRT[masked_NRT][0])
            raise JaxplainError(
                f"sequences are padded with token {token}, and not with {tokenizer.pad_token}; "
                f"give --pad-token {token}."
            )
    return block


def _blocks(layers: Sequence[_Layer]) -> Iterator[tuple[_Layer, slice]]:
    for layer in layers:
        largest = max(one.seq_ids[:1].nbytes for one in layer.lists)
        for span in spans(layer.neurons, max(1, _BLOCK_BYTES // largest)):
            yield layer, span


def _write_split(
    writer: StoreWriter,
    name: str,
    layers: Sequence[_Layer],
    table: SequenceTable,
    tokenizer: Tokenizer,
    exemplars: Mapping[str, Any],
    advance: Callable[[int], object],
) -> None:
    out = writer.create_split(
        name,
        layers=np.array([layer.number for layer in layers], np.int32),
        neurons=np.arange(layers[0].neurons, dtype=np.int32),
        kinds=exemplars["kinds"],
        k=exemplars["k"],
        tokens=table.longest,
        activation_dtype=exemplars["activation_dtype"],
    )
    held = {layer.number: np.zeros(layer.neurons, bool) for layer in layers}
    places = {layer.number: place for place, layer in enumerate(layers)}
    for layer, span in _blocks(layers):
        for kind in exemplars["kinds"]:
            blocks = [_read(one, span, tokenizer) for one in layer.lists if one.kind == kind]
            if not blocks:
                continue
            sequence_NR = np.concatenate([block.numbers(table) for block in blocks], axis=1)
            activation_NRT = np.concatenate([block.activation_NRT for block in blocks], axis=1)
            activation_NRT = activation_NRT[..., : table.longest]
            held[layer.number][span] |= (sequence_NR >= 0).any(axis=1)
            write_ranked(
                out,
                kind,
                places[layer.number],
                np.arange(span.start, span.stop),
                score_NR=_score(kind, activation_NRT),
                sequence_NR=sequence_NR,
                activation_NRT=activation_NRT,
                ranks=exemplars["k"],
                dtype=exemplars["activation_dtype"],
            )
        advance(span.stop - span.start)
    for layer in layers:
        columns = np.flatnonzero(held[layer.number])
        if len(columns):
            counts = np.full(len(columns), layer.tokens_seen, np.int64)
            out.write_statistics(places[layer.number], columns, **statistics_of(len(columns), count=counts))


def _score(kind: str, activation_NRT: np.ndarray) -> np.ndarray:
    """The extreme of each sequence, NaN where there is none and for random ones."""
    if kind == "random":
        return np.full(activation_NRT.shape[:2], np.nan, np.float32)
    worst = np.float32(PADDING[kind])
    known_NRT = np.where(np.isnan(activation_NRT), worst, activation_NRT)
    score_NR = known_NRT.max(-1) if kind == "max" else known_NRT.min(-1)
    return np.where(np.isinf(score_NR), np.float32(np.nan), score_NR)


def _ranks(layer: _Layer, kind: str) -> int:
    return sum(one.seq_ids.shape[1] for one in layer.lists if one.kind == kind)


def _layers(path: Path, split: str) -> list[_Layer]:
    """The layers of a split, with the random sequences that belong to it."""
    folders = {name: dict(layer_folders(path / name)) for name in (split, f"{RANDOM}{split}")}
    found = []
    for number in sorted(set().union(*folders.values())):
        lists = [
            one
            for name, layers in folders.items()
            for kind in PADDING
            if number in layers and (one := _open(layers[number], kind, is_random=name != split)) is not None
        ]
        if not lists:
            continue
        place = folders[split].get(number)
        found.append(_Layer(number=number, lists=tuple(lists), tokens_seen=_tokens_seen(place)))
    shapes = {(one.seq_ids.shape[0], one.seq_ids.shape[2]) for layer in found for one in layer.lists}
    if len(shapes) > 1:
        raise JaxplainError(
            f"the arrays of {path / split} have neurons and tokens {sorted(shapes)}; all of a split must "
            "have as many."
        )
    return found


def _open(folder: Path, kind: str, *, is_random: bool) -> _Lists | None:
    names = ("seq_acts", "seq_ids", "dataset_ids")
    paths = {name: folder / f"{kind}_{name}.npy" for name in names}
    if not any(path.exists() for path in paths.values()):
        return None
    arrays = {name: _array(path) for name, path in paths.items()}
    shape = arrays["seq_ids"].shape
    if len(shape) != 3 or arrays["seq_acts"].shape != shape or arrays["dataset_ids"].shape != shape[:2]:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise JaxplainError(f"the arrays of {kind} in {folder} do not fit one another: {shapes}.")
    return _Lists(kind="random" if is_random else kind, **arrays)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise JaxplainError(f"{path} could not be read: {first_line(error)}.") from error


def _tokens_seen(folder: Path | None) -> int:
    path = None if folder is None else folder / "num_tokens_seen.txt"
    if path is None or not path.exists():
        return NOT_STATED
    text = path.read_text("utf-8").strip()
    if not text.isdecimal():
        raise JaxplainError(f"{path} holds {text[:40]!r} where it should hold a number of tokens.")
    return int(text)
