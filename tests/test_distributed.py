"""How processes join: what each environment amounts to, and processes that really do."""

import json
import os
import random
import subprocess
import sys

import pytest

from jaxplain import distributed
from jaxplain.configs.distributed import DistributedConfig
from jaxplain.distributed import arguments_to_join, join, slurm_devices
from jaxplain.errors import JaxplainError
from jaxplain.extract import main

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "4096000.0;tcp://127.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI_4.items() if name != "OMPI_MCA_orte_hnp_uri"}


@pytest.fixture(autouse=True)
def no_tpus(monkeypatch):
    monkeypatch.setattr(distributed, "_has_tpus", lambda: False)


ALONE = {
    "nothing": {},
    "a batch script": {name: value for name, value in SLURM.items() if "STEP" not in name},
    "one task": SLURM | {"SLURM_NTASKS": "1"},
    "one rank": OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"},
    "one worker": {"TPU_WORKER_HOSTNAMES": "localhost"},
    "a pod of its own": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}
TOGETHER = {
    "slurm": SLURM,
    "open mpi 4": OPEN_MPI_4,
    "workers": {"TPU_WORKER_HOSTNAMES": "a,b"},
    "workers with ports": {"TPU_PROCESS_ADDRESSES": "a:1,b:1"},
    "slices": {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
    "an indexed job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
}


@pytest.mark.parametrize("case", ALONE)
def test_stays_alone(case):
    assert arguments_to_join(DistributedConfig(), ALONE[case]) is None


@pytest.mark.parametrize("case", TOGETHER)
def test_joins_by_itself(case):
    assert arguments_to_join(DistributedConfig(), TOGETHER[case]) == {}
    assert arguments_to_join(DistributedConfig(processes=1), TOGETHER[case]) is None


def test_a_machine_with_tpus_asks_jax(monkeypatch):
    monkeypatch.setattr(distributed, "_has_tpus", lambda: True)
    assert arguments_to_join(DistributedConfig(), {}) == {}
    calls = []

    def initialize(**arguments):
        calls.append(arguments)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    join(DistributedConfig(), {})
    assert calls == [{}]
    with pytest.raises(JaxplainError, match=r"^this process could not join .*--processes 1\.$"):
        join(DistributedConfig(), TOGETHER["workers"])


def test_flags_win_over_the_environment():
    config = DistributedConfig(coordinator="h:1", processes=4, process=3)
    expected = {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}
    for environment in ({}, *TOGETHER.values()):
        found = arguments_to_join(config, environment)
        assert found == expected | {"cluster_detection_method": "deactivate"}


def test_newer_open_mpi_needs_the_coordinator_alone():
    found = arguments_to_join(DistributedConfig(coordinator="h:1"), OPEN_MPI_5)
    assert (found["num_processes"], found["process_id"]) == (2, 1)
    with pytest.raises(JaxplainError, match=r"^Open MPI started 2 processes, .* give --coordinator"):
        arguments_to_join(DistributedConfig(), OPEN_MPI_5)


GPUS = {
    "one task": ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}, 8, None, range(8)),
    "a task per gpu": ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5"}, 8, None, [5]),
    "two tasks": (
        {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_NODEID": "2"},
        8,
        "0,1,2,3,4,5,6,7",
        range(4, 8),
    ),
    "uneven nodes": ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, 4, None, range(4)),
    "bound": ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5"}, 8, "5", [0]),
}


@pytest.mark.parametrize("case", GPUS)
def test_gpus_of_a_slurm_task(case):
    variables, gpus, visible, expected = GPUS[case]
    environment = SLURM | variables | {"SLURM_GPUS_ON_NODE": str(gpus)}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert slurm_devices(environment) == list(expected)
    assert arguments_to_join(DistributedConfig(), environment) == {"local_device_ids": list(expected)}


def test_tasks_that_cannot_share_gpus_are_refused():
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"}
    with pytest.raises(JaxplainError, match=r"^the 3 tasks of this node cannot share its 8 GPUs evenly;"):
        slurm_devices(environment)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"coordinator": "host"}, "coordinator is 'host'; give HOST:PORT of process 0."),
        ({"processes": 0}, "processes is 0; give 1 or more."),
        ({"processes": 2, "process": 2}, "process is 2; give 0 to 1."),
        ({"process": 1}, "process is 1; say with processes how many there are, too."),
        ({"coordinator": "h:1"}, "coordinator is 'h:1'; give --processes and --process too."),
        ({"processes": 2, "process": 0}, "processes is 2; give --coordinator too."),
    ],
)
def test_what_does_not_fit_is_refused(fields, sentence):
    with pytest.raises(JaxplainError) as error:
        join(DistributedConfig(**fields), {})
    assert str(error.value) == sentence


def test_extract_takes_the_flags(tmp_path):
    source = '[{"dataset": "json"}]'
    flags = ["--subject.id", "m", "--output", str(tmp_path), "--corpus.sources", source]
    with pytest.raises(JaxplainError, match=r"^processes is 2; give --coordinator and --process too\.$"):
        main([*flags, "--processes", "2"])


SUM = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxplain.configs.distributed import DistributedConfig
from jaxplain.distributed import join
join(DistributedConfig(**json.loads(sys.argv[1])))
from jaxplain.mesh import mesh_over
mesh = mesh_over(jax.devices(), 4, 1)
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P("data")), lambda i: np.arange(1.0, 5.0)[i])
add = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
print(json.dumps([jax.process_index(), jax.process_count(), float(jax.jit(add)(x)[0])]))
"""


def cluster(case, process):
    """What the flags and the environment of a process are; the port comes from the number of the job."""
    number = cluster.number
    match case:
        case "flags":
            flags = {"coordinator": f"localhost:{61440 + number}", "processes": 2, "process": process}
            return flags, {}
        case "slurm":
            task = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
            return {}, SLURM | task | {"SLURM_JOB_ID": str(number)}
        case "open mpi 4":
            rank = {f"OMPI_COMM_WORLD_{name}": str(process) for name in ("RANK", "LOCAL_RANK")}
            uri = f"{4096 * number}.0;tcp://127.0.0.1:1"
            return {}, OPEN_MPI_4 | rank | {"OMPI_MCA_orte_hnp_uri": uri}


@pytest.mark.parametrize("case", ["flags", "slurm", "open mpi 4"])
def test_two_processes_add_over_all_devices(case):
    cluster.number = random.SystemRandom().randrange(4096)
    processes = []
    for process in range(2):
        flags, environment = cluster(case, process)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SUM, json.dumps(flags)],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for number, process in enumerate(processes):
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert json.loads(out.splitlines()[-1]) == [number, 2, 10.0]
