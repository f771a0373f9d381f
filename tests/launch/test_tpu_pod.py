"""The script for Cloud TPUs, with a slice of two workers that are folders."""

import pytest

from tests.launch.conftest import LAUNCH

SCRIPT = LAUNCH / "tpu_pod.sh"
SLICE = {"ZONE": "z", "ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME": "r", "WAIT": "0"}
RUN = ["--config", "run.yaml", "--output", "gs://b/o", "--run.checkpoint_folder", "gs://b/o"]


def pod(cluster, *arguments, preemptions=0, **environment):
    folder = cluster.folder / "slice"
    folder.mkdir(exist_ok=True)
    (folder / "preemptions").write_text(str(preemptions))
    # The script is run from a checkout, which it sends to the workers.
    for command in ("init -q", "add run.yaml", "-c user.name=a -c user.email=a@b commit -qm run"):
        assert cluster.run("git", *command.split()).returncode == 0
    words = arguments or ("tpu", "run.yaml", "gs://b/o", "--exemplars.k", "5 6")
    return cluster.run(SCRIPT, *words, GCLOUD_STUB=str(folder), **SLICE | environment)


def verbs(cluster):
    return [verb for verb in (cluster.folder / "slice/calls").read_text().split() if verb != "describe"]


def test_a_slice_is_made_and_all_workers_run(cluster):
    ended = pod(cluster)
    assert ended.returncode == 0, ended.stderr
    assert cluster.calls() == [[*RUN, "--exemplars.k", "5 6"]] * 2
    assert verbs(cluster) == ["create", "scp", "ssh", "ssh"]
    for worker in ("worker-0", "worker-1"):
        sent = (cluster.folder / "slice" / worker / "run.yaml").read_text()
        assert sent == (cluster.folder / "run.yaml").read_text()


def test_a_lost_slice_is_made_again_and_the_run_goes_on(cluster):
    ended = pod(cluster, preemptions=2)
    assert ended.returncode == 0, ended.stderr
    assert len(cluster.calls()) == 2
    once = ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert verbs(cluster) == [*once, *once, "create", "scp", "ssh", "ssh"]


def test_a_preempted_run_goes_on_where_it_is(cluster):
    assert pod(cluster, STATUSES="75 75 0 0").returncode == 0
    assert len(cluster.calls()) == 4
    assert "delete" not in verbs(cluster)


def test_a_failed_run_is_not_repeated(cluster):
    ended = pod(cluster, STATUSES="2 2")
    assert ended.returncode == 2
    assert "error: the extraction ended with status 2" in ended.stderr
    assert len(cluster.calls()) == 2


def test_what_cannot_be_installed_is_not_tried_for_ever(cluster):
    ended = pod(cluster, NO_PYTHON="1")
    assert ended.returncode == 2
    assert "error: jaxplain could not be installed on tpu" in ended.stderr
    assert verbs(cluster) == ["create", "scp", "ssh", "scp", "ssh"]


def test_attempts_end(cluster):
    ended = pod(cluster, preemptions=9, ATTEMPTS="2")
    assert ended.returncode == 75
    assert "not done after 2 attempts" in ended.stderr
    assert verbs(cluster).count("create") == 2


def test_a_slice_that_is_not_granted_is_asked_for_again(cluster):
    assert pod(cluster, ATTEMPTS="3", FULL="2").returncode == 0
    assert verbs(cluster)[:3] == ["create"] * 3


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (("tpu", "run.yaml"), {}, "there are 2 arguments; give"),
        (("tpu", "no.yaml", "gs://b/o"), {}, "the config is 'no.yaml'; there is no such file"),
        (("tpu", "run.yaml", "runs/o"), {}, "the output is 'runs/o'; give gs://BUCKET/FOLDER"),
        (("tpu", "run.yaml", "gs://b/o"), {"ZONE": ""}, "ZONE is ''; set it"),
    ],
)
def test_bad_arguments_are_refused(cluster, arguments, environment, sentence):
    ended = pod(cluster, *arguments, **environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {sentence}")
    assert not (cluster.folder / "slice/calls").exists()
