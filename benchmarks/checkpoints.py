"""What checkpoints cost an extraction.

    python benchmarks/checkpoints.py [--folder WHERE]

SmolLM2-135M-Instruct, all layers, max, min and random with activations, in a state full of random activations
(which compress badly) that nothing enters any more. Steps are timed while no checkpoint is written, then a
checkpoint is saved and steps are timed until it is on disk. Its cost is how long `save` holds the run up,
and what those steps took longer than the median step before. Medians over repetitions; `share` is of a run
that saves one every 15 minutes, the default. Prints JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplain.checkpoints import Checkpoints
from jaxplain.configs.extraction import MeshConfig, RunConfig, StatisticsConfig, SubjectConfig
from jaxplain.exemplars.draws import NEVER
from jaxplain.exemplars.reduction import KINDS, LayerReduction, Rows, empty_reduction
from jaxplain.exemplars.snapshots import snapshot
from jaxplain.exemplars.step import make_step
from jaxplain.exemplars.topk import TopK
from jaxplain.mesh import make_mesh
from jaxplain.subjects.subject import Subject, open_subject


def filled(reduction: LayerReduction, key: jax.Array) -> LayerReduction:
    """The reduction as if it had seen so much that nothing enters any more."""

    def fill(part: Any) -> Any:
        if not isinstance(part, TopK):
            return part
        return part._replace(
            priority_RG=jnp.full_like(part.priority_RG, jnp.finfo(jnp.float32).max),
            sequence_RG=jnp.zeros_like(part.sequence_RG),
            activation_FRT=jax.random.normal(key, part.activation_FRT.shape, part.activation_FRT.dtype),
        )

    return jax.tree.map(fill, reduction, is_leaf=lambda part: isinstance(part, TopK))


def measure(
    subject: Subject, folder: Path, *, batch: int, tokens: int, k: int, steps: int, repeats: int
) -> Any:
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    step, weights = make_step(subject.load(mesh), mesh)
    rng = np.random.default_rng(0)
    rows = Rows(
        tokens_BT=jnp.asarray(rng.integers(0, subject.arch.vocabulary, (batch, tokens), np.int32)),
        counted_BT=jnp.ones((batch, tokens), bool),
        sequence_B=jnp.arange(batch, dtype=jnp.int32),
        lottery_B=jnp.asarray(rng.random(batch, np.float32)),
        turn_B=jnp.full(batch, NEVER, jnp.int32),
        drawn_PW=jnp.full((1, batch * tokens), -1, jnp.int32),
        slot_PW=jnp.full((1, batch * tokens), -1, jnp.int32),
    )
    state = {
        layer: filled(
            empty_reduction(
                kinds=KINDS,
                neurons=subject.arch.neurons,
                k=k,
                tokens=tokens,
                sampled_tokens=StatisticsConfig().sampled_tokens,
                dtype=jnp.dtype("float16"),
                mesh=mesh,
            ),
            jax.random.key(layer),
        )
        for layer in range(subject.arch.layers)
    }
    kept = dict.fromkeys(state, subject.arch.neurons)

    def timed_step() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, weights, rows, {}))
        return time.perf_counter() - start

    timed_step()  # compiles
    found: dict[str, list[float]] = {name: [] for name in ("held_up", "slowed_by", "written_in", "step")}
    with Checkpoints(folder) as checkpoints:
        for repeat in range(repeats + 1):
            usual = statistics.median(timed_step() for _ in range(steps))
            start = time.perf_counter()
            checkpoints.save(repeat, snapshot(state, kept=kept, summed={}, mesh=mesh), {})
            held_up = time.perf_counter() - start
            during = []
            while checkpoints.writing:
                during.append(timed_step())
            values = (held_up, sum(during) - usual * len(during), time.perf_counter() - start, usual)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        checkpoints.wait()
        newest = folder / str(checkpoints.steps[-1])
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    # The first of each compiles.
    seconds = {name: round(statistics.median(values[1:]), 3) for name, values in found.items()}
    cost = statistics.median(a + b for a, b in zip(found["held_up"][1:], found["slowed_by"][1:], strict=True))
    interval = 60 * RunConfig().checkpoint_minutes
    return {
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "checkpoint_bytes": size,
        "seconds": seconds,
        "cost_seconds": round(cost, 3),
        "interval_seconds": interval,
        "share": round(cost / interval, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=95)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoints go; a temporary folder by default")
    options = parser.parse_args()
    subject = open_subject(SubjectConfig(id=options.subject))
    sizes = {"batch": options.batch, "tokens": options.tokens, "k": options.k}
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    report |= {"devices": str(jax.devices()), "subject": subject.id, **sizes}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report |= measure(subject, Path(folder), **sizes, steps=options.steps, repeats=options.repeats)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
