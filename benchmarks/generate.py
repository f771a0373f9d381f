"""How fast generation is, against the same work in torch.

    python benchmarks/generate.py --torch PYTHON [--runs N]

SmolLM2-135M-Instruct, float32, greedy, 64 new tokens for batches of 8 prompts of random tokens.
  decode   tokens per second after prompts of 300 tokens, without the reading of them
  explain  tokens per second, reading included, for 24 prompts like those about neurons: they share
           their first 450 tokens and differ in the last 140 to 160
  apart    the same for prompts as long that share nothing
Each run is a process, jaxplain's and torch's (`benchmarks/torch_generate_peer.py`, with a Python that
has torch and transformers) by turns; every program is compiled, and every loop has run, before it is
timed. Rates are medians over the runs; `same_tokens` is the share of new tokens that agree. Prints JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.mesh import make_mesh
from jaxplain.subjects.generation import Generator, Sampling, _sample
from jaxplain.subjects.subject import open_subject


def workloads(vocabulary: int, batch: int) -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(0)

    def draw(length: int) -> list[int]:
        return rng.integers(100, vocabulary, length).tolist()

    lengths, shared = rng.integers(140, 161, 3 * batch), draw(450)
    return {
        "decode": [draw(300) for _ in range(batch)],
        "explain": [shared + draw(length) for length in lengths],
        "apart": [draw(450 + length) for length in lengths],
    }


def measure(model: str, *, batch: int, new: int) -> dict[str, Any]:
    """What every workload gave, and the seconds that it took."""
    subject = open_subject(SubjectConfig(id=model))
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    generator = Generator(subject.load(mesh, with_head=True), mesh, batch_size=batch)
    sampling = Sampling(temperature=0.0, max_tokens=new)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        found = dict(generator.generate(prompts, sampling, [0] * len(prompts)))
        return [found[number].tokens for number in range(len(prompts))]

    report = {}
    for name, prompts in workloads(subject.arch.vocabulary, batch).items():
        run(sorted(prompts, key=len)[-batch:])  # compiles: the longest decide the programs' sizes
        start = time.perf_counter()
        tokens = run(prompts)
        report[name] = {"tokens": tokens, "seconds": time.perf_counter() - start}
    [(_, prefix, cache, last_BD)] = generator._read(workloads(subject.arch.vocabulary, batch)["decode"], new)
    jax.block_until_ready(last_BD)
    start = time.perf_counter()
    arguments = (generator._graph, generator._weights, cache, prefix, last_BD, jnp.zeros(batch, jnp.uint32))
    jax.block_until_ready(_sample(*arguments, sampling))
    report["decode"]["seconds"] = time.perf_counter() - start
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--peer", default=str(Path(__file__).with_name("torch_generate_peer.py")))
    parser.add_argument("--one", action="store_true", help="one run of jaxplain, as the others start it")
    options = parser.parse_args()
    sizes = {"batch": options.batch, "new": options.new}
    if options.one:
        json.dump(measure(options.model, **sizes), sys.stdout)
        return
    subject = open_subject(SubjectConfig(id=options.model))
    prompts = workloads(subject.arch.vocabulary, options.batch)
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    commands = {"jaxplain": [sys.executable, __file__, "--one", "--model", options.model, *arguments]}
    if options.torch:
        commands["torch"] = [options.torch, options.peer, "--model", str(subject.folder), *arguments]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    load = []
    for _ in range(options.runs):
        for name, command in commands.items():
            done = subprocess.run(
                command, check=True, input=json.dumps(prompts), stdout=subprocess.PIPE, text=True
            )
            runs[name].append(json.loads(done.stdout))
            load.append(round(os.getloadavg()[0], 1))
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    report |= {"subject": subject.id, "dtype": "float32", **sizes, "load_averages": load}
    for workload, rows in prompts.items():
        rates = {
            name: [len(rows) * options.new / run[workload]["seconds"] for run in found]
            for name, found in runs.items()
        }
        medians = {name: statistics.median(found) for name, found in rates.items()}
        report[workload] = {name: round(median, 1) for name, median in medians.items()}
        report[workload]["runs"] = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
        if options.torch:
            ours, theirs = (np.array(runs[name][0][workload]["tokens"]) for name in ("jaxplain", "torch"))
            report[workload]["ratio_to_torch"] = round(medians["jaxplain"] / medians["torch"], 2)
            report[workload]["same_tokens"] = round(float((ours == theirs).mean()), 3)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
