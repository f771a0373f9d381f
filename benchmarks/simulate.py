"""How fast simulators are read and trained.

    python benchmarks/simulate.py --torch PYTHON [--runs N]

SmolLM2-135M-Instruct, float32. Scoring: random explanations of 30 to 50 tokens with 10 sequences of 64
tokens each, jaxplain's and torch's loops (`benchmarks/torch_simulate_peer.py`, with a Python that has torch
and transformers) by turns, each in a process of its own, compiled and warmed up; simulations (sequences)
per second, medians over the runs. Training: steps of the last 10 layers in bfloat16 on 4 explanations of 80
tokens with 6 sequences of 64 each by `Trainer`, with its batches made as they come, against the same loss and
optimiser as one jitted function over ready arrays, once with prompts read for every sequence anew; medians of
interleaved steps. Prints JSON.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.finetuning import TrainingConfig
from jaxplain.mesh import make_mesh
from jaxplain.simulators.level_reader import Asked, LevelReader
from jaxplain.simulators.pairs import Batch, Pairs, training_batches
from jaxplain.simulators.parts import decoder_of, parameters_of
from jaxplain.simulators.reading import read_sequences
from jaxplain.simulators.readout import expected_levels
from jaxplain.simulators.simulation import LEVELS
from jaxplain.simulators.training import Trainer
from jaxplain.subjects.subject import Subject, open_subject

LEVEL_IDS = np.arange(LEVELS, dtype=np.int32)
JOBS, SEQUENCES, TOKENS = 16, 10, 64
EXPLANATIONS, PROMPT, TOGETHER, STEPS, LAYERS = 4, 80, 6, 5, 10


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
    """Median seconds of a step: ours; a plain one that reads a prompt for every sequence, as torch would;
    and one over the same rows as ours."""
    mesh = make_mesh(MeshConfig(), batch_size=EXPLANATIONS, mlp_width=subject.arch.neurons)
    config = TrainingConfig(
        batch_size=EXPLANATIONS,
        parts="last_layers",
        last_layers=LAYERS,
        compute_dtype="bfloat16",
        remat=False,
        warmup=0,
    )
    pairs = Pairs(longest_prompt=PROMPT, together=TOGETHER, length=TOKENS)
    rng = np.random.default_rng(0)
    for _ in range(100):
        pairs.add(
            rng.integers(100, 40000, PROMPT).tolist(),
            [(rng.integers(100, 40000, TOKENS), rng.integers(0, LEVELS, TOKENS)) for _ in range(TOGETHER)],
        )
    batches = training_batches(pairs, batch_size=EXPLANATIONS, seed=0, start=0)
    trainer = Trainer(subject.load(mesh, with_head=True), config, LEVEL_IDS, mesh)
    ready = list(itertools.islice(batches, STEPS + 1))
    stepped = {"jaxplain": trainer.start(), "plain": None, "plain, prompts apart": None}
    plain = {name: plain_step(subject, mesh, apart="apart" in name) for name in stepped if name != "jaxplain"}
    seconds: dict[str, list[float]] = {name: [] for name in stepped}
    for batch in ready:
        for name in stepped:
            start = time.perf_counter()
            if name == "jaxplain":
                state, metrics = trainer.step(stepped[name], next(batches))
                jax.block_until_ready(metrics)
            else:
                state = jax.block_until_ready(plain[name](stepped[name], batch))
            stepped[name] = state
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def plain_step(subject: Subject, mesh: Mesh, *, apart: bool) -> Callable[[Any, Batch], Any]:
    """A step as one jitted function over ready arrays, of the same loss and optimiser."""
    decoder = subject.load(mesh, with_head=True)
    graph, parameters = parameters_of(decoder)
    kept = {f"layers.{number}" for number in range(subject.arch.layers - LAYERS, subject.arch.layers)}
    first = {n: v for n, v in parameters.items() if ".".join(n.split(".")[:2]) in kept}
    frozen = {n: v.astype(jnp.bfloat16) for n, v in parameters.items() if n not in first}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, frozen: Any, prompts_EP: Any, tokens_EST: Any, levels_EST: Any) -> Any:
        trained, moments = state

        def loss(trained: Any) -> Any:
            cast = {name: value.astype(jnp.bfloat16) for name, value in trained.items()}
            model = decoder_of(graph, cast | frozen)
            if apart:
                prompts_BP = jnp.repeat(prompts_EP, TOGETHER, axis=0)
                rows_BT = jnp.concatenate([prompts_BP, tokens_EST.reshape((-1, TOKENS))], axis=1)
                x_BTD = model(rows_BT)[:, PROMPT:]
            else:
                x_BTD = read_sequences(model, prompts_EP, tokens_EST)
            logits_BTL = model.unembed(x_BTD, LEVEL_IDS)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits_BTL, levels_EST.reshape((-1, TOKENS))
            )
            return losses.mean()

        gradient = jax.grad(loss)(trained)
        updates, moments = optimiser.update(gradient, moments, trained)
        return optax.apply_updates(trained, updates), moments

    def go_on(state: Any, batch: Batch) -> Any:
        if state is None:
            copied = jax.tree.map(jnp.copy, first)
            state = copied, optimiser.init(copied)
        return step(state, frozen, *batch)

    return go_on


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
        commands["torch, sequences apart"] = [*commands["torch"], "--apart"]
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
        for name in ("torch", "torch, sequences apart"):
            ratio = statistics.median(rates["jaxplain"]) / statistics.median(rates[name])
            scoring[f"ratio_to_{name}"] = round(ratio, 2)
        mine, theirs = (np.array(runs[name][0]["expected"]) for name in ("jaxplain", "torch"))
        scoring["largest_difference"] = float(np.abs(mine - theirs).max())
    report["simulations_per_second"] = scoring
    seconds = train(subject)
    report["training_step_seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    for name in ("plain", "plain, prompts apart"):
        report[f"training_ratio_to_{name}"] = round(seconds[name] / seconds["jaxplain"], 3)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
