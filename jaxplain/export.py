"""python -m jaxplain.export STORE OUT --format FORMAT: a store, or its explanations, for other tools."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxplain.commands import PlainParser, run
from jaxplain.errors import JaxplainError
from jaxplain.progress import ByteBar, Progress, progress_bars
from jaxplain.ranges import parse_range
from jaxplain.store.formats import explanations, hub, neuron_records, neuronpedia, tables, transluce
from jaxplain.store.formats.explanations import export_explanations
from jaxplain.store.reader import Split, Store, open_store
from jaxplain.summary import summarised

_FORMATS = {
    neuron_records.FORMAT: "neurons/<layer>/<neuron>.json of OpenAI's neuron-explainer, of one split",
    transluce.FORMAT: "arrays by layer of Transluce's observatory; needs --pad-token",
    neuronpedia.FORMAT: "batches of JSON lines for Neuronpedia, of one split, with explanations",
    tables.FORMAT: "long tables for pandas, polars and DuckDB, with explanations and scores",
    hub.FORMAT: "a dataset repository OUT (user/name) of the Hugging Face hub, with a card",
    explanations.FORMAT: "explanations as one table; OUT ends in .parquet, .jsonl or .csv",
}
_OF_SPLITS = (neuron_records.FORMAT, neuronpedia.FORMAT, tables.FORMAT)
_OF_NEURONS = (*_OF_SPLITS, transluce.FORMAT)
_OWN = {
    "split": _OF_SPLITS,
    "layers": _OF_NEURONS,
    "limit": _OF_NEURONS,
    "overwrite": (*_OF_NEURONS, explanations.FORMAT),
    "pad_token": (transluce.FORMAT,),
    "model": (neuronpedia.FORMAT,),
    "creator": (neuronpedia.FORMAT,),
    "part": (hub.FORMAT,),
    "private": (hub.FORMAT,),
    "endpoint": (hub.FORMAT,),
}
"""The formats that an option is for, where it is not for all."""


def main(arguments: Sequence[str]) -> None:
    """Parse and write."""
    options = _parser().parse_intermixed_args(list(arguments))
    if options.explanations is not None:
        if options.out is not None or options.format is not None:
            raise JaxplainError(
                "--explanations FILE stands for FILE --format explanations; leave out OUT and --format."
            )
        options.format, options.out = explanations.FORMAT, options.explanations
    if options.out is None or options.format is None:
        missing = "OUT" if options.out is None else "--format"
        raise JaxplainError(f"{missing} is missing; give OUT and --format {' | '.join(_FORMATS)}.")
    for option, formats in _OWN.items():
        if getattr(options, option) not in (None, False) and options.format not in formats:
            flag = f"--{option.replace('_', '-')}"
            raise JaxplainError(f"{flag} is for --format {' or '.join(formats)}; leave it out.")
    if options.limit is not None and options.limit < 1:
        raise JaxplainError(f"--limit is {options.limit}; give a positive number.")
    with summarised(options) as summary:
        message, made = _export(options)
        print(message)
        summary |= {"format": options.format, **made}


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        "export", more=["formats:", *(f"  {name:<16}{what}" for name, what in _FORMATS.items()), ""]
    )
    parser.add_argument("store", help="a run's folder, or a store's path or URL")
    parser.add_argument("out", nargs="?", help="the folder, file or repository to write")
    parser.add_argument("--format", choices=_FORMATS, help="see below")
    parser.add_argument("--split", help="the split to write; parquet writes all by default, others the first")
    parser.add_argument("--layers", metavar="RANGE", help="layers such as 3, 0:8 or 0:32:4; all by default")
    parser.add_argument("--limit", type=int, metavar="N", help="the most exemplars of each kind")
    parser.add_argument("--pad-token", type=int, metavar="ID", help="what the subject's tokenizer pads with")
    parser.add_argument("--model", metavar="NAME", help="Neuronpedia's id of the model")
    parser.add_argument("--creator", metavar="ID", help="Neuronpedia's id of the account that uploads")
    parser.add_argument("--part", choices=hub.PARTS, help="what to push to the hub; all by default")
    parser.add_argument("--private", action="store_true", help="make the hub's repository a private one")
    parser.add_argument("--endpoint", metavar="URL", help="the hub's address, if not huggingface.co")
    parser.add_argument("--explanations", metavar="FILE", help="short for FILE --format explanations")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, at the end")
    return parser


def _export(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Do it, and say what became of it, in words and for a summary."""
    if options.format == explanations.FORMAT:
        rows = export_explanations(options.store, Path(options.out), overwrite=options.overwrite)
        return f"{rows:,} explanations are in {options.out}", {"path": options.out, "explanations": rows}
    store = open_store(options.store)
    progress = progress_bars(enabled=not options.quiet)
    if options.format == hub.FORMAT:
        address = hub.push(
            store,
            options.out,
            progress_bars(enabled=not options.quiet, kind=ByteBar),
            part=options.part or "all",
            private=options.private,
            endpoint=options.endpoint,
        )
        return f"{address} has it", {"address": address}
    split = store[options.split or store.splits[0]]
    layers = None if options.layers is None else _layers(options.layers, split)
    return _export_neurons(options, store, split, layers, progress)


def _export_neurons(
    options: argparse.Namespace, store: Store, split: Split, layers: list[int] | None, progress: Progress
) -> tuple[str, dict[str, Any]]:
    out = Path(options.out)
    same = {"layers": layers, "limit": options.limit, "overwrite": options.overwrite}
    match options.format:
        case neuron_records.FORMAT:
            written = neuron_records.export_neuron_records(split, out, progress, **same)
            folder = out / neuron_records.FOLDER
            return f"{written:,} neurons are in {folder}", {"path": folder, "neurons": written}
        case transluce.FORMAT:
            if options.pad_token is None:
                raise JaxplainError(
                    "--pad-token is missing; give the id that the subject's tokenizer pads with, such as "
                    "128004 for Llama 3.1."
                )
            folder = transluce.export_transluce(store, out, progress, pad_token=options.pad_token, **same)
            return f"the exemplars are in {folder}", {"path": folder}
        case neuronpedia.FORMAT:
            folder = neuronpedia.export_neuronpedia(
                split,
                out,
                progress,
                model=options.model,
                creator=options.creator or neuronpedia.DEFAULT_CREATOR,
                **same,
            )
            return f"the sources are in {folder}", {"path": folder}
        case _:
            splits = None if options.split is None else [split.name]
            rows = tables.export_tables(store, out, progress, splits=splits, **same)
            held = ", ".join(f"{count:,} {name}" for name, count in rows.items())
            return f"{out} holds {held}", {"path": out, "rows": rows}


def _layers(text: str, split: Split) -> list[int]:
    named = parse_range(text, "--layers", int(split.layers.max()) + 1)
    found = [layer for layer in split.layers.tolist() if layer in named]
    if not found:
        raise JaxplainError(
            f"--layers is {text!r}, but the store's are {', '.join(map(str, split.layers.tolist()))}."
        )
    return found


if __name__ == "__main__":
    run(main)
