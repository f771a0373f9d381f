"""How fast simulators are read and trained.

    python benchmarks/simulate.py --torch PYTHON [--runs N]

SmolLM2-135M-Instruct, float32. Scoring: random explanations of 30 to 50 tokens with 10 sequences of 64
tokens each, jaxplain's and torch's loop (`benchmarks/torch_simulate_peer.py`, with a Python that has torch
and transformers) by turns, each in a process of its own, compiled and warmed up; simulations (sequences)
per second, medians over the runs. Training: steps of the last 8 layers on 16 rows by `Trainer`, with its
batches made as they come, against the same loss and optimiser as one jitted function over ready arrays;
medians of interleaved steps. Prints JSON.
"""

import argparse
import itertools
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
import optax

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.finetuning import TrainingConfig
from jaxplain.mesh import make_mesh
from jaxplain.simulators.level_reader import Asked, LevelReader
from jaxplain.simulators.pairs import Pairs, training_batches
from jaxplain.simulators.parts import decoder_of, parameters_of
from jaxplain.simulators.readout import expected_levels
from jaxplain.simulators.training import Trainer
from jaxplain.subjects.subject import Subject, open_subject

LEVEL_IDS = np.arange(11, dtype=np.int32)
JOBS, SEQUENCES, TOKENS = 16, 10, 64
ROWS, STEPS, LAYERS = 16, 3, 8


def make_jobs(vocabulary: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": rng.integers(100, vocabulary, length).tolist(),
            "sequences": rng.integers(100, vocabulary, (SEQUENCES, TOKENS)).tolist(),
        }
        for length in rng.integers(30, 51, JOBS)
    ]


def simulate(subject: Subject, batch: int) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    reader = LevelReader(subject.load(mesh, with_head=True), mesh, LEVEL_IDS, batch_size=batch)
    asked = [
        Asked(number, job["prompt"], [np.array(s, np.int32) for s in job["sequences"]])
        for number, job in enumerate(make_jobs(subject.arch.vocabulary))
    ]
    dict(reader.read(iter(asked)))
    start = time.perf_counter()
    found = dict(reader.read(iter(asked)))
    seconds = time.perf_counter() - start
    expected = [[expected_levels(values).tolist() for values in found[n]] for n in range(len(asked))]
    return {"expected": expected, "seconds": seconds}


def train(subject: Subject) -> dict[str, float]:
    """Median seconds of a step, ours and a plain one."""
    mesh = make_mesh(MeshConfig(), batch_size=ROWS, mlp_width=subject.arch.neurons)
    config = TrainingConfig(
        batch_size=ROWS,
        parts="last_layers",
        last_layers=LAYERS,
        compute_dtype="float32",
        remat=False,
        warmup=0,
    )
    pairs = Pairs(TOKENS + 40)
    rng = np.random.default_rng(0)
    for _ in range(100):
        pairs.add(
            rng.integers(100, 40000, 40).tolist(),
            [(rng.integers(100, 40000, TOKENS), rng.integers(0, 11, TOKENS))],
        )
    batches = training_batches(pairs, batch_size=ROWS, seed=0, start=0)
    decoder = subject.load(mesh, with_head=True)
    trainer = Trainer(decoder, config, LEVEL_IDS, mesh)
    state = trainer.start()

    graph, parameters = parameters_of(decoder)
    first = subject.arch.layers - LAYERS
    chosen = {f"layers.{number}" for number in range(first, subject.arch.layers)}
    trained = {n: v for n, v in parameters.items() if ".".join(n.split(".")[:2]) in chosen}
    frozen = {n: v for n, v in parameters.items() if n not in trained}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    moments = optimiser.init(trained)

    @jax.jit
    def step(trained: Any, moments: Any, frozen: Any, tokens_BT: Any, levels_BT: Any) -> Any:
        def loss(trained: Any) -> Any:
            model = decoder_of(graph, trained | frozen)
            logits_BTL = model.unembed(model(tokens_BT), LEVEL_IDS)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTL, jnp.maximum(levels_BT, 0))
            return (losses * (levels_BT >= 0)).sum() / (levels_BT >= 0).sum()

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, moments = optimiser.update(gradient, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    ready = [
        (jnp.asarray(b.tokens_BT), jnp.asarray(b.levels_BT)) for b in itertools.islice(batches, STEPS + 1)
    ]
    seconds: dict[str, list[float]] = {"jaxplain": [], "plain": []}
    for tokens_BT, levels_BT in ready:
        start = time.perf_counter()
        state, metrics = trainer.step(state, next(batches))
        jax.block_until_ready(metrics)
        seconds["jaxplain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        trained, moments, _ = jax.block_until_ready(step(trained, moments, frozen, tokens_BT, levels_BT))
        seconds["plain"].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=20, help="jaxplain's sequences at once")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--one", action="store_true", help="one run of jaxplain, as the others start it")
    options = parser.parse_args()
    subject = open_subject(SubjectConfig(id=options.model))
    if options.one:
        json.dump(simulate(subject, options.batch), sys.stdout)
        return
    ours = [sys.executable, __file__, "--one", "--model", options.model, "--batch", str(options.batch)]
    commands = {"jaxplain": ours}
    if options.torch:
        peer = str(Path(__file__).with_name("torch_simulate_peer.py"))
        commands["torch"] = [options.torch, peer, "--model", str(subject.folder)]
    jobs = json.dumps(make_jobs(subject.arch.vocabulary))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    load = []
    for _ in range(options.runs):
        for name, command in commands.items():
            done = subprocess.run(command, check=True, input=jobs, stdout=subprocess.PIPE, text=True)
            runs[name].append(json.loads(done.stdout))
            load.append(round(os.getloadavg()[0], 1))
    rates = {name: [JOBS * SEQUENCES / run["seconds"] for run in found] for name, found in runs.items()}
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    report |= {"subject": subject.id, "dtype": "float32", "batch": options.batch, "load_averages": load}
    scoring: dict[str, Any] = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    scoring["runs"] = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
    if options.torch:
        scoring["ratio_to_torch"] = round(
            statistics.median(rates["jaxplain"]) / statistics.median(rates["torch"]), 2
        )
        mine, theirs = (np.array(runs[name][0]["expected"]) for name in ("jaxplain", "torch"))
        scoring["largest_difference"] = float(np.abs(mine - theirs).max())
    report["simulations_per_second"] = scoring
    seconds = train(subject)
    report["training_step_seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    report["training_ratio_to_plain"] = round(seconds["plain"] / seconds["jaxplain"], 3)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
