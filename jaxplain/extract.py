"""python -m jaxplain.extract: find the exemplars of every neuron of a model, in one pass over a corpus."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

import jaxplain
from jaxplain.commands import add_flag, config_parser, parse_config, run
from jaxplain.configs.distributed import DistributedConfig
from jaxplain.configs.extraction import CorpusConfig, ExtractConfig, recorded
from jaxplain.corpora.sources import Source, open_source
from jaxplain.corpora.tokens import TokenTable, write_token_table
from jaxplain.corpora.windows import prefix_of
from jaxplain.distributed import join
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import Extraction
from jaxplain.exemplars.selection import select_neurons
from jaxplain.exemplars.step import make_step
from jaxplain.mesh import make_mesh
from jaxplain.planning.refusal import require_memory
from jaxplain.progress import progress_bars
from jaxplain.store.files import Files
from jaxplain.store.schema import STORE_NAME
from jaxplain.store.writer import StoreWriter
from jaxplain.subjects.subject import Subject, open_subject
from jaxplain.subjects.vocabulary import token_bytes
from jaxplain.viewer.terminal import print_sample


def main(arguments: Sequence[str]) -> None:
    """Parse, extract, and show a little of what was found."""
    parser = config_parser(ExtractConfig, prog="python -m jaxplain.extract")
    add_flag(parser, "--overwrite", "Replace the store that the output folder holds, at the end.")
    parser.add_class_arguments(DistributedConfig, as_group=False)
    config, options = parse_config(parser, ExtractConfig, arguments)
    fields = (field.name for field in dataclasses.fields(DistributedConfig))
    join(DistributedConfig(**{name: options[name] for name in fields}))
    if jax.process_count() > 1:
        raise JaxplainError(
            f"{jax.process_count()} processes joined, but one run is not spread over processes yet; run each "
            "alone with --processes 1 over slices of the corpus, as launch/slurm_slices.py does."
        )
    extract(config, overwrite=options.overwrite)
    shown = print_sample(jaxplain.open_store(config.output), Console())
    side = "min" if "min" in config.exemplars.kinds else config.exemplars.kinds[0]
    print(f"The store is {_join(config.output, STORE_NAME)}. Look at any neuron, from any side:")
    print(
        f"  {_python()} -m jaxplain.show {shlex.quote(config.output)} --layer {shown[-1].layer} "
        f"--neuron {shown[-1].index} --kind {side}"
    )


def extract(config: ExtractConfig, *, overwrite: bool = False) -> None:
    """Run an extraction.

    A store that is to be replaced stays until the new one is complete (on local disks).

    Raises JaxplainError for anything in the config that does not fit the subject, corpus or devices.
    """
    path = _join(config.output, STORE_NAME)
    if not overwrite and not Files(path).is_empty():
        raise JaxplainError(f"{path} exists already; choose another output, or replace it with --overwrite.")
    subject = open_subject(config.subject)
    if config.corpus.sequence_length > subject.arch.max_positions:
        raise JaxplainError(
            f"corpus.sequence_length is {config.corpus.sequence_length}, but {subject.id} reads at "
            f"most {subject.arch.max_positions} tokens."
        )
    selection = select_neurons(config.neurons, subject.arch)
    mesh = make_mesh(config.run.mesh, batch_size=config.run.batch_size, mlp_width=subject.arch.neurons)
    require_memory(config, subject.arch, selection, mesh)
    sources = [
        open_source(source, subject.tokenizer, valueeval_dir=config.corpus.valueeval_dir)
        for source in config.corpus.sources
    ]
    for source in sources:
        prefix_of(source, config.corpus, subject.tokenizer)  # what it raises, it had better raise at once
    step, weights = make_step(
        subject.load(mesh, depth=selection.depth), mesh, active_above=config.statistics.active_above
    )
    extraction = Extraction(
        config=config,
        mesh=mesh,
        selection=selection,
        step=step,
        weights=weights,
        excluded=_excluded_tokens(config.corpus, subject),
        mlp_width=subject.arch.neurons,
    )

    writer = StoreWriter(path, _attributes(config, subject, sources))
    writer.write_vocabulary(token_bytes(subject.tokenizer, subject.arch.vocabulary))
    progress = progress_bars(enabled=config.run.progress and jax.process_index() == 0)
    for split in config.exemplars.splits:
        table = write_token_table(
            writer,
            sources,
            config.corpus,
            split,
            subject.tokenizer,
            progress,
            vocabulary=subject.arch.vocabulary,
        )
        if jax.process_index() == 0:
            _report(split, table, config.corpus)
        extraction.run_split(writer, split, progress)
    writer.finish()


def _report(split: str, table: TokenTable, config: CorpusConfig) -> None:
    """Say what a user may not expect of a split's sequences."""
    if table.exhausted:
        went_on = config.when_exhausted == "continue" and len(table.exhausted) < len(config.sources)
        then = "the other sources went on" if went_on else f"there are {table.rows} sequences"
        print(f"{split}: {', '.join(table.exhausted)} ran out, so {then}")
    if table.repeated:
        print(f"{split}: {table.repeated} repeated sequences were left out")


def _python() -> str:
    """How the user would call this Python from here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _excluded_tokens(config: CorpusConfig, subject: Subject) -> frozenset[int]:
    tokenizer = subject.tokenizer
    special = [
        *tokenizer.all_special_ids,
        *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special),
    ]
    for token in config.exclude.tokens:
        if not 0 <= token < subject.arch.vocabulary:
            raise JaxplainError(
                f"corpus.exclude.tokens names token {token}, but the subject's tokens are 0 to "
                f"{subject.arch.vocabulary - 1}."
            )
    return frozenset(config.exclude.tokens) | frozenset(special if config.exclude.special else [])


def _attributes(config: ExtractConfig, subject: Subject, sources: Sequence[Source]) -> dict[str, object]:
    return {
        "config": recorded(config),
        "subject": {
            "id": subject.id,
            "revision": subject.revision,
            "weight_hash": subject.weight_hash(),
            "architecture": dataclasses.asdict(subject.arch),
        },
        "tokenizer_hash": subject.tokenizer_hash(),
        "corpora": [source.name for source in sources],
        "jaxplain_version": jaxplain.__version__,
    }


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


if __name__ == "__main__":
    run(main)
