"""A tree neurons/<layer>/<neuron>.json in the form of OpenAI's neuron-explainer (Bills et al., 2023).

That tool finds layers and neurons by the names of folders and files, so there is no index. Each file is a
NeuronRecord: statistics, and excerpts as lists of tokens and of activations. An excerpt has numbers only for
all of its tokens, so tokens that do not count, whose activations are not known, are left out of it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.formats.neurons import NeuronBlock, neuron_blocks, neuron_count
from jaxplain.store.formats.output import new_folder, require_no_experts
from jaxplain.store.reader import Split

FORMAT = "neuron-records"
FOLDER = "neurons"
MOMENTS = ("mean", "variance", "skewness", "kurtosis")
LISTS = {"max": "most_positive_activation_records", "random": "random_sample"}
"""By kind of exemplars, the field that holds them."""
BY_QUANTILE = "random_sample_by_quantile"


def export_neuron_records(
    split: Split,
    out: Path,
    progress: Progress,
    *,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write a file for every neuron of a split, and say how many these are.

    Raises JaxplainError where the subject is a mixture of experts, the store lacks kind max, or `out` cannot
    be written or is there already.
    """
    require_no_experts(split.store, FORMAT, "parquet or neuronpedia")
    if "max" not in split.kinds:
        raise JaxplainError(
            f"{FORMAT} needs exemplars of kind max, but the store holds {', '.join(split.kinds)}."
        )
    kinds = [kind for kind in ("max", "random", "quantile") if kind in split.kinds]
    with (
        new_folder(out, sources=[split.store.zarr_path], overwrite=overwrite) as folder,
        progress(total=neuron_count(split, layers), desc=f"{split.name}: {FORMAT}", unit="neurons") as bar,
    ):
        written = 0
        for block in neuron_blocks(split, kinds=kinds, layers=layers, limit=limit):
            layer = folder / FOLDER / str(block.names[0].layer)
            layer.mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(block.names):
                text = json.dumps(_record(block, number), ensure_ascii=False, allow_nan=False)
                (layer / f"{name.index}.json").write_text(text, encoding="utf-8")
            written += len(block.names)
            bar.update(len(block.names))
    return written


def _record(block: NeuronBlock, number: int) -> dict[str, Any]:
    name = block.names[number]
    lists = {
        kind: [_excerpt(block, exemplar) for exemplar in block.exemplars(number, kind)] for kind in LISTS
    }
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {
            "dataclass_name": "NeuronId",
            "layer_index": name.layer,
            "neuron_index": name.index,
        },
        LISTS["random"]: lists["random"],
        **_by_quantile(block, number),
        **{moment: _finite(float(block.statistics[moment][number])) for moment in MOMENTS},
        LISTS["max"]: lists["max"],
    }


def _by_quantile(block: NeuronBlock, number: int) -> dict[str, Any]:
    """The samples of each stratum, weakest first, and the levels between the strata."""
    if "quantile" not in block.kinds:
        return {BY_QUANTILE: None, "quantile_boundaries": None}
    strata = block.split.strata
    samples: list[list[dict[str, Any]]] = [[] for _ in strata]
    for exemplar in block.exemplars(number, "quantile"):
        if exemplar.stratum is not None:
            samples[strata.index(exemplar.stratum)].append(_excerpt(block, exemplar))
    return {BY_QUANTILE: samples, "quantile_boundaries": [end for _, end in strata[:-1]]}


def _excerpt(block: NeuronBlock, exemplar: Exemplar) -> dict[str, Any]:
    counted_T = np.flatnonzero(~np.isnan(exemplar.activations))
    strings = block.strings(exemplar)
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": [strings[token] for token in counted_T],
        "activations": exemplar.activations[counted_T].tolist(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
