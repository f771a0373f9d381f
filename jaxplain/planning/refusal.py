"""Refusing a run that cannot fit, before its weights are read."""

import os

import jax
from jax.sharding import Mesh

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import Selection
from jaxplain.planning.demand import Demand
from jaxplain.planning.fitting import propose_runs
from jaxplain.planning.hardware import GIB, Target
from jaxplain.planning.memory import state_bytes, weight_bytes


def require_memory(config: ExtractConfig, selection: Selection, mesh: Mesh) -> None:
    """Raise JaxplainError, with what would fit, where weights and state alone exceed a device's memory.

    What a step needs besides is an estimate, and refuses nothing.
    """
    limit = device_memory()
    if limit is None:
        return
    most = config.corpus.max_sequences
    sequences = dict.fromkeys(config.exemplars.splits, most) if most else {}
    demand = Demand(config=config, selection=selection, sequences=sequences)
    tiled = mesh.devices.flat[0].platform == "tpu"
    data, model = mesh.shape["data"], mesh.shape["model"]
    needed = [
        weight_bytes(demand, data=data, model=model, tiled=tiled),
        state_bytes(demand, model=model, tiled=tiled),
    ]
    if sum(needed) <= limit:
        return
    target = Target(
        name="these devices",
        devices=mesh.size,
        hosts=jax.process_count(),
        memory=limit,
        topology="tpu" if tiled else None,
        peaks={},
    )
    weights, state, available = (size / GIB for size in (*needed, limit))
    raise JaxplainError(
        f"each device would hold {weights:.2f} GiB of weights and {state:.2f} GiB of exemplars and "
        f"statistics, and has {available:.2f} GiB; {_remedy(demand, target)}."
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
