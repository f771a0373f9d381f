"""Environment variables that override a run's config, as flags of jaxplain.extract.

Prints the flags, quoted for a shell. Needs nothing but Python, so that it runs on a login node.

MODEL_ID          subject.id
DATASET_NAME      a dataset of the hub, or one of jaxplain's presets; the only source
DATASET_CONFIG    its configuration
DATASET_SPLIT     its split, such as train or train[:10%]
VALUEEVAL_DIR     the folder of ValueEval's files: a source, beside DATASET_NAME where that is another one
VALUEEVAL_SPLITS  which of them, such as "training validation"; all where it is not set
LAYER_INDICES     neurons.layers: numbers with commas or blanks between them, or a range such as 0:30:3
ALL_LAYERS        1 for every layer
ALL_NEURONS       1 for every neuron of a layer
MAX_SEQUENCES     corpus.max_sequences
OUTPUT_DIR        output
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SOURCE_VARIABLES = ("DATASET_NAME", "DATASET_CONFIG", "DATASET_SPLIT", "VALUEEVAL_DIR", "VALUEEVAL_SPLITS")
PRESETS = Path(__file__).resolve().parents[1] / "jaxplain/corpora/presets"

_PLAIN = {"MODEL_ID": "--subject.id", "MAX_SEQUENCES": "--corpus.max_sequences", "OUTPUT_DIR": "--output"}
_TRUE, _FALSE = ("1", "true", "yes"), ("", "0", "false", "no")


def flags(environment: Mapping[str, str]) -> list[str]:
    """The flags that an environment asks for. Ends the program with a sentence where it makes no sense."""
    given = []
    for variable, flag in _PLAIN.items():
        if environment.get(variable):
            given += [flag, environment[variable]]
    given += _sources_flags(environment)
    layers = environment.get("LAYER_INDICES", "")
    if _is_true(environment, "ALL_LAYERS"):
        if layers:
            refuse("LAYER_INDICES", layers, "ALL_LAYERS is set too, so leave one of them out")
        layers = "all"
    elif layers and not re.fullmatch(r"-?\d*:-?\d*(:-?\d+)?", layers):
        numbers = re.split(r"[\s,]+", layers.strip(" ,[]"))
        if not all(number.isdecimal() for number in numbers):
            refuse("LAYER_INDICES", layers, "give numbers such as 0,5,10 or a range such as 0:30:3")
        layers = f"[{', '.join(numbers)}]"
    if layers:
        given += ["--neurons.layers", layers]
    if _is_true(environment, "ALL_NEURONS"):
        given += ["--neurons.indices", "all"]
    return given


def sources(environment: Mapping[str, str]) -> list[dict[str, object]]:
    """The corpus's sources that an environment asks for, as a config has them; none if it asks for none."""
    name, folder = environment.get("DATASET_NAME"), environment.get("VALUEEVAL_DIR")
    found: list[dict[str, object]] = []
    for variable in ("DATASET_CONFIG", "DATASET_SPLIT"):
        if environment.get(variable) and not name:
            refuse(variable, environment[variable], "set DATASET_NAME too, which it belongs to")
    if environment.get("VALUEEVAL_SPLITS") and not folder:
        refuse("VALUEEVAL_SPLITS", environment["VALUEEVAL_SPLITS"], "set VALUEEVAL_DIR too")
    if name and name != "valueeval":
        source: dict[str, object] = {"preset" if (PRESETS / f"{name}.yaml").exists() else "dataset": name}
        if environment.get("DATASET_CONFIG"):
            source["config"] = environment["DATASET_CONFIG"]
        if environment.get("DATASET_SPLIT"):
            source["split"] = environment["DATASET_SPLIT"]
        found.append(source)
    if folder or name == "valueeval":
        found.append(_valueeval(folder, environment))
    return found


def refuse(name: str, value: object, remedy: str) -> NoReturn:
    """End the program as jaxplain's commands end it for bad input."""
    print(f"error: {name} is {value!r}; {remedy}.", file=sys.stderr)
    sys.exit(2)


def _sources_flags(environment: Mapping[str, str]) -> list[str]:
    chosen = sources(environment)
    if not chosen:
        return []
    given = ["--corpus.sources", json.dumps(chosen)]
    # The config may have a folder, which only this preset may have.
    if not uses_valueeval(chosen):
        given += ["--corpus.valueeval_dir", "null"]
    elif environment.get("VALUEEVAL_DIR"):
        given += ["--corpus.valueeval_dir", environment["VALUEEVAL_DIR"]]
    return given


def uses_valueeval(chosen: Sequence[Mapping[str, object]]) -> bool:
    """Whether one of some sources is the preset, which needs the folder of its files."""
    return any(source.get("preset") == "valueeval" for source in chosen)


def _valueeval(folder: str | None, environment: Mapping[str, str]) -> dict[str, object]:
    splits = re.split(r"[\s,]+", environment.get("VALUEEVAL_SPLITS", "").strip(" ,"))
    split = environment.get("DATASET_SPLIT") if environment.get("DATASET_NAME") == "valueeval" else None
    part = {"split": split} if split else {}
    if not any(splits):
        return {"preset": "valueeval", **part}
    files = [f"{folder}/arguments-{name}.tsv" for name in splits]
    return {"dataset": "csv", "data_files": files, "delimiter": "\t", "text_column": "Premise", **part}


def _is_true(environment: Mapping[str, str], variable: str) -> bool:
    value = environment.get(variable, "").strip().lower()
    if value not in (*_TRUE, *_FALSE):
        refuse(variable, environment[variable], "give 1 or 0")
    return value in _TRUE


if __name__ == "__main__":
    print(shlex.join(flags(os.environ)))
