"""Arrays by split and layer, as Transluce's observatory keeps them (Choi et al., 2024).

    <corpora>_<model>_<T>seqlen/exemplar_config.json
    <split>/layer<N>/{max,min}_acts.npy           float32 [F, R]     the extreme of each sequence
    <split>/layer<N>/{max,min}_seq_acts.npy       float32 [F, R, T]  the activation at each token
    <split>/layer<N>/{max,min}_seq_ids.npy        int32 [F, R, T]    token ids
    <split>/layer<N>/{max,min}_dataset_ids.npy    int32 [F, R]       places among the corpora's sorted names
    <split>/layer<N>/{num_tokens_seen,step}.txt
    random_<split>/layer<N>/...                   random sequences, half of them called max and half min

Sequences are padded on the left, with the tokenizer's padding token and, but for random ones, an activation
that is never the extreme. Rows are all neurons of a layer; those that the store lacks are padding alone.
Tokens that do not count have no activation, so they are left out of their sequences.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.formats.neurons import NeuronBlock, Ranked, neuron_blocks, neuron_count
from jaxplain.store.formats.output import new_folder, require_no_experts
from jaxplain.store.reader import Split, Store

FORMAT = "transluce"
CONFIG_NAME = "exemplar_config.json"
PADDING = {"max": -np.inf, "min": np.inf}
RANDOM = "random_"
SPLITS = ("train", "valid", "test")

_KNOWN_DATASETS: dict[str, dict[str, Any]] = {
    "fineweb": {"hf_dataset_id": "HuggingFaceFW/fineweb", "dataset_config_name": "sample-10BT"},
    "lmsys-chat-1m": {"hf_dataset_id": "lmsys/lmsys-chat-1m"},
    "ultrachat": {"hf_dataset_id": "HuggingFaceH4/ultrachat_200k", "hf_split": "train_sft"},
}


def export_transluce(
    store: Store,
    out: Path,
    progress: Progress,
    *,
    pad_token: int,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write all splits, in a folder within `out` of the name that the observatory looks for.

    Args:
        store: The store.
        out: The observatory's data folder; made where there is none.
        progress: Makes bars.
        pad_token: The id that the subject's tokenizer pads with.
        layers: Which layers; all where None.
        limit: The most exemplars of each kind.
        overwrite: Whether to replace a folder of that name.

    Raises JaxplainError where the subject is a mixture of experts, the store lacks max or min, has splits
    that the observatory does not know, or the folder cannot be written or is there already.
    """
    require_no_experts(store, FORMAT, "parquet or neuronpedia")
    first = store[store.splits[0]]
    for kind in PADDING:
        if kind not in first.kinds:
            raise JaxplainError(
                f"{FORMAT} needs exemplars of kinds max and min, but the store holds "
                f"{', '.join(first.kinds)}."
            )
    for name in store.splits:
        if name not in SPLITS:
            raise JaxplainError(f"{FORMAT} knows the splits {', '.join(SPLITS)}, but the store has {name!r}.")
    vocabulary = len(store.vocabulary.tokens())
    if not 0 <= pad_token < vocabulary:
        raise JaxplainError(f"--pad-token is {pad_token}, but the store's tokens are 0 to {vocabulary - 1}.")
    ranks = _ranks(first, "max", limit)
    config = _config(store, ranks, limit)
    folder = out / _folder_name(store, config)
    total = sum(neuron_count(store[name], layers) for name in store.splits)
    with (
        new_folder(folder, sources=[store.zarr_path], overwrite=overwrite) as partial,
        progress(total=total, desc=FORMAT, unit="neurons") as bar,
    ):
        (partial / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        for name in store.splits:
            for block in neuron_blocks(store[name], kinds=_kinds(store[name]), layers=layers, limit=limit):
                _write_block(partial, block, pad_token, ranks, config)
                bar.update(len(block.names))
    return folder


def _kinds(split: Split) -> list[str]:
    return [kind for kind in ("max", "min", "random") if kind in split.kinds]


def _ranks(split: Split, kind: str, limit: int | None) -> int:
    stored = int(split.store.config["exemplars"]["k"]) if kind in split.kinds else 0
    return stored if limit is None else min(limit, stored)


def _config(store: Store, ranks: int, limit: int | None) -> dict[str, Any]:
    """The fields of the observatory's ExemplarConfig."""
    split = store[store.splits[0]]
    defaults = {"dataset_config_name": None, "hf_split": "train", "seed": 54}
    datasets = {
        _dataset(name): defaults | _KNOWN_DATASETS.get(name, {"hf_dataset_id": name})
        for name in store.corpora
    }
    return {
        "hf_model_id": store.attributes["subject"]["id"],
        "hf_dataset_configs": [datasets[name] for name in sorted(datasets)],
        "sampling_ratios": None,
        "num_seqs": max(store[name].sequence_count for name in store.splits),
        "seq_len": _length(split),
        "k": ranks,
        "num_top_acts_to_save": ranks,
        "batch_size": 1,
        "rand_seqs": _ranks(split, "random", limit) // 2,
        "seed": int(store.config.get("corpus", {}).get("seed", 0)),
        "activation_type": "MLP",
    }


def _dataset(corpus: str) -> str:
    return dataset_name(_KNOWN_DATASETS.get(corpus, {"hf_dataset_id": corpus})["hf_dataset_id"])


def dataset_name(hub_id: str) -> str:
    """What the observatory calls a dataset, by which it also sorts them."""
    return hub_id.split("/")[-1]


def _folder_name(store: Store, config: dict[str, Any]) -> str:
    model = config["hf_model_id"].rstrip("/").split("/")[-1].lower().replace("-", "_")
    chat = ["chat"] if re.search("instruct|chat", model) else []
    names = sorted({_dataset(name) for name in store.corpora})
    return "_".join([*names, model, *chat, f"{config['seq_len']}seqlen"])


def _length(split: Split) -> int:
    return split.sequences(np.zeros(1, np.int64))["token"].shape[1]


def _write_block(
    folder: Path, block: NeuronBlock, pad_token: int, ranks: int, config: dict[str, Any]
) -> None:
    layer = f"layer{block.names[0].layer}"
    place = folder / block.split.name / layer
    rows_N = np.array([name.index for name in block.names])
    if not place.exists():
        place.mkdir(parents=True)
        tokens = int(block.statistics["count"].max())
        (place / "num_tokens_seen.txt").write_text(str(tokens))
        # The last step: it takes the layer for done.
        (place / "step.txt").write_text(str(config["num_seqs"] - 1))
    for kind in PADDING:
        _write_lists(place, kind, block, block.kinds[kind], pad_token, rows_N, ranks, with_score=True)
    half = config["rand_seqs"]
    if "random" in block.kinds and half:
        place = folder / f"{RANDOM}{block.split.name}" / layer
        place.mkdir(parents=True, exist_ok=True)
        random = block.kinds["random"]
        for kind, part in (("max", slice(half)), ("min", slice(half, 2 * half))):
            listed = Ranked(
                score_NR=random.score_NR[:, part],
                sequence_NR=random.sequence_NR[:, part],
                activation_NRT=random.activation_NRT[:, part],
            )
            _write_lists(place, kind, block, listed, pad_token, rows_N, half, with_score=False)


def _write_lists(
    place: Path,
    kind: str,
    block: NeuronBlock,
    ranked: Ranked,
    pad_token: int,
    rows_N: np.ndarray,
    ranks: int,
    *,
    with_score: bool,
) -> None:
    filled_NR = ranked.sequence_NR >= 0
    row_NR = np.where(filled_NR, block.places(ranked.sequence_NR), 0)
    token_NRT, activation_NRT = _padded_left(
        block.rows["token"], row_NR, filled_NR, ranked.activation_NRT, pad_token, PADDING[kind]
    )
    corpora = [_dataset(name) for name in block.split.store.corpora]
    number_C = np.array([sorted(set(corpora)).index(name) for name in corpora], np.int32)
    corpus_NR = np.where(filled_NR, number_C[block.rows["corpus"][row_NR]] if len(row_NR) else 0, 0)
    arrays = {"seq_acts": activation_NRT, "seq_ids": token_NRT, "dataset_ids": corpus_NR.astype(np.int32)}
    if with_score:
        arrays["acts"] = np.where(filled_NR, ranked.score_NR, np.float32(PADDING[kind]))
    empty = {"seq_acts": PADDING[kind], "acts": PADDING[kind], "seq_ids": pad_token, "dataset_ids": 0}
    for name, values in arrays.items():
        with _opened(place / f"{kind}_{name}.npy", _width(block.split), ranks, values, empty[name]) as array:
            array[rows_N] = values


class _opened:  # noqa: N801 - reads as a function
    """An array on disk, made where there is none, that is written back at the end."""

    def __init__(self, path: Path, neurons: int, ranks: int, values: np.ndarray, empty: int | float):
        self._path, self._shape, self._empty = path, (neurons, ranks, *values.shape[2:]), empty
        self._dtype = values.dtype

    def __enter__(self) -> np.memmap:
        if self._path.exists():
            self._array = np.lib.format.open_memmap(self._path, mode="r+")
        else:
            self._array = np.lib.format.open_memmap(
                self._path, mode="w+", dtype=self._dtype, shape=self._shape
            )
            self._array[:] = self._empty
        return self._array

    def __exit__(self, *_: object) -> None:
        self._array.flush()
        del self._array


def _padded_left(
    token_UT: np.ndarray,
    row_NR: np.ndarray,
    filled_NR: np.ndarray,
    activation_NRT: np.ndarray,
    pad_token: int,
    padding: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and activations with those that count at the end, in their order."""
    counted_NRT = ~np.isnan(activation_NRT) & filled_NR[..., None]
    tokens = activation_NRT.shape[-1]
    place_NRT = tokens - np.flip(np.cumsum(np.flip(counted_NRT, -1), -1), -1)
    out_token_NRT = np.full(activation_NRT.shape, pad_token, np.int32)
    out_activation_NRT = np.full(activation_NRT.shape, padding, np.float32)
    n, r, t = np.nonzero(counted_NRT)
    to = (n, r, place_NRT[n, r, t])
    out_token_NRT[to] = token_UT[row_NR[n, r], t]
    out_activation_NRT[to] = activation_NRT[n, r, t]
    return out_token_NRT, out_activation_NRT


def _width(split: Split) -> int:
    """All neurons of a layer, where the store says how many these are."""
    stated = split.store.attributes["subject"].get("architecture", {}).get("neurons") or 0
    return max(int(stated), int(split.neurons.max()) + 1)


def layer_folders(split_folder: Path) -> Iterator[tuple[int, Path]]:
    """The layers of a split by their numbers, ascending."""
    found = {
        int(match[1]): path
        for path in split_folder.glob("layer*")
        if path.is_dir() and (match := re.fullmatch(r"layer(\d+)", path.name))
    }
    yield from sorted(found.items())
