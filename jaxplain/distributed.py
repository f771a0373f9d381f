"""How the processes of one run join: by themselves where a cluster started them, else as they are told."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxplain.configs.distributed import DistributedConfig
from jaxplain.errors import JaxplainError, first_line

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_REMEDY = (
    "say where they meet with --coordinator HOST:PORT --processes N --process I, or run this process alone "
    "with --processes 1"
)


def join(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Make this process one of its run's, before anything is asked of jax's devices.

    Slurm, Open MPI, TPU slices (GKE and multislice included) and indexed jobs of Kubernetes are recognised.
    Where nothing says that there are others, the process stays alone.

    Raises JaxplainError where some of what it must know is missing, or the others cannot be reached.
    """
    arguments = arguments_to_join(config, environment)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        if not arguments and "coordinator_address" in str(error) and not _are_several(environment):
            return  # a machine with TPUs that is not part of a slice
        raise JaxplainError(
            f"this process could not join the others of its run: {first_line(error)}; {_REMEDY}."
        ) from error


def arguments_to_join(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs, which finds out the rest by itself; None to stay alone."""
    if config.processes == 1:
        return None
    given = {"coordinator": config.coordinator, "processes": config.processes, "process": config.process}
    if config.coordinator is not None and _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        given["processes"] = config.processes or int(environment["OMPI_COMM_WORLD_SIZE"])
        if config.process is None:
            given["process"] = int(environment["OMPI_COMM_WORLD_RANK"])
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return {
            "coordinator_address": given["coordinator"],
            "num_processes": given["processes"],
            "process_id": given["process"],
            # Otherwise a GPU is chosen by the process's number where a cluster is recognised too.
            "cluster_detection_method": "deactivate",
        }
    if len(missing) < len(given):
        name, value = next(item for item in given.items() if item[1] is not None)
        raise JaxplainError(f"{name} is {value!r}; give {' and '.join(f'--{name}' for name in missing)} too.")
    if _under_slurm(environment):
        devices = slurm_devices(environment)
        return {} if devices is None else {"local_device_ids": devices}
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1 and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise JaxplainError(
            f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes, but does not say where the "
            "first one is; give --coordinator HOST:PORT."
        )
    return {} if _are_several(environment) or _has_tpus() else None


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this task of Slurm sees it may use; None where Slurm gave none.

    By itself jax takes the one with the task's own number on its node. That leaves GPUs idle where there are
    fewer tasks, and fails where Slurm has bound each task to a GPU of its own, which has the number 0.
    """
    on_node = _count(environment, "SLURM_GPUS_ON_NODE")
    if not on_node:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES")
    seen = len(visible.split(",")) if visible else on_node
    tasks = _tasks_on_node(environment)
    if seen < on_node or tasks == 1:
        return list(range(seen))
    if seen % tasks:
        raise JaxplainError(
            f"the {tasks} tasks of this node cannot share its {seen} GPUs evenly; start as many tasks per "
            "node as GPUs, or one."
        )
    share, local = seen // tasks, int(environment["SLURM_LOCALID"])
    return list(range(local * share, (local + 1) * share))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Of this step, from a list such as 8(x2),4 over its nodes."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environment["SLURM_NODEID"])]


def _under_slurm(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in _SLURM) and _count(environment, "SLURM_NTASKS") > 1


def _are_several(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return (
        _under_slurm(environment)
        or _count(environment, "OMPI_COMM_WORLD_SIZE") > 1
        or _count(environment, "MEGASCALE_NUM_SLICES") > 1
        or "," in hosts
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    )


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _has_tpus() -> bool:
    """A worker of a Cloud TPU slice learns of the others from the machine's metadata alone."""
    chips = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*"))
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
