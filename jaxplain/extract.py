"""python -m jaxplain.extract: find the exemplars of every neuron of a model, in one pass over a corpus."""

import dataclasses
import importlib.metadata
import json
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

import jaxplain
from jaxplain.commands import add_count, add_flag, config_parser, parse_config, run
from jaxplain.configs.distributed import DistributedConfig
from jaxplain.configs.extraction import CorpusConfig, ExtractConfig, recorded
from jaxplain.corpora.shares import help_first, shared_out
from jaxplain.corpora.sources import Source, open_source
from jaxplain.corpora.tokens import TokenTable, write_token_table
from jaxplain.corpora.windows import prefix_of, reading, sequences_to_cut, windows_of_split
from jaxplain.corpora.workers import Work, cores_of_process, open_workers, worker_count
from jaxplain.distributed import join
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import Extraction
from jaxplain.exemplars.selection import Selection, select_neurons
from jaxplain.exemplars.step import make_step
from jaxplain.exemplars.token_sums import choose_neurons
from jaxplain.mesh import make_mesh, undivided_width
from jaxplain.planning.refusal import require_memory
from jaxplain.processes import (
    Mail,
    all_in_time,
    exchange,
    first_works,
    leads,
    leave,
    leave_on_errors,
    one_job,
    require_agreement,
    sharers_of,
    together,
)
from jaxplain.progress import Progress, hide_bars_of_libraries, progress_bars
from jaxplain.resuming import first_difference, require_same
from jaxplain.stopping import StopRequest
from jaxplain.store.files import Files
from jaxplain.store.schema import STORE_NAME
from jaxplain.store.writer import (
    StoreWriter,
    begun_at,
    blocks_of,
    finished_run,
    holds_nothing,
    unfinished_store,
)
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.parity import differences, require_parity, require_torch, table_of, torch_reference
from jaxplain.subjects.subject import Subject, open_subject
from jaxplain.subjects.vocabulary import token_bytes
from jaxplain.summary import summarised
from jaxplain.viewer.terminal import print_sample

# A file on a network disk may be seen half a minute after another host has made it.
_SECONDS_TO_SEE = 60.0


def main(arguments: Sequence[str]) -> None:
    """Parse, extract, and show a little of what was found."""
    parser = config_parser(ExtractConfig, "extract")
    add_flag(parser, "--overwrite", "Replace the store that the output folder holds, at the end.")
    add_count(parser, "--check-parity", "Before the run, compare N sequences with torch, layer by layer.")
    parser.add_class_arguments(DistributedConfig, as_group=False)
    config, options = parse_config(parser, ExtractConfig, arguments)
    fields = (field.name for field in dataclasses.fields(DistributedConfig))
    join(DistributedConfig(**{name: options[name] for name in fields}))
    if not (config.run.progress and leads()):
        hide_bars_of_libraries()
    with summarised(options) as summary:
        with one_job():
            extract(config, overwrite=options.overwrite, check_parity=options.check_parity)
        if leads():
            summary |= _sum_up(config)


def _sum_up(config: ExtractConfig) -> dict[str, Any]:
    """Show some neurons of a store, and sum up what is in it."""
    store = jaxplain.open_store(config.output)
    shown = print_sample(store, Console())
    side = "min" if "min" in config.exemplars.kinds else config.exemplars.kinds[0]
    print(f"The store is {_join(config.output, STORE_NAME)}. Look at any neuron, from any side:")
    print(
        f"  {_python()} -m jaxplain.show {shlex.quote(config.output)} --layer {shown[-1].layer} "
        f"{'' if shown[-1].expert is None else f'--expert {shown[-1].expert} '}"
        f"--neuron {shown[-1].index} --kind {side}"
    )
    return {
        "store": _join(config.output, STORE_NAME),
        "splits": {name: {"sequences": store[name].sequence_count} for name in store.splits},
        "seconds": store.attributes.get("seconds", {}),
    }


def extract(config: ExtractConfig, *, overwrite: bool = False, check_parity: int | None = None) -> None:
    """Run an extraction, after comparing `check_parity` of its sequences with torch.

    One that was interrupted goes on, unless it is to overwrite what is there. A store that is to be
    replaced stays until the new one is complete (on local disks).

    Raises JaxplainError for anything in the config that does not fit the subject, corpus or devices, or the
    store in the making, and Stopped where SIGTERM has come.
    """
    leave_on_errors()
    path = _join(config.output, STORE_NAME)
    with StopRequest() as stop:
        with together():
            _require_able_to_check(check_parity)
            unfinished = None if overwrite else unfinished_store(path)
            finished = None if overwrite or unfinished is not None else finished_run(path)
            if unfinished is None and not overwrite and finished is None and not holds_nothing(path):
                raise _exists_already(path)
            subject, sources, selection, mesh = _prepare(config)
            tabled = choose_neurons(config.statistics.tokens.neurons, selection, seed=config.corpus.seed)
            excluded = _excluded_tokens(config.corpus, subject)
            attributes = _attributes(config, subject, sources)
            if unfinished is not None:
                require_same(_decisive(unfinished), _decisive(attributes), config.output)
                _require_same_checkpoints(unfinished, config)
            if finished is not None and first_difference(_decisive(finished), _decisive(attributes)):
                raise _exists_already(path)
            records = {f"what corpus.sources[{n}] holds": source.sample() for n, source in enumerate(sources)}
        require_agreement(_decisive(attributes) | {"run": recorded(config.run)} | _versions() | records)
        if exchange([finished is not None])[0, 0]:
            if leads():
                print(f"{path} is complete already")
            return
        sequences = sequences_to_cut(sources, config.corpus, splits=len(config.exemplars.splits))
        workers = worker_count(
            config.run.input_workers, sequences=sequences, sharers=sharers_of(cores_of_process())
        )
        # They start while the weights load.
        with open_workers(workers, reading(sources, subject.tokenizer)) as work:
            model = subject.load(mesh, depth=selection.depth, over_data=config.run.shard_weights)
            if check_parity:
                _check_parity(subject, model, _first_sequences(sources, config, subject, check_parity))
            step, weights = make_step(
                model,
                mesh,
                active_above=config.statistics.active_above,
                gather=config.run.shard_weights,
            )
            extraction = Extraction(
                config=config,
                mesh=mesh,
                selection=selection,
                step=step,
                weights=weights,
                excluded=excluded,
                vocabulary=subject.arch.vocabulary,
                tabled=tabled,
            )
            writer = _open_writer(path, attributes, unfinished, config, overwrite=overwrite)
            writer.write_vocabulary(token_bytes(subject.tokenizer, subject.arch.vocabulary))
            seconds = _extract_splits(extraction, writer, sources, subject, work, stop, workers=workers)
    writer.finish(seconds=seconds)
    if leads() and (kept := _checkpoint_folder(config)):
        Files(kept).delete_all()


def _exists_already(path: str) -> JaxplainError:
    return JaxplainError(
        f"{path} exists already, and is not what this config makes; choose another output, or replace it "
        "with --overwrite."
    )


def _require_same_checkpoints(unfinished: Mapping[str, Any], config: ExtractConfig) -> None:
    """Raise JaxplainError where a run would start a split over because its checkpoints are elsewhere."""
    named = unfinished["config"].get("run", {}).get("checkpoint_folder")
    before = named or (None if "://" in config.output else config.output)
    if before in (None, config.saves_in):
        return
    if not Files(_join(before, f"{STORE_NAME}.checkpoints")).is_empty():
        raise JaxplainError(
            f"run.checkpoint_folder is {config.run.checkpoint_folder!r}, but the checkpoints of the store in "
            f"the making are in {before!r}; go on with those, or start anew with --overwrite."
        )


def _prepare(config: ExtractConfig) -> tuple[Subject, list[Source], Selection, Mesh]:
    """What a run needs besides weights; anything that the config has wrong is found here."""
    subject = open_subject(config.subject)
    if config.corpus.sequence_length > subject.arch.max_positions:
        raise JaxplainError(
            f"corpus.sequence_length is {config.corpus.sequence_length}, but {subject.id} reads at "
            f"most {subject.arch.max_positions} tokens."
        )
    selection = select_neurons(config.neurons, subject.arch)
    mesh = make_mesh(
        config.run.mesh,
        batch_size=config.run.batch_size,
        mlp_width=undivided_width(subject.arch, config.run.mesh.model),
    )
    require_memory(config, selection, mesh)
    sources = [
        open_source(source, subject.tokenizer, valueeval_dir=config.corpus.valueeval_dir)
        for source in config.corpus.sources
    ]
    for source in sources:
        prefix_of(source, config.corpus, subject.tokenizer)  # what it raises, it had better raise at once
    return subject, sources, selection, mesh


def _open_writer(
    path: str,
    attributes: dict[str, Any],
    unfinished: Mapping[str, Any] | None,
    config: ExtractConfig,
    *,
    overwrite: bool,
) -> StoreWriter:
    """The store that this run goes on with, or one that it begins."""
    kept = _checkpoint_folder(config)

    def open_it() -> StoreWriter:
        if unfinished is not None:
            return StoreWriter(path, attributes, begun=unfinished.get("begun", ""))
        if kept is not None and not Files(kept).is_empty():
            if not overwrite:
                raise JaxplainError(
                    f"the checkpoints in {kept} are of a store that is not at {path}; "
                    "name another run.checkpoint_folder, or start anew with --overwrite."
                )
            Files(kept).delete_all()
        return StoreWriter(path, attributes)

    with together():
        writer = open_it() if leads() else None
    all_in_time(lambda: begun_at(path) is not None, seconds=_SECONDS_TO_SEE)
    with together():
        return writer or StoreWriter(path, attributes, leads=False)


def _extract_splits(
    extraction: Extraction,
    writer: StoreWriter,
    sources: Sequence[Source],
    subject: Subject,
    work: Work,
    stop: StopRequest,
    *,
    workers: int,
) -> dict[str, dict[str, float]]:
    """Cut and read each split, but for those that are complete; how many seconds this took."""
    config = extraction.config
    kept = _checkpoint_folder(config)
    progress = progress_bars(enabled=config.run.progress and leads())
    if kept is None and leads():
        print("no checkpoints are saved, since run.checkpoint_folder names no folder for them")
    seconds = {}
    for split in config.exemplars.splits:
        # The first process looks: the others may not see yet what it wrote.
        looked = [leads() and writer.has_split(split), leads() and writer.has_sequences(split)]
        complete, has_sequences = exchange(looked)[0]
        if complete:
            continue
        table = None
        if not has_sequences:
            table = _write_table(
                split, writer, sources, config.corpus, subject, progress, work, stop, workers=workers
            )
            if table is not None:
                _report(split, table, config.corpus)
            all_in_time(lambda split=split: writer.has_sequences(split), seconds=_SECONDS_TO_SEE)
        folder = None if kept is None else f"{kept}/{split}"
        clock = extraction.run_split(writer, split, progress, folder=folder, stop=stop)
        seconds[split] = {"read": clock.total, "waited_for_input": clock.waited}
        if leads():
            cut = f"{table.rows:,} sequences cut in {table.seconds:.1f} s and " if table is not None else ""
            waited = clock.waited / clock.total if clock.total else 0.0
            print(
                f"{split}: {cut}read in {clock.total:.1f} s, of which the devices waited "
                f"{clock.waited:.1f} s ({waited:.1%}) for input"
            )
        if table is not None:
            seconds[split]["cut"] = table.seconds
        if folder is not None and leads():
            Files(folder).delete_all()
    return seconds


def _write_table(
    split: str,
    writer: StoreWriter,
    sources: Sequence[Source],
    config: CorpusConfig,
    subject: Subject,
    progress: Progress,
    work: Work,
    stop: StopRequest,
    *,
    workers: int,
) -> TokenTable | None:
    """Cut a split, by all processes; the first, which writes the table, tells what it wrote."""
    processes, process = jax.process_count(), jax.process_index()
    mail = Mail(split)

    def write() -> TokenTable:
        everyone = work if processes == 1 else shared_out(work, mail, processes=processes, workers=workers)
        return write_token_table(
            writer,
            sources,
            config,
            split,
            subject.tokenizer,
            progress,
            vocabulary=subject.arch.vocabulary,
            work=everyone,
        )

    def help_write(over: threading.Event) -> None:
        help_first(work, mail, process=process, workers=workers, over=over)
        mail.throw_away(str(process))

    message = f"stopped by SIGTERM: the same command cuts the sequences of {split} again."
    return first_works(write, stop, message, others=help_write)


def _checkpoint_folder(config: ExtractConfig) -> str | None:
    """Where checkpoints go; None where nowhere."""
    folder = config.saves_in
    return None if folder is None else _join(folder, f"{STORE_NAME}.checkpoints")


def _first_sequences(
    sources: Sequence[Source], config: ExtractConfig, subject: Subject, count: int
) -> np.ndarray:
    """The first sequences that the run will read, [N, T]."""
    windows = windows_of_split(sources, config.corpus, config.exemplars.splits[0], subject.tokenizer)
    block = next(blocks_of(windows, count), None)
    if block is None or block.token_NT.max() >= subject.arch.vocabulary:
        return np.zeros((0, config.corpus.sequence_length), np.int32)  # the run will say what is wrong
    return block.token_NT


def _require_able_to_check(check_parity: int | None) -> None:
    if not check_parity:
        return
    if jax.process_count() > 1:
        raise JaxplainError("--check-parity is for a run of one process; check once, and leave it out here.")
    require_torch()


def _check_parity(subject: Subject, model: Decoder, tokens_NT: np.ndarray) -> None:
    if not len(tokens_NT):
        return
    found = differences(model, torch_reference(subject, layers=len(model.layers)), tokens_NT)
    print(table_of(found, sequences=len(tokens_NT), dtype=subject.dtype.name), flush=True)
    require_parity(found, subject.dtype.name)


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


def _decisive(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a store's attributes those that decide what is in it, as they are read back."""
    names = ("config", "subject", "tokenizer_hash", "corpora", "jaxplain_version")
    found = json.loads(json.dumps({name: attributes.get(name) for name in names}))
    for name in ("run", "output"):
        found["config"].pop(name, None)
    return found


def _versions() -> dict[str, str]:
    return {"jax version": jax.__version__, "jaxlib version": importlib.metadata.version("jaxlib")}


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
    run(main, leave=leave)
