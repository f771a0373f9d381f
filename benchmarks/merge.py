"""How fast stores are merged, against a plain copy of the same bytes.

    python benchmarks/merge.py [--gigabytes 1] [--stores 2] [--folder FOLDER]

Makes stores of synthetic activations (float16, k = 100, 96 tokens; max, min and random, quantiles) in FOLDER
(a temporary one by default), each of about so many gigabytes. Then, in turn, copies them all (cp -r) and
merges them (python -m jaxplain.merge, its start included), each followed by sync; medians over rounds. The
system holds the stores in its cache for both. MB/s are 10**6 bytes of the stores to be merged, as they are on
disk, per second; `cpu_seconds` tell how much of the time was work, and how much waiting. Prints JSON.
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplain.configs.extraction import (
    CorpusConfig,
    ExemplarsConfig,
    ExtractConfig,
    SourceConfig,
    SubjectConfig,
    recorded,
)
from jaxplain.corpora.hashing import lottery
from jaxplain.store.schema import STATISTICS
from jaxplain.store.writer import SequenceBlock, StoreWriter

NEURONS, K, TOKENS, VOCABULARY = 1536, 100, 96, 49_152


def write_store(path: Path, number: int, *, layers: int, sequences: int) -> None:
    """A store whose exemplars are as hard to compress as real ones, by shifting a layer's worth of noise."""
    rng = np.random.default_rng(0)
    config = ExtractConfig(
        subject=SubjectConfig(id="synthetic"),
        corpus=CorpusConfig(
            sources=(SourceConfig(dataset="json", data_files="synthetic.jsonl"),),
            sequence_length=TOKENS,
            splits={"train": 1.0},
        ),
        exemplars=ExemplarsConfig(splits=["train"]),
        output=str(path),
    )
    attributes: dict[str, Any] = {"config": recorded(config), "subject": {"id": "synthetic"}}
    writer = StoreWriter(path, attributes | {"corpora": ["synthetic"]})
    writer.write_vocabulary([b" word"] * VOCABULARY)
    document_N = np.arange(sequences, dtype=np.int64) + number * sequences
    zeros_N = np.zeros(sequences, np.int32)
    block = SequenceBlock(
        token_NT=rng.integers(0, VOCABULARY, (sequences, TOKENS), np.int32),
        corpus_N=zeros_N,
        document_N=document_N,
        start_N=zeros_N,
        length_N=zeros_N + TOKENS,
    )
    writer.write_sequences("train", [block], tokens=TOKENS)
    sampled = config.statistics.sampled_tokens
    split = writer.create_split(
        "train",
        layers=np.arange(layers),
        neurons=np.arange(NEURONS),
        kinds=config.exemplars.kinds,
        k=K,
        tokens=TOKENS,
        activation_dtype="float16",
        quantiles=config.statistics.quantiles,
        sampled_tokens=sampled,
    )
    noise_NRT = rng.standard_normal((NEURONS, K, TOKENS), np.float32)
    order_NR1 = np.argsort(-noise_NRT.max(axis=2), axis=1)[:, :, None]
    highest_NRT = np.take_along_axis(noise_NRT, order_NR1, axis=1).astype(np.float16)
    sequence_NR = rng.integers(0, sequences, (NEURONS, K), np.int32)
    drawn_N = lottery(0, document_N, zeros_N)
    random_R = np.argsort(-drawn_N)[:K]
    sample_NM = rng.standard_normal((NEURONS, sampled), np.float32).astype(np.float16)
    lottery_M = -np.sort(rng.random(sampled, np.float32))
    split.write_draws(lottery_M=lottery_M, sequence_M=rng.integers(0, sequences, sampled, np.int32))
    columns = np.arange(NEURONS)
    for layer in range(layers):
        # No two stores have the same exemplars in one place.
        shifted_NRT = np.roll(highest_NRT, 7 * layer + 3 * number, axis=0)
        for kind, sign in (("max", 1), ("min", -1)):
            split.write_exemplars(
                kind,
                layer,
                columns,
                score_NR=sign * shifted_NRT.max(axis=2).astype(np.float32),
                sequence_NR=sequence_NR,
                activation_NRT=sign * shifted_NRT,
            )
        split.write_exemplars(
            "random",
            layer,
            columns,
            score_NR=np.broadcast_to(drawn_N[random_R], (NEURONS, K)),
            sequence_NR=np.broadcast_to(random_R.astype(np.int32), (NEURONS, K)),
            activation_NRT=np.roll(noise_NRT, 7 * layer + 5 * number, axis=0).astype(np.float16),
        )
        split.write_sample(layer, columns, np.roll(sample_NM, 7 * layer + 3 * number, axis=0))
        values = {name: np.ones(NEURONS) for name in STATISTICS} | {"count": np.full(NEURONS, 10**6)}
        split.write_statistics(layer, columns, **values)
    writer.finish()


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start


def without_quantiles(path: Path) -> None:
    """Make a store forget that it has quantiles."""
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["config"]["statistics"]["quantiles"] = []
    (path / "zarr.json").write_text(json.dumps(root))


def measure(folder: Path, *, gigabytes: float, stores: int, rounds: int) -> dict[str, Any]:
    neuron_bytes = 2 * TOKENS * K * 3
    layers = max(1, round(gigabytes * 1e9 / neuron_bytes / NEURONS))
    paths = [folder / f"{number}.zarr" for number in range(stores)]
    for number, path in enumerate(paths):
        write_store(path, number, layers=layers, sequences=20_000)
    read = sum(map(size_of, paths))
    out = folder / "out"
    merge = [sys.executable, "-m", "jaxplain.merge", str(out), *map(str, paths), "--quiet"]

    def copy() -> float:
        (out / "copies").mkdir(parents=True)
        return timed(["cp", "-r", *map(str, paths), str(out / "copies")])

    ways: dict[str, Callable[[], float]] = {"copy": copy, "merge": lambda: timed(merge)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {}
    written = 0

    def take(name: str) -> None:
        nonlocal written
        before = cpu_seconds()
        seconds.setdefault(name, []).append(ways[name]())
        work.setdefault(name, []).append(cpu_seconds() - before)
        written = size_of(out)
        shutil.rmtree(out)

    for _ in range(rounds):
        for name in ("copy", "merge"):
            take(name)
    merged = written
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    for path in paths:
        without_quantiles(path)
    ways["merge_without_quantiles"] = ways["merge"]
    for _ in range(rounds):
        take("merge_without_quantiles")
    start = timed([sys.executable, "-c", "import jaxplain.merge"])
    return {
        "stores": stores,
        "layers": layers,
        "neurons": NEURONS,
        "read_MB": round(read / 1e6),
        "written_MB": round(merged / 1e6),
        "seconds": {name: [round(second, 2) for second in taken] for name, taken in seconds.items()},
        "cpu_seconds": {name: round(statistics.median(taken), 2) for name, taken in work.items()},
        "seconds_to_start": round(start, 2),
        "MB_per_s": {name: round(read / 1e6 / statistics.median(t)) for name, t in seconds.items()},
        "ratio_to_copy": round(statistics.median(seconds["copy"]) / statistics.median(seconds["merge"]), 3),
        "peak_memory_MB": round(memory / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each store")
    parser.add_argument("--stores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the stores; on the disk to be measured")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report |= measure(
            Path(folder), gigabytes=options.gigabytes, stores=options.stores, rounds=options.rounds
        )
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
