"""Refusing a run that cannot fit, before its weights are read."""

import os

import jax
from jax.sharding import Mesh

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import Selection
from jaxplain.planning.demand import Demand
from jaxplain.planning.fitting import largest_batch, propose_runs
from jaxplain.planning.hardware import GIB, Target
from jaxplain.planning.memory import memory


def require_memory(config: ExtractConfig, selection: Selection, mesh: Mesh) -> None:
    """Raise JaxplainError, with what would fit, where the plan exceeds a device's memory."""
    limit = device_memory()
    if limit is None or not config.run.check_memory:
        return
    most = config.corpus.max_sequences
    sequences = dict.fromkeys(config.exemplars.splits, most) if most else {}
    demand = Demand(config=config, selection=selection, sequences=sequences)
    tiled = mesh.devices.flat[0].platform == "tpu"
    data, model = mesh.shape["data"], mesh.shape["model"]
    needed = memory(demand, data=data, model=model, batch=config.run.batch_size, tiled=tiled)
    if needed.total <= limit:
        return
    target = Target(
        name="these devices",
        devices=mesh.size,
        hosts=jax.process_count(),
        memory=limit,
        topology="tpu" if tiled else None,
        peaks={},
    )
    step = max(needed.temporaries, needed.snapshot)
    weights, state, more, available = (size / GIB for size in (needed.weights, needed.state, step, limit))
    fitting = largest_batch(demand, target, data=data, model=model)
    remedy = f"run.batch_size {fitting.batch} should fit" if fitting else _remedy(demand, target)
    raise JaxplainError(
        f"each device would hold {weights:.2f} GiB of weights, {state:.2f} GiB of exemplars and statistics "
        f"and about {more:.2f} GiB besides, and has {available:.2f} GiB; {remedy} (or run.check_memory "
        "false, to try all the same)."
    )


def device_memory() -> int | None:
    """Bytes that a program may have on each device; of a CPU's, its share of the host's memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _remedy(demand: Demand, target: Target) -> str:
    runs = propose_runs(demand, target)
    if runs is None:
        return "lower exemplars.k or corpus.sequence_length, choose fewer neurons, or use more devices"
    choice = runs.choice
    mesh = f"run.mesh data {choice.data} x model {choice.model} and run.batch_size {choice.batch}"
    if len(runs.layers) == 1:
        return f"{mesh} should fit"
    parts = " and ".join(f"{layers[0]}:{layers[-1] + 1}" for layers in runs.layers[:2])
    return (
        f"use more devices, lower exemplars.k, or take the layers in {len(runs.layers)} runs, such as "
        f"neurons.layers {parts}, each with {mesh}"
    )
