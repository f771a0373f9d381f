"""Kills at moments drawn by a seed: in a step, in a checkpoint, while the store is written.

The long version: python -m pytest -m faults
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.running import runs

MOMENTS = ("cutting", "step", "checkpoint", "writing", "any")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return runs.write_config(folder, documents=1500, sequences=800, checkpoint_steps=5)


@pytest.fixture(scope="module")
def whole(config):
    process = start(config, config.parent / "whole")
    _, said = process.communicate()
    assert process.returncode == 0, said
    return config.parent / "whole"


def start(config, output):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "jaxplain.extract", "--config", str(config), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--run.mesh.data", "2", "--run.mesh.model", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def has_come(moment, output):
    """Whether a run has got to a moment, by the files that are there."""
    store, kept = output / "exemplars.zarr.partial", output / "exemplars.zarr.checkpoints"
    tables = [*store.glob("*/sequences/zarr.json")]
    match moment:
        case "cutting":
            return bool(tables)
        case "step" | "any":
            return any('"complete": true' in table.read_text() for table in tables)
        case "checkpoint":
            return any(kept.glob("*/*tmp*"))
        case "writing":
            return any(store.glob("*/max/score/c/*/*"))
    raise AssertionError(moment)


def kill(process, output, moment, delay):
    """Kill a run a while after a moment has come; whether it was in time."""
    while process.poll() is None and not has_come(moment, output):
        time.sleep(0.001)
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return alive


def run_and_kill(config, whole, tmp_path, kills, seed):
    rng = random.Random(seed)
    done, output, number = 0, tmp_path / "0", 0
    while done < kills:
        moment = MOMENTS[done % len(MOMENTS)]
        process = start(config, output)
        # A run that is killed again and again at the same moment would never get further.
        delay = rng.uniform(0, 3.0 if moment == "any" else 0.1)
        done += kill(process, output, moment, delay)
        if not (output / "exemplars.zarr").exists():
            continue
        runs.assert_same_bits(output, whole)
        number += 1
        output = tmp_path / str(number)
    process = start(config, output)
    _, said = process.communicate()
    assert process.returncode == 0, said
    runs.assert_same_bits(output, whole)
    runs.assert_nothing_left(output)


def test_a_few_kills(config, whole, tmp_path):
    run_and_kill(config, whole, tmp_path, kills=5, seed=0)


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_twenty_kills(config, whole, tmp_path, seed):
    run_and_kill(config, whole, tmp_path, kills=20, seed=seed)
