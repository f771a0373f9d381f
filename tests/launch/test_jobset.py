"""The manifest for GKE against the fields of JobSet, Job and Pod that it may have, and against itself."""

import copy
import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.conftest import LAUNCH

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_schema_itself_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_manifest_is_valid():
    jsonschema.validate(JOBSET, SCHEMA)


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "maxRestart"), 2),
        ((*JOB, "parallelism"), "4"),
        ((*POD, "restartPolicy"), "OnFailure"),
        ((*POD, "nodeSelector", "count"), 4),
        ((*POD, "containers", 0, "args"), "--config"),
    ],
)
def test_mistakes_are_found(path, value):
    wrong = copy.deepcopy(JOBSET)
    part = wrong
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_hosts_hold_the_topology():
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_a_preempted_pod_restarts_the_run_and_others_fail_it():
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_exit_code = job["podFailurePolicy"]["rules"][0]
    assert by_exit_code["action"] == "FailJob"
    assert by_exit_code["onExitCodes"]["values"] == [75]
    assert by_exit_code["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["backoffLimit"] == 0
    rule = JOBSET["spec"]["failurePolicy"]["rules"][0]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_checkpoints_lie_beside_the_output():
    pod = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert flags["--run.checkpoint_folder"] == flags["--output"] == "gs://BUCKET/RUN"


def test_volumes_are_those_that_are_mounted():
    pod = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
