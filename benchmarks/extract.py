"""How fast extraction is, against its own bare forward pass and against the same work in torch.

    python benchmarks/extract.py [--torch PYTHON] [--store RUN]

All rates are sequences per second, medians over interleaved steps of one process, float32,
SmolLM2-135M-Instruct, random tokens, all layers, max, min and random with activations. The state is primed
with the priorities that it would have after N sequences, so that a step does the work of a step at that
point; `entries` says how many sequences really entered, per neuron, kind and step, and what was expected.
`statistics` is what a step takes longer for moments and quantiles (default), for token tables of eight
neurons per layer besides (tables), and for exemplars of kind quantile too (everything), after 2,000 of 20,000
sequences. With --torch (a Python that has torch and transformers) the peer in `benchmarks/torch_peer.py` is
run right after. With --store, reading and size of a store are measured. Prints JSON.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jaxplain
from jaxplain.configs.extraction import ExemplarsConfig, MeshConfig, StatisticsConfig, SubjectConfig
from jaxplain.exemplars import reduction as reduction_module
from jaxplain.exemplars.reduction import KINDS, LayerReduction, Rows, empty_reduction
from jaxplain.exemplars.step import Reductions, Step, make_step
from jaxplain.exemplars.strata import kept_of_draws, plan_strata
from jaxplain.exemplars.topk import TopK
from jaxplain.mesh import make_mesh
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.mlp import MLP_ACTIVATION, Sown
from jaxplain.subjects.subject import Subject, open_subject

CALIBRATION_BATCHES = 8
FIRST_ID = 10**6
SPLIT_ROWS = 20_000
TABLED_NEURONS = 8
"""Per layer."""


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


def top_priorities(sample_NF: np.ndarray, seen: float, k: int) -> np.ndarray:
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
    draws: dict[int, TopK] = {}
    for drawn, top in reduction.draws.items():
        kept, drawn_so_far = top.priority_RG.shape[1], seen * drawn / SPLIT_ROWS
        priority_RG = top_priorities(extremes["max"], drawn_so_far, kept)
        priority_RG[int(drawn_so_far) :] = -np.inf
        draws[drawn] = top._replace(priority_RG=jnp.asarray(priority_RG)[None])
    return reduction._replace(tops=tops, draws=draws)


def primed_reductions(
    subject: Subject,
    mesh: Mesh,
    extremes: dict[int, dict[str, np.ndarray]],
    seen: int,
    *,
    k: int,
    tokens: int,
    **more: Any,
) -> Reductions:
    """Every layer's reduction as it would be after `seen` sequences; `more` is for `empty_reduction`."""
    return {
        layer: primed(
            empty_reduction(
                kinds=KINDS,
                neurons=subject.arch.neurons,
                k=k,
                tokens=tokens,
                sampled_tokens=StatisticsConfig().sampled_tokens,
                dtype=jnp.dtype("float16"),
                mesh=mesh,
                **more,
            ),
            extremes[layer],
            seen,
            k,
        )
        for layer in range(subject.arch.layers)
    }


def random_rows(rng: np.random.Generator, subject: Subject, number: int, *, batch: int, tokens: int) -> Rows:
    """A batch as it might come from the middle of a split of SPLIT_ROWS sequences."""
    drawn = round(StatisticsConfig().sampled_tokens * batch / SPLIT_ROWS)
    places = np.full((2, 1, batch * tokens), -1, np.int32)
    places[0, 0, :drawn] = np.sort(rng.choice(batch * tokens, drawn, replace=False))
    places[1, 0, :drawn] = np.arange(drawn)
    return Rows(
        tokens_BT=jnp.asarray(rng.integers(0, subject.arch.vocabulary, (batch, tokens), np.int32)),
        counted_BT=jnp.ones((batch, tokens), bool),
        sequence_B=jnp.arange(batch, dtype=jnp.int32) + FIRST_ID + batch * number,
        lottery_B=jnp.asarray(rng.random(batch, np.float32)),
        turn_B=jnp.asarray(rng.integers(0, SPLIT_ROWS, batch, np.int32)),
        drawn_PW=jnp.asarray(places[0]),
        slot_PW=jnp.asarray(places[1]),
    )


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
    states: dict[int, Reductions] = {}
    for seen in (2_000, 20_000):
        states[seen] = primed_reductions(subject, mesh, extremes, seen, k=k, tokens=tokens)
    seconds: dict[Any, list[float]] = {"trunk": [], 2_000: [], 20_000: []}
    for number in range(steps + 1):
        batch_rows = jax.block_until_ready(random_rows(rng, subject, number, batch=batch, tokens=tokens))
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
                                np.mean((np.asarray(r.tops[kind].sequence_RG) >= FIRST_ID).sum(1))
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


def measure_statistics(subject: Subject, *, batch: int, tokens: int, k: int, steps: int) -> dict[str, Any]:
    """What statistics add to a step, as a share of a step that only keeps exemplars (max, min and random)."""
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    model = subject.load(mesh)
    rng = np.random.default_rng(0)
    shape = (batch, tokens)
    calibration = [
        rng.integers(0, subject.arch.vocabulary, shape, np.int32) for _ in range(CALIBRATION_BATCHES)
    ]
    extremes = extremes_of(model, calibration)
    exemplars = ExemplarsConfig()
    state = primed_reductions(
        subject,
        mesh,
        extremes,
        2_000,
        k=k,
        tokens=tokens,
        draws=kept_of_draws(plan_strata(exemplars.strata, wanted=exemplars.samples_per_quantile)),
        summed=np.arange(TABLED_NEURONS, dtype=np.int32),
        vocabulary=subject.arch.vocabulary,
    )
    unchanged = {
        name: mock.patch.object(reduction_module, name, lambda state, *_, **__: state)
        for name in ("update_moments", "update_sample")
    }
    variants = ("exemplars", "default", "tables", "everything")
    steps_of: dict[str, tuple[Step, nnx.State]] = {name: make_step(model, mesh) for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(steps + 1):
        for place in range(len(variants)):
            name = variants[(number + place) % len(variants)]
            step, weights = steps_of[name]
            rows = random_rows(rng, subject, number * len(variants) + place, batch=batch, tokens=tokens)
            jax.block_until_ready(rows)
            without: dict[str, Any] = {} if name == "everything" else {"draws": {}}
            without |= {} if name in ("tables", "everything") else {"token_sums": None}
            part = {layer: r._replace(**without) for layer, r in state.items()}
            with contextlib.ExitStack() as stack:
                if name == "exemplars":  # traced in the first round
                    for patch in unchanged.values():
                        stack.enter_context(patch)
                start = time.perf_counter()
                done = jax.block_until_ready(step(part, weights, rows, {}))
                seconds[name].append(time.perf_counter() - start)
            state = {
                layer: r._replace(**{field: getattr(state[layer], field) for field in without})
                for layer, r in done.items()
            }
    # The first of each compiles. Rounds are compared each in itself, whatever else the machine does.
    alone = np.array(seconds["exemplars"][1:])
    return {
        name: {
            "seconds_per_step": round(statistics.median(seconds[name][1:]), 4),
            "overhead": round(float(np.median(np.array(seconds[name][1:]) / alone)) - 1, 4),
        }
        for name in variants
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
    parser.add_argument("--only", choices=("speed", "statistics"), help="measure one of the two alone")
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--peer", default=str(Path(__file__).with_name("torch_peer.py")))
    parser.add_argument("--store", help="a run whose reading and size to measure")
    options = parser.parse_args()
    subject = open_subject(SubjectConfig(id=options.subject))
    sizes = {"batch": options.batch, "tokens": options.tokens, "k": options.k}
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    report |= {"devices": str(jax.devices()), "subject": subject.id, "dtype": "float32", **sizes}
    if options.only != "statistics":
        report |= measure(subject, **sizes, steps=options.steps)
    if options.only != "speed":
        report["statistics"] = measure_statistics(subject, **sizes, steps=options.steps)
    if options.torch and options.only != "statistics":
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
