"""Several processes of one machine."""

import os
import signal
import time

import pytest

from tests.launch.conftest import LAUNCH

LOCAL = LAUNCH / "local.sh"


def test_processes_are_told_how_to_meet(cluster):
    ended = cluster.run(LOCAL, "3", "--config", "run.yaml", PORT="4242")
    assert ended.returncode == 0, ended.stderr
    meeting = ["--coordinator", "localhost:4242", "--processes", "3", "--process"]
    assert sorted(cluster.calls()) == [["--config", "run.yaml", *meeting, str(i)] for i in range(3)]


def test_gpus_are_shared_out(cluster):
    cluster.run(LOCAL, "2", GPUS_PER_PROCESS="2")
    gpus = {r["arguments"][-1]: r["environment"]["CUDA_VISIBLE_DEVICES"] for r in cluster.records()}
    assert gpus == {"0": "0,1", "1": "2,3"}


def test_a_process_that_fails_takes_the_others_with_it(cluster):
    started = time.monotonic()
    assert cluster.run(LOCAL, "3", STATUSES="slow 3 slow").returncode == 3
    assert time.monotonic() - started < 30


def test_a_preempted_process_leaves_the_others_time_to_save(cluster):
    started = time.monotonic()
    assert cluster.run(LOCAL, "2", STATUSES="75 short").returncode == 75
    assert time.monotonic() - started > 2


def test_a_signal_reaches_every_process(cluster):
    script = cluster.start(LOCAL, "2", STATUSES="slow slow")
    while len(cluster.records()) < 2:
        time.sleep(0.05)
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait(30) == 75


@pytest.mark.parametrize("count", ["", "0", "--config"])
def test_the_number_of_processes_comes_first(cluster, count):
    ended = cluster.run(LOCAL, count)
    assert ended.returncode == 2
    assert ended.stderr == f"error: the number of processes is '{count}'; give a positive number first.\n"
