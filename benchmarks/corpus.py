"""How fast a corpus is tokenised, cut and written as a token table, and how fast that is read again.

    python benchmarks/corpus.py [--workers 0 1 2]

10,000 sequences of 96 tokens by SmolLM2's tokenizer, from the packaged corpora (leads of Wikipedia articles,
and conversations through the chat template), as `python -m jaxplain.extract` makes them.

`rate` is sequences per second from the moment that the workers are ready, and `per_core` sequences per second
of processor time, of this process and the workers together. 0 workers are this process alone, with one thread
(and once more with as many as the tokenizers library takes). `feed` is what a device gets: batches read from
the table. Each figure is the median of `--repeats` runs; all numbers of workers must make the same table.
Prints JSON.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.configs.extraction import CorpusConfig, SourceConfig, SubjectConfig
from jaxplain.corpora.sources import Source, open_source
from jaxplain.corpora.tokens import token_batches, write_token_table
from jaxplain.corpora.windows import reading
from jaxplain.corpora.workers import Work, open_workers
from jaxplain.progress import progress_bars
from jaxplain.store.writer import StoreWriter
from jaxplain.subjects.subject import Subject, open_subject

KINDS = {
    "packed": ("text", "packed"),
    "head": ("text", "head"),
    "random": ("text", "random"),
    "chat": ("chat", "packed"),
}
SEQUENCES = 10_000
PRESETS = {"text": "wikipedia-leads", "chat": "chitchat"}
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds() -> float:
    """Of this process and of the workers that run."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    seconds = own.ru_utime + own.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def worker_megabytes() -> list[int]:
    """Resident memory of each worker."""
    pages = [
        Path(f"/proc/{child.pid}/statm").read_text().split() for child in multiprocessing.active_children()
    ]
    return [int(fields[1]) * resource.getpagesize() // 2**20 for fields in pages]


def corpus(windows: Any) -> CorpusConfig:
    sources = (SourceConfig(preset="wikipedia-leads"),)
    return CorpusConfig(
        sources=sources, splits={"train": 1.0}, sequence_length=96, max_sequences=SEQUENCES, windows=windows
    )


def write(source: Source, config: CorpusConfig, subject: Subject, folder: Path, work: Work) -> StoreWriter:
    writer = StoreWriter(folder / "bench.zarr", {})
    vocabulary = subject.arch.vocabulary
    progress = progress_bars(enabled=False)
    write_token_table(
        writer, [source], config, "train", subject.tokenizer, progress, vocabulary=vocabulary, work=work
    )
    return writer


def measure(run: Callable[[], Any], *, sequences: int, repeats: int) -> dict[str, int]:
    """Median rates of what makes or reads so many sequences."""
    rates, per_core = [], []
    for _ in range(repeats):
        started, busy = time.perf_counter(), processor_seconds()
        run()
        rates.append(sequences / (time.perf_counter() - started))
        per_core.append(sequences / (processor_seconds() - busy))
    return {"rate": round(statistics.median(rates)), "per_core": round(statistics.median(per_core))}


def digest(writer: StoreWriter) -> tuple[int, str]:
    """How many sequences were written, and a hash of all that is known of them."""
    hashed = hashlib.sha256()
    arrays = {
        name: np.asarray(array.read().result()) for name, array in writer.read_sequences("train").items()
    }
    for array in arrays.values():
        hashed.update(np.ascontiguousarray(array).tobytes())
    return len(arrays["token"]), hashed.hexdigest()


def measure_cutting(
    subject: Subject, sources: dict[str, Source], folder: Path, *, workers: int, repeats: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Rates of each kind, and a hash of each kind's table."""
    report: dict[str, Any] = {}
    hashes = {}
    for kind, (layout, windows) in KINDS.items():
        source, config = sources[layout], corpus(windows)
        started = time.perf_counter()
        with open_workers(workers, reading([source], subject.tokenizer)) as work:
            blocks = source.blocks(seed=0)
            list(work(_count, [next(blocks) for _ in range(4 * workers)]))  # so that each worker has had one
            if workers:
                report["seconds_to_start"] = round(time.perf_counter() - started, 1)
            write_once = functools.partial(write, source, config, subject, folder, work)
            sequences, hashes[kind] = digest(write_once())
            report[kind] = measure(write_once, sequences=sequences, repeats=repeats)
            report[kind]["sequences"] = sequences
            if workers:
                report["worker_megabytes"] = worker_megabytes()
    return report, hashes


def _count(shared: Any, block: Any) -> int:
    return len(block.rows)


def measure_feed(writer: StoreWriter, *, batch: int, repeats: int) -> dict[str, int]:
    table = writer.read_sequences("train")

    def read() -> None:
        for _ in token_batches(table, batch_size=batch, seed=0):
            pass

    return measure(read, sequences=table["token"].shape[0], repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", default="smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    subject = open_subject(SubjectConfig(id=options.subject))
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report |= {"subject": subject.id, "sequence_length": 96}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = {
            layout: open_source(SourceConfig(preset=preset), subject.tokenizer)
            for layout, preset in PRESETS.items()
        }
        expected: dict[str, str] = {}
        for workers in options.workers:
            found, hashes = measure_cutting(
                subject, sources, folder, workers=workers, repeats=options.repeats
            )
            report[f"workers_{workers}"] = found
            if (expected := expected or hashes) != hashes:
                raise SystemExit(f"{workers} workers cut other sequences than {options.workers[0]}")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        found, _ = measure_cutting(subject, sources, folder, workers=0, repeats=options.repeats)
        report["workers_0_all_threads"] = found
        with open_workers(0, reading([sources["text"]], subject.tokenizer)) as work:
            writer = write(sources["text"], corpus("packed"), subject, folder, work)
            report["feed"] = {
                f"batch_{batch}": measure_feed(writer, batch=batch, repeats=options.repeats)
                for batch in (32, 256)
            }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
