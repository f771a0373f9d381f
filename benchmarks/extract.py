"""How fast extraction is, against its own bare forward pass and against the same work in torch.

    python benchmarks/extract.py [--torch PYTHON] [--store RUN]

All rates are sequences per second, medians over interleaved steps of one process, float32,
SmolLM2-135M-Instruct, random tokens, all layers, max, min and random with activations. The state is
primed with the priorities that it would have after N sequences, so that a step does the work of a
step at that point; `entries` says how many sequences really entered, per neuron, kind and step, and
what was expected. With --torch (a Python that has torch and transformers) the peer in
`benchmarks/torch_peer.py` is run right after. With --store, reading and size of a store are measured.
Prints JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxplain
from jaxplain.configs.extraction import MeshConfig, StatisticsConfig, SubjectConfig
from jaxplain.exemplars.reduction import KINDS, LayerReduction, Rows, empty_reduction
from jaxplain.exemplars.step import Reductions, make_step
from jaxplain.exemplars.topk import TopK
from jaxplain.mesh import make_mesh
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.subject import Subject, open_subject

CALIBRATION_BATCHES = 8


class Extremes(NamedTuple):
    """Folds activations to each sequence's highest and lowest."""

    highest: jax.Array | None = None
    lowest: jax.Array | None = None

    def fold(self, acts_BTF: jax.Array) -> "Extremes":
        return Extremes(acts_BTF.max(axis=1), acts_BTF.min(axis=1))


def extremes_of(model: Decoder, batches: list[np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Priorities of every neuron over the calibration batches, {layer: {kind: [N, F]}}."""
    graph, weights = nnx.split(model)
    layers = range(len(model.layers))

    @jax.jit
    def forward(weights: nnx.State, tokens_BT: jax.Array) -> dict[int, Extremes]:
        initial = nnx.State({"layers": {i: {"mlp": {MLP_ACTIVATION: Sown(Extremes())}} for i in layers}})
        run = cast(Callable[..., Any], nnx.capture(nnx.merge(graph, weights), Sown, init=initial))
        _, sown = run(tokens_BT)
        return {i: sown["layers"][i]["mlp"][MLP_ACTIVATION].get_value() for i in layers}

    found = [forward(weights, jnp.asarray(batch)) for batch in batches]
    return {
        layer: {
            "max": np.concatenate([np.asarray(f[layer].highest) for f in found]),
            "min": -np.concatenate([np.asarray(f[layer].lowest) for f in found]),
        }
        for layer in layers
    }


def top_priorities(sample_NF: np.ndarray, seen: int, k: int) -> np.ndarray:
    """Typical priorities of the k best of `seen` sequences, strongest first, [k, F].

    Beyond the sample's 90% quantile the distribution is continued by an exponential tail.
    """
    edge_F = np.quantile(sample_NF, 0.9, axis=0)
    excess_F = np.where(sample_NF > edge_F, sample_NF - edge_F, 0).sum(0) / (sample_NF > edge_F).sum(0)
    above_k1 = (np.arange(k)[:, None] + 0.5) / seen
    return (edge_F + excess_F * np.log(0.1 / above_k1)).astype(np.float32)


def primed(reduction: LayerReduction, extremes: dict[str, np.ndarray], seen: int, k: int) -> LayerReduction:
    """The reduction as it would be after `seen` sequences, but for the activations themselves."""
    tops: dict[Any, TopK] = {}
    for kind, top in reduction.tops.items():
        if kind == "random":
            priority_RG = 1 - ((np.arange(k, dtype=np.float32)[:, None] + 0.5) / seen)
        else:
            priority_RG = top_priorities(extremes[kind], seen, k)
        tops[kind] = top._replace(
            priority_RG=jnp.asarray(priority_RG)[None],
            sequence_RG=jnp.zeros_like(top.sequence_RG),
            slot_RG=jnp.array(top.slot_RG),
        )
    return reduction._replace(tops=tops)


def measure(subject: Subject, *, batch: int, tokens: int, k: int, steps: int) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    model = subject.load(mesh)
    graph, _ = nnx.split(model)
    step, weights = make_step(model, mesh)
    trunk = jax.jit(lambda weights, tokens_BT: nnx.merge(graph, weights)(tokens_BT))
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        return rng.integers(0, subject.arch.vocabulary, (batch, tokens), np.int32)

    extremes = extremes_of(model, [draw() for _ in range(CALIBRATION_BATCHES)])
    first_id = 10**6

    def rows(number: int) -> Rows:
        return Rows(
            tokens_BT=jnp.asarray(draw()),
            counted_BT=jnp.ones((batch, tokens), bool),
            sequence_B=jnp.arange(batch, dtype=jnp.int32) + first_id + batch * number,
            lottery_B=jnp.asarray(rng.random(batch, np.float32)),
            token_lottery_BT=jnp.asarray(-rng.random((batch, tokens), np.float32)),
        )

    states: dict[int, Reductions] = {}
    for seen in (2_000, 20_000):
        states[seen] = {
            layer: primed(
                empty_reduction(
                    kinds=KINDS,
                    neurons=subject.arch.neurons,
                    k=k,
                    tokens=tokens,
                    sampled_tokens=StatisticsConfig().sampled_tokens,
                    dtype=jnp.dtype("float16"),
                    mesh=mesh,
                ),
                extremes[layer],
                seen,
                k,
            )
            for layer in range(subject.arch.layers)
        }
    seconds: dict[Any, list[float]] = {"trunk": [], 2_000: [], 20_000: []}
    for number in range(steps + 1):
        batch_rows = jax.block_until_ready(rows(number))
        start = time.perf_counter()
        jax.block_until_ready(trunk(weights, batch_rows.tokens_BT))
        seconds["trunk"].append(time.perf_counter() - start)
        for seen in states:
            start = time.perf_counter()
            states[seen] = jax.block_until_ready(step(states[seen], weights, batch_rows, {}))
            seconds[seen].append(time.perf_counter() - start)
    # The first of each compiles.
    rates = {name: batch / statistics.median(times[1:]) for name, times in seconds.items()}
    entries = {
        str(seen): {
            "measured": {
                kind: round(
                    float(
                        np.mean(
                            [
                                np.mean((np.asarray(r.tops[kind].sequence_RG) >= first_id).sum(1))
                                for r in state.values()
                            ]
                        )
                    )
                    / (steps + 1),
                    3,
                )
                for kind in KINDS
            },
            "expected": batch * k / seen,
        }
        for seen, state in states.items()
    }
    return {
        "trunk": round(rates["trunk"], 3),
        "extract_after_2000": round(rates[2_000], 3),
        "extract_after_20000": round(rates[20_000], 3),
        "ratio_to_trunk_after_2000": round(rates[2_000] / rates["trunk"], 3),
        "ratio_to_trunk_after_20000": round(rates[20_000] / rates["trunk"], 3),
        "entries": entries,
    }


def measure_store(path: str) -> dict[str, Any]:
    """Median milliseconds to read one neuron's exemplars of a kind, and bytes on disk per neuron."""
    store = jaxplain.open_store(path)
    split = store[store.splits[0]]
    rng = np.random.default_rng(0)
    seconds = []
    for layer, index in zip(rng.choice(split.layers, 300), rng.choice(split.neurons, 300), strict=True):
        start = time.perf_counter()
        split.neuron(int(layer), int(index)).exemplars("max")
        seconds.append(time.perf_counter() - start)
    folder = Path(store.zarr_path) / split.name
    size = sum(f.stat().st_size for kind in ("max", "min") for f in (folder / kind).rglob("*") if f.is_file())
    return {
        "read_ms_median": round(1e3 * statistics.median(seconds), 3),
        "read_ms_p95": round(1e3 * float(np.quantile(seconds, 0.95)), 3),
        "max_and_min_bytes_per_neuron": round(size / (len(split.layers) * len(split.neurons))),
        "k": store.config["exemplars"]["k"],
        "tokens": store.config["corpus"]["sequence_length"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=95)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--peer", default=str(Path(__file__).with_name("torch_peer.py")))
    parser.add_argument("--store", help="a run whose reading and size to measure")
    options = parser.parse_args()
    subject = open_subject(SubjectConfig(id=options.subject))
    sizes = {"batch": options.batch, "tokens": options.tokens, "k": options.k}
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    report |= {"devices": str(jax.devices()), "subject": subject.id, "dtype": "float32", **sizes}
    report |= measure(subject, **sizes, steps=options.steps)
    if options.torch:
        command = [options.torch, options.peer, "--model", str(subject.folder), "--steps", str(options.steps)]
        command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        peer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        report["torch"] = {name: peer[name] for name in ("trunk", "one_pass", "per_layer")}
        for name in ("one_pass", "per_layer"):
            report[f"ratio_to_torch_{name}"] = round(report["extract_after_2000"] / peer[name], 2)
    if options.store:
        report["store"] = measure_store(options.store)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
