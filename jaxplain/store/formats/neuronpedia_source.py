"""Reading Neuronpedia's batches of JSON lines, and its explanations into a database."""

import dataclasses
import gzip
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxplain
from jaxplain.errors import JaxplainError, first_line
from jaxplain.store.explanations import DATABASE_NAME, Sample, open_explanations
from jaxplain.store.formats.neuronpedia import FORMAT
from jaxplain.store.formats.output import new_file
from jaxplain.store.formats.text_records import TextNeuron, TextRecord
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import open_store

_SOURCE = re.compile(r"(?P<layer>\d+)(-(?P<set>.+?))?(__expert(?P<expert>\d+))?")
_TABLES = ("features", "activations", "explanations")


def is_neuronpedia(path: Path) -> bool:
    """Whether a folder is a source of Neuronpedia's, or holds some."""
    return path.is_dir() and bool(_sources(path))


class NeuronpediaSource:
    """One of Neuronpedia's sources, or all those in a model's folder; see `text_records.TextSource`.

    Raises JaxplainError where they are of several models or sets, or their names do not say their layers.
    """

    form = FORMAT
    strata: Sequence[float] = ()
    neurons = None

    def __init__(self, path: Path):
        self.paths = [path]
        self._sources: dict[tuple[int, int], Path] = {}
        sets, models = set(), set()
        for folder in _sources(path):
            match = _SOURCE.fullmatch(folder.name)
            if match is None:
                raise JaxplainError(
                    f"{folder} is called {folder.name!r}, which does not begin with a layer's number."
                )
            sets.add(match["set"] or "neurons")
            models.add(folder.parent)
            self._sources[int(match["layer"]), int(match["expert"] or -1)] = folder
        for what, found in (("sets of sources", sets), ("models", models)):
            if len(found) > 1:
                raise JaxplainError(
                    f"{path} holds {what} {', '.join(sorted(map(str, found)))}; import them one by one."
                )
        self._has_experts = any(expert >= 0 for _, expert in self._sources)
        self.model = next(iter(models)).name
        about = next(iter(self._sources.values())) / "source.jsonl"
        stated = next(_lines(about), {}) if about.exists() else {}
        self.model = str(stated.get("modelId") or self.model)
        self.corpus = str(stated.get("dataset") or "unknown")

    def not_known(self) -> list[str]:
        """What the batches do not tell."""
        return ["count, mean, variance, skewness and kurtosis of activations"]

    def chunks(self) -> Iterator[list[TextNeuron]]:
        """The neurons of a batch each."""
        for place, folder in sorted(self._sources.items()):
            batches = {path.name: path for table in _TABLES[:2] for path in _batches(folder, table)}
            for name in sorted(batches, key=_batch_number):
                features = {str(f["index"]): f for f in _lines(folder / "features" / name)}
                activations: dict[str, list[dict[str, Any]]] = defaultdict(list)
                for line in _lines(folder / "activations" / name):
                    activations[str(line["index"])].append(line)
                indices = sorted(features.keys() | activations.keys(), key=int)
                if indices:
                    yield [
                        self._neuron(place, index, features.get(index, {}), activations[index])
                        for index in indices
                    ]

    def _neuron(
        self,
        place: tuple[int, int],
        index: str,
        feature: Mapping[str, Any],
        activations: Sequence[Mapping[str, Any]],
    ) -> TextNeuron:
        records: dict[str, list[TextRecord]] = defaultdict(list)
        for line in activations:
            kind = str(line.get("dataIndex") or "").partition("/")[0]
            record = TextRecord(
                tokens=line["tokens"],
                activations=[math.nan if v is None else float(v) for v in line["values"]],
            )
            records[kind if kind in ("max", "min") else "max"].append(record)
        active = feature.get("frac_nonzero")
        return TextNeuron(
            name=self._name(place, index),
            records=records,
            statistics={"fraction_active": math.nan if active is None else float(active)},
        )

    def _name(self, place: tuple[int, int], index: str) -> NeuronId:
        layer, expert = place
        return NeuronId.of(layer, max(expert, 0) if self._has_experts else None, int(index))

    def import_explanations(self, store_path: str, *, overwrite: bool) -> tuple[int, int]:
        """Put the explanations beside an imported store; how many, and how many lines had no text."""
        if not any(_batches(folder, "explanations") for folder in self._sources.values()):
            return 0, 0
        store = open_store(store_path)
        count = empty = 0
        with (
            new_file(Path(store_path).parent / DATABASE_NAME, overwrite=overwrite) as partial,
            open_explanations(
                partial,
                fingerprint=store.fingerprint,
                subject=store.attributes["subject"]["id"],
                experts=self._has_experts,
            ) as database,
        ):
            database.connection.execute("PRAGMA journal_mode = DELETE")  # in one file, which can be renamed
            for place, folder in sorted(self._sources.items()):
                # By neuron and what made them, wherever in the batches they stand.
                found: dict[tuple[NeuronId, str], list[Sample]] = defaultdict(list)
                for line in itertools.chain(*map(_lines, _batches(folder, "explanations"))):
                    if not str(line.get("description") or "").strip():
                        empty += 1
                        continue
                    config, sample = _made(line)
                    found[self._name(place, str(line["index"])), json.dumps(config, sort_keys=True)].append(
                        sample
                    )
                for (name, config), samples in found.items():
                    numbered = [
                        dataclasses.replace(sample, sample=number)
                        for sign in ("max", "min")
                        for number, sample in enumerate(s for s in samples if s.sign == sign)
                    ]
                    recipe = database.recipe(json.loads(config), jaxplain.__version__)
                    database.finish(recipe, name, numbered)
                    count += len(numbered)
        return count, empty


def _made(line: Mapping[str, Any]) -> tuple[dict[str, Any], Sample]:
    """What an explanation was made by, as far as the line tells, and the explanation."""
    try:
        notes = json.loads(line.get("notes") or "{}")
    except ValueError:
        notes = {}
    notes = notes if isinstance(notes, dict) else {}
    model = notes.get("model") or line.get("explanationModelName")
    config = {
        "explainer": {"provider": notes.get("provider") or FORMAT, "model": model},
        "prompt": {"style": notes.get("style") or line.get("typeName") or "unknown"},
    }
    sign = "min" if notes.get("sign") == "min" else "max"
    return config, Sample(sign=sign, sample=0, status="explained", text=str(line["description"]), model=model)


def _sources(path: Path) -> list[Path]:
    found = [path] if (path / "features").is_dir() or (path / "activations").is_dir() else []
    for pattern in ("*/activations", "*/features", "*/*/activations", "*/*/features"):
        found += [folder.parent for folder in path.glob(pattern) if folder.is_dir()]
    return sorted(set(found))


def _batches(folder: Path, table: str) -> list[Path]:
    found = (folder / table).glob("batch-*.jsonl*")
    return sorted((p for p in found if p.suffix in (".gz", ".jsonl")), key=lambda p: _batch_number(p.name))


def _batch_number(name: str) -> tuple[int, str]:
    match = re.match(r"batch-(\d+)", name)
    return (int(match[1]) if match else 0, name)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError, EOFError) as error:
        raise JaxplainError(f"{path} could not be read: {first_line(error)}.") from error
