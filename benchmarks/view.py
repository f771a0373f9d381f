"""How soon pages are there.

    python benchmarks/view.py RUN
    python benchmarks/view.py --layers 32 --neurons 14336 [--folder FOLDER]

Serves a run by `python -m jaxplain.view`, as a process of its own, and asks it for pages over loopback: the
first page of a fresh server, the same again, neurons drawn at random, searches. Without RUN it makes a store
of so many neurons x 100 ranks first (two kinds, 96 tokens), with statistics of all of them and exemplars of
`--filled` in each layer, so that it is small on disk; and explanations of `--explained`. Medians of
`--rounds`; milliseconds from the request to the answer's last byte. `rss_MB` is the server's memory in the
end. Prints JSON.
"""

import argparse
import contextlib
import http.client
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

import jaxplain
from jaxplain.progress import progress_bars
from jaxplain.store.explanations import Sample, open_explanations
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.schema import STATISTICS, STORE_NAME
from jaxplain.store.scores import Score, ScoreDatabase
from jaxplain.store.writer import SequenceBlock, StoreWriter
from jaxplain.viewer.catalogue import Catalogue
from jaxplain.viewer.pages import file_of
from jaxplain.viewer.peaks import build_index, index_folder

K, TOKENS, SEQUENCES, VOCABULARY = 100, 96, 20_000, 128_256
LEVELS = tuple(np.linspace(0.05, 0.95, 19).round(2).tolist())
KINDS = ("max", "min")
WORDS = ["angle", "bird", "city", "dance", "east", "fish", "garden", "house", "king", "moon", "ocean"]


def write_store(path: Path, *, layers: int, neurons: int, filled: int) -> None:
    rng = np.random.default_rng(0)
    config = {
        "exemplars": {"splits": ["train"], "kinds": KINDS, "k": K},
        "statistics": {"quantiles": LEVELS},
    }
    writer = StoreWriter(path, {"config": config, "subject": {"id": "synthetic"}, "corpora": ["synthetic"]})
    writer.write_vocabulary([f" word{number}".encode() for number in range(VOCABULARY)])
    block = SequenceBlock(
        token_NT=rng.integers(0, VOCABULARY, (SEQUENCES, TOKENS), np.int32),
        corpus_N=np.zeros(SEQUENCES, np.int32),
        document_N=np.arange(SEQUENCES),
        start_N=np.zeros(SEQUENCES, np.int32),
        length_N=np.full(SEQUENCES, TOKENS, np.int32),
    )
    writer.write_sequences("train", [block], tokens=TOKENS)
    split = writer.create_split(
        "train",
        layers=np.arange(layers),
        neurons=np.arange(neurons),
        kinds=KINDS,
        k=K,
        tokens=TOKENS,
        activation_dtype="float16",
        quantiles=LEVELS,
    )
    acts_NRT = rng.standard_normal((filled, K, TOKENS), np.float32).astype(np.float16)
    columns = np.arange(filled)
    for layer in range(layers):
        for kind, sign in (("max", 1), ("min", -1)):
            split.write_exemplars(
                kind,
                layer,
                columns,
                score_NR=-np.sort(-sign * acts_NRT.max(axis=2).astype(np.float32), axis=1),
                sequence_NR=rng.integers(0, SEQUENCES, (filled, K), np.int32),
                activation_NRT=sign * acts_NRT,
            )
        values = {name: rng.standard_normal(neurons) for name in STATISTICS}
        values |= {
            "count": np.full(neurons, 10**6),
            "variance": rng.random(neurons),
            "fraction_active": rng.random(neurons),
        }
        values |= {"kurtosis": 3 + rng.exponential(20, neurons)}
        values["quantile"] = np.sort(rng.standard_normal((neurons, len(LEVELS))), axis=1)
        split.write_statistics(layer, np.arange(neurons), **values)
    writer.finish()


def write_explanations(path: Path, explained: int) -> None:
    store = jaxplain.open_store(path)
    rng = np.random.default_rng(0)
    split = store["train"]
    with open_explanations(
        path.parent / "explanations.sqlite", fingerprint=store.fingerprint, subject="synthetic"
    ) as database:
        recipe = database.recipe({"explainer": {"provider": "none"}, "prompt": {"style": "none"}}, "0")
        scores = ScoreDatabase(database)
        simulator = scores.simulator({})
        for number in range(explained):
            name = NeuronId((int(split.layers[number % len(split.layers)]), number // len(split.layers)))
            text = " ".join(rng.choice(WORDS, 6))
            database.finish(recipe, name, [Sample(sign="max", sample=0, status="explained", text=text)])
            one = Score(
                explanation=number + 1,
                sign="max",
                simulator="synthetic",
                split="train",
                sequences="top+random",
                metric="correlation",
                calibration="none",
                value=float(rng.uniform(-0.2, 1)),
                reason=None,
                low=0.0,
                high=1.0,
            )
            scores.add_scores(simulator, [one], top=1, random=1)


def get(port: int, path: str) -> tuple[float, int]:
    """Milliseconds and bytes."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", path)
    answer = connection.getresponse()
    size = len(answer.read())
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{path} gave status {answer.status}")
    return 1000 * (time.perf_counter() - start), size


@contextlib.contextmanager
def served(run: Path) -> Iterator[tuple[int, int, float]]:
    """The server's process, its port, and the seconds until it listened."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxplain.view", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline().split("/  ")[0].rsplit(":", 1)[1])
    try:
        yield process.pid, port, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def measure(run: Path, *, rounds: int, filled: int | None, index: bool) -> dict[str, Any]:
    store = jaxplain.open_store(run)
    split = store[store.splits[0]]
    catalogue = Catalogue(split)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, len(catalogue), 20 * rounds).tolist()
    names = [catalogue.neuron(row) for row in rows]
    if filled is not None:
        names = [NeuronId((name.layer, name.index % filled)) for name in names]
    seconds_of_index = None
    if index:
        start = time.perf_counter()
        folder = index_folder(store)
        assert folder is not None
        build_index(store, folder, progress_bars(enabled=False))
        seconds_of_index = round(time.perf_counter() - start, 1)
    firsts, starts = [], []
    for _ in range(rounds - 1):
        with served(run) as (_, port, start):
            firsts.append(get(port, "/")[0])
            starts.append(start)
    token = "word1*" if filled is not None else "angle*"
    searches = {
        "kurtosis above 10, by kurtosis": {"by": "kurtosis", "from": "10", "to": "", "sort": "kurtosis"},
        "a word": {"words": WORDS[0]},
        "by a quantile": {"sort": f"quantile {LEVELS[-1]}"} if filled is not None else {"sort": "skewness"},
        "by highest activation": {"sort": "highest"},
        "a token anywhere": {"token": token, "where": "anywhere"},
    }
    if index:
        searches["a token"] = {"token": token}
    with served(run) as (process, port, start):
        firsts.append(get(port, "/")[0])
        starts.append(start)
        report = {
            "neurons": len(catalogue),
            "seconds_to_listen": round(statistics.median(starts), 2),
            "seconds_of_index": seconds_of_index,
            "first_page_ms": [round(ms) for ms in firsts],
            "page_again_ms": round(statistics.median(get(port, "/")[0] for _ in range(rounds))),
            "page_kB": round(get(port, "/")[1] / 1e3),
        }
        times = [get(port, f"/neuron/{split.name}/{file_of(name)}") for name in names]
        ms = sorted(t for t, _ in times)
        report["neuron_ms"] = {
            "median": round(statistics.median(ms), 1),
            "95%": round(ms[int(0.95 * len(ms))], 1),
            "kB": round(statistics.median(size for _, size in times) / 1e3),
        }
        report["search_ms"] = {
            label: {
                "first": round(get(port, f"/search.html?{urlencode(asked)}")[0]),
                "again": round(
                    statistics.median(get(port, f"/search.html?{urlencode(asked)}")[0] for _ in range(rounds))
                ),
            }
            for label, asked in searches.items()
        }
        status = Path(f"/proc/{process}/status")
        if status.exists():
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
            report["rss_MB"] = round(int(line.split()[1]) / 1e3)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=14_336)
    parser.add_argument("--filled", type=int, default=64, help="neurons of a layer that have exemplars")
    parser.add_argument("--explained", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--index", action="store_true", help="make the index of tokens, and search by it")
    parser.add_argument("--folder", type=Path, help="where to make the store")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    if options.run is not None:
        report |= measure(options.run, rounds=options.rounds, filled=None, index=options.index)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / STORE_NAME
            write_store(path, layers=options.layers, neurons=options.neurons, filled=options.filled)
            write_explanations(path, options.explained)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            report["store_MB"] = round(size / 1e6)
            report |= measure(Path(folder), rounds=options.rounds, filled=options.filled, index=options.index)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
