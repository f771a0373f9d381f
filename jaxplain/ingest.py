"""python -m jaxplain.ingest SRC [SRC ...] OUT: a store of what other tools have left."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from transformers import AutoTokenizer

from jaxplain.commands import PlainParser, run
from jaxplain.errors import JaxplainError, first_line
from jaxplain.progress import progress_bars
from jaxplain.store.explanations import DATABASE_NAME
from jaxplain.store.formats import neuron_records, neuronpedia, transluce
from jaxplain.store.formats.imported import Imported
from jaxplain.store.formats.neuron_record_source import NeuronRecordSource, is_neuron_records
from jaxplain.store.formats.neuronpedia_source import NeuronpediaSource, is_neuronpedia
from jaxplain.store.formats.output import require_no_file
from jaxplain.store.formats.text_records import TextSource, TokenForm, import_text_records
from jaxplain.store.formats.transluce_source import (
    Tokenizer,
    import_transluce,
    is_transluce,
    transluce_config,
)
from jaxplain.subjects.subject import find_folder, tokenizer_hash
from jaxplain.subjects.vocabulary import token_bytes
from jaxplain.summary import summarised

_LOOKS = {
    neuron_records.FORMAT: (is_neuron_records, "neurons/<layer>/<neuron>.json of neuron-explainer"),
    transluce.FORMAT: (is_transluce, f"{transluce.CONFIG_NAME} and arrays of Transluce's observatory"),
    neuronpedia.FORMAT: (is_neuronpedia, "features/ and activations/ of Neuronpedia's exports"),
}
_OWN = {
    "tokens_seen": (neuron_records.FORMAT,),
    "strata": (neuron_records.FORMAT,),
    "token_form": (neuron_records.FORMAT, neuronpedia.FORMAT),
    "subject": (neuron_records.FORMAT, neuronpedia.FORMAT),
    "tokenizer": (transluce.FORMAT,),
    "pad_token": (transluce.FORMAT,),
}
"""The formats that an option is for, where it is not for all."""
_TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")


def main(arguments: Sequence[str]) -> None:
    """Parse, look what the sources are, and make the store."""
    options = _parser().parse_intermixed_args(list(arguments))
    sources = [Path(source) for source in options.sources]
    form = _form_of(sources)
    for option, formats in _OWN.items():
        if getattr(options, option) is not None and form not in formats:
            flag = f"--{option.replace('_', '-')}"
            raise JaxplainError(
                f"{flag} is for {' or '.join(formats)}, but {sources[0]} is {form}; leave it out."
            )
    if options.k is not None and options.k < 1:
        raise JaxplainError(f"--k is {options.k}; give a positive number.")
    if form != neuron_records.FORMAT and len(sources) > 1:
        raise JaxplainError(f"{len(sources)} folders of {form} are given; import them one by one.")
    for source in sources:
        if Path(options.out).resolve().is_relative_to(source.resolve()):
            raise JaxplainError(f"OUT is {options.out}, which lies in {source}; choose another folder.")
    with summarised(options) as summary:
        try:
            found = _ingest(form, sources, options)
        except OSError as error:
            name = error.filename or options.out
            raise JaxplainError(f"{name} cannot be used: {error.strerror}.") from error
        print(f"{found.neurons:,} neurons and {found.sequences:,} sequences are in {found.path}")
        print("not known: " + "; ".join(found.not_known))
        summary |= dataclasses.asdict(found)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        "ingest", more=["sources:", *(f"  {name:<16}{what}" for name, (_, what) in _LOOKS.items()), ""]
    )
    parser.add_argument("sources", nargs="+", metavar="SRC", help="a folder; several of neuron-records")
    parser.add_argument("out", metavar="OUT", help="the folder that gets the store, as exemplars.zarr")
    parser.add_argument("--subject", help="the model that the neurons are of, for a note in the store")
    parser.add_argument("--k", type=int, help="the most exemplars of each kind; all by default")
    parser.add_argument(
        "--activation-dtype",
        choices=["float16", "float32"],
        default="float16",
        help="of the activations in the store; default: %(default)s",
    )
    parser.add_argument(
        "--token-form",
        choices=get_args(TokenForm),
        help="how token texts are written; by default as it looks",
    )
    parser.add_argument(
        "--tokens-seen",
        type=int,
        nargs="+",
        metavar="N",
        help="neuron-records: how many tokens each SRC is of, so that moments can be pooled",
    )
    parser.add_argument(
        "--strata",
        type=float,
        nargs="+",
        metavar="LEVEL",
        help="neuron-records: the levels between the samples by quantile, if the records do not tell",
    )
    parser.add_argument(
        "--tokenizer", help="transluce: the subject's tokenizer, a folder or hub id; by default the model's"
    )
    parser.add_argument(
        "--pad-token", type=int, metavar="ID", help="transluce: what sequences are padded with"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the store in OUT, and its explanations by the source's if that has any, at the end",
    )
    return parser


def _form_of(sources: Sequence[Path]) -> str:
    forms = []
    for source in sources:
        form = next((name for name, (looks_so, _) in _LOOKS.items() if looks_so(source)), None)
        if form is None:
            known = "; ".join(what for _, what in _LOOKS.values())
            why = "holds nothing that can be imported" if source.is_dir() else "is no folder"
            raise JaxplainError(f"{source} {why}; known are {known}.")
        forms.append(form)
    if len(set(forms)) > 1:
        raise JaxplainError(f"the sources are {', '.join(forms)}; import those of a form by themselves.")
    return forms[0]


def _ingest(form: str, sources: Sequence[Path], options: argparse.Namespace) -> Imported:
    progress = progress_bars(enabled=not options.quiet)
    same = {
        "k": options.k,
        "activation_dtype": options.activation_dtype,
        "overwrite": options.overwrite,
    }
    if form == transluce.FORMAT:
        tokenizer = _tokenizer(options.tokenizer, options.pad_token, transluce_config(sources[0]))
        return import_transluce(sources[0], options.out, progress, tokenizer=tokenizer, **same)
    pedia = NeuronpediaSource(sources[0]) if form == neuronpedia.FORMAT else None
    if pedia is not None:
        require_no_file(Path(options.out) / DATABASE_NAME, overwrite=options.overwrite)
    source: TextSource = pedia or NeuronRecordSource(
        sources, tokens_seen=options.tokens_seen, strata=options.strata
    )
    found = import_text_records(
        source,
        options.out,
        progress,
        subject=options.subject or (pedia.model if pedia else "unknown"),
        token_form=options.token_form or "auto",
        **same,
    )
    if pedia is not None:
        explanations, empty = pedia.import_explanations(found.path, overwrite=options.overwrite)
        if explanations:
            print(f"{explanations:,} explanations are beside the store")
        if empty:
            print(f"{empty:,} explanations had no text and were left out")
    return found


def _tokenizer(name: str | None, pad_token: int | None, config: dict[str, object]) -> Tokenizer:
    name = name or str(config["hf_model_id"])
    folder = find_folder(name, field="--tokenizer", files=_TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise JaxplainError(f"--tokenizer {name} could not be read: {first_line(error)}.") from error
    pad_token = tokenizer.pad_token_id if pad_token is None else pad_token
    if pad_token is None:
        raise JaxplainError(f"the tokenizer of {name} names no padding; give its id with --pad-token.")
    return Tokenizer(
        vocabulary=token_bytes(tokenizer, len(tokenizer)),
        pad_token=pad_token,
        hash=tokenizer_hash(tokenizer),
    )


if __name__ == "__main__":
    run(main)
