"""Batches of JSON lines as Neuronpedia exports and imports them.

    <model>/<source>/{release,model,sourceset,source}.jsonl    a line each
    <model>/<source>/features/batch-<n>.jsonl.gz               a line for every neuron
    <model>/<source>/activations/batch-<n>.jsonl.gz            a line for every exemplar
    <model>/<source>/explanations/batch-<n>.jsonl.gz           a line for every explanation

A source is a layer: its number alone, as Neuronpedia calls the neurons of a layer, and with an expert
`<layer>-neurons__expert<e>`. Tokens that do not count have the value 0, as Neuronpedia's own converter gives
special tokens. `dataIndex` of an activation is its kind and rank, `dataSource` its corpus.
"""

import contextlib
import datetime
import gzip
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.explanations import Explanation, open_explanations
from jaxplain.store.formats.neurons import NeuronBlock, neuron_blocks, neuron_count
from jaxplain.store.formats.output import new_folder
from jaxplain.store.reader import Split, Store

FORMAT = "neuronpedia"
SOURCE_SET = "neurons"
DEFAULT_CREATOR = "clkht01d40000jv08hvalcvly"
"""Neuronpedia's account for what is uploaded, which a local instance is seeded with."""

_NEURONS_PER_BATCH = 1024
_KINDS = ("max", "min")
_NO_BIN = -1


def export_neuronpedia(
    split: Split,
    out: Path,
    progress: Progress,
    *,
    model: str | None = None,
    creator: str = DEFAULT_CREATOR,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a source for every layer (and expert) of a split, and say in which folder within `out`.

    Args:
        split: The split; kinds max and min are written.
        out: The folder that gets one of the model's name.
        progress: Makes bars.
        model: Neuronpedia's id of the model; by default made from the subject's.
        creator: The account that Neuronpedia is to count as the creator.
        layers: Which layers; all where None.
        limit: The most exemplars of each kind.
        overwrite: Whether to replace the model's folder.

    Raises JaxplainError where the store has neither max nor min, the model's id is not of Neuronpedia's
    form, or the folder cannot be written or is there already.
    """
    kinds = [kind for kind in _KINDS if kind in split.kinds]
    if not kinds:
        raise JaxplainError(
            f"{FORMAT} needs exemplars of kind max or min, but the store holds {', '.join(split.kinds)}."
        )
    model = _model_id(split.store) if model is None else model
    if not re.fullmatch(r"[a-z0-9_-]{1,128}", model):
        raise JaxplainError(
            f"--model is {model!r}; Neuronpedia's ids have small letters, digits, - and _ alone."
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    maker = _Lines(split=split, model=model, stamp={"creatorId": creator, "createdAt": now})
    folder = out / model
    with (
        new_folder(folder, sources=[split.store.zarr_path], overwrite=overwrite) as partial,
        progress(total=neuron_count(split, layers), desc=f"{split.name}: {FORMAT}", unit="neurons") as bar,
        contextlib.ExitStack() as stack,
    ):
        path = split.store.explanations_path
        database = (
            stack.enter_context(open_explanations(path, fingerprint=split.store.fingerprint))
            if path is not None and path.exists()
            else None
        )
        blocks = neuron_blocks(split, kinds=kinds, layers=layers, limit=limit)
        for source, group in itertools.groupby(blocks, key=lambda block: _source(block)):
            place = partial / source
            place.mkdir()
            for name, line in maker.about(source).items():
                (place / f"{name}.jsonl").write_text(_json(line) + "\n", encoding="utf-8")
            with _Batches(place) as batches:
                for block in group:
                    for number in range(len(block.names)):
                        activations = list(maker.activations(source, block, number))
                        batches.write("features", [maker.feature(source, block, number, activations)])
                        batches.write("activations", activations)
                        if database is not None:
                            name = block.names[number]
                            found = database.each_explanation(name.layer, name.index, name.expert)
                            batches.write("explanations", [maker.explanation(source, e) for e in found])
                        batches.next_neuron()
                    bar.update(len(block.names))
    return folder


def source_name(layer: int, expert: int | None) -> str:
    """What Neuronpedia is told the neurons of a layer, or of one of its experts, are called."""
    return str(layer) if expert is None else f"{layer}-{SOURCE_SET}__expert{expert}"


def _source(block: NeuronBlock) -> str:
    return source_name(block.names[0].layer, block.names[0].expert)


def _model_id(store: Store) -> str:
    name = str(store.attributes["subject"]["id"]).rstrip("/").split("/")[-1].lower()
    return re.sub("[^a-z0-9_-]+", "-", name)


class _Lines:
    """The lines of Neuronpedia's tables."""

    def __init__(self, *, split: Split, model: str, stamp: dict[str, str]):
        self._split, self._model, self._stamp = split, model, stamp

    def about(self, source: str) -> dict[str, dict[str, Any]]:
        """Model, source and what they belong to."""
        store = self._split.store
        architecture = store.attributes["subject"].get("architecture", {})
        subject = str(store.attributes["subject"]["id"])
        release = f"{self._model}-neurons"
        return {
            "release": self._stamp
            | {
                "name": release,
                "description": f"MLP neurons of {subject}",
                "creatorName": "jaxplain",
                "visibility": "PUBLIC",
                "urls": [],
            },
            "model": self._stamp
            | {
                "id": self._model,
                "displayName": subject,
                "displayNameShort": self._model,
                "instruct": bool(re.search("instruct|chat", subject.lower())),
                "layers": int(architecture.get("layers") or self._split.layers.max() + 1),
                "neuronsPerLayer": int(architecture.get("neurons") or self._split.neurons.max() + 1),
                "owner": "",
                "visibility": "PUBLIC",
                "updatedAt": self._stamp["createdAt"],
            },
            "sourceset": self._stamp
            | {
                "modelId": self._model,
                "name": SOURCE_SET,
                "description": "MLP neurons",
                "creatorName": "jaxplain",
                "releaseName": release,
                "visibility": "PUBLIC",
                "urls": [],
            },
            "source": self._stamp
            | {
                "modelId": self._model,
                "id": source,
                "setName": SOURCE_SET,
                "visibility": "PUBLIC",
                "dataset": ", ".join(dict.fromkeys(store.corpora)),
                "num_prompts": self._split.sequence_count,
                "num_tokens_in_prompt": store.config.get("corpus", {}).get("sequence_length"),
            },
        }

    def feature(
        self, source: str, block: NeuronBlock, number: int, activations: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """A neuron."""
        active = float(block.statistics["fraction_active"][number])
        return self._named(source, block.names[number].index) | {
            **self._stamp,
            "sourceSetName": SOURCE_SET,
            "maxActApprox": max([0.0, *(line["maxValue"] for line in activations)]),
            # The column may not be null.
            "frac_nonzero": active if math.isfinite(active) else 0.0,
            "hasVector": False,
            "vector": [],
        }

    def activations(self, source: str, block: NeuronBlock, number: int) -> Iterator[dict[str, Any]]:
        """A neuron's exemplars."""
        for kind in block.kinds:
            for exemplar in block.exemplars(number, kind):
                yield self._activation(source, block, number, kind, exemplar)

    def _activation(
        self, source: str, block: NeuronBlock, number: int, kind: str, exemplar: Exemplar
    ) -> dict[str, Any]:
        index = block.names[number].index
        values_T = np.nan_to_num(exemplar.activations)
        peak = int(np.argmax(values_T))
        return self._named(source, index) | {
            **self._stamp,
            "id": self._id(source, index, kind, exemplar.rank),
            "tokens": block.strings(exemplar),
            "values": values_T.tolist(),
            "maxValue": float(values_T[peak]),
            "maxValueTokenIndex": peak,
            "minValue": float(values_T.min()),
            "dataSource": exemplar.corpus,
            "dataIndex": f"{kind}/{exemplar.rank}",
            "binMin": _NO_BIN,
            "binMax": _NO_BIN,
            "binContains": _NO_BIN,
        }

    def explanation(self, source: str, explanation: Explanation) -> dict[str, Any]:
        """An explanation; what made it is in its notes, as Neuronpedia's tables of models are its own."""
        made = {
            name: getattr(explanation, name)
            for name in ("sign", "sample", "provider", "model", "style", "recipe")
        }
        return self._named(source, explanation.index) | {
            "id": self._id(source, explanation.index, "explanation", explanation.id),
            "description": explanation.text,
            "authorId": self._stamp["creatorId"],
            "createdAt": self._stamp["createdAt"],
            "notes": json.dumps(made, ensure_ascii=False),
        }

    def _named(self, source: str, index: int) -> dict[str, Any]:
        return {"modelId": self._model, "layer": source, "index": str(index)}

    def _id(self, *parts: object) -> str:
        """An id in the form of theirs, the same for the same thing of the same store."""
        text = json.dumps([self._split.store.fingerprint, self._split.name, self._model, *map(str, parts)])
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


class _Batches:
    """The batches of a source, one of each table open at a time."""

    def __init__(self, folder: Path):
        self._folder, self._neurons = folder, 0
        self._open: dict[str, gzip.GzipFile] = {}

    def __enter__(self) -> "_Batches":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open = {}

    def write(self, table: str, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines to the present batch."""
        for line in lines:
            if table not in self._open:
                (self._folder / table).mkdir(exist_ok=True)
                number = self._neurons // _NEURONS_PER_BATCH
                path = self._folder / table / f"batch-{number}.jsonl.gz"
                self._open[table] = gzip.GzipFile(path, "wb", compresslevel=5, mtime=0)
            self._open[table].write(_json(line).encode() + b"\n")

    def next_neuron(self) -> None:
        """Begin a new batch where this one is full."""
        self._neurons += 1
        if self._neurons % _NEURONS_PER_BATCH == 0:
            self.__exit__()


def _json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)
