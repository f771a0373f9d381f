"""The scripts for Slurm, run by a stand-in that really runs their jobs."""

import json
import os
import signal
import time

import numpy as np
import pytest
import yaml

import jaxplain
from tests import tiny
from tests.launch.conftest import LAUNCH

SBATCH = LAUNCH / "slurm.sbatch"
SLICES = LAUNCH / "slurm_slices.py"


def overrides(cluster, **environment):
    return cluster.run("python", LAUNCH / "overrides.py", **environment)


def test_one_process_per_task_with_the_flags_given(cluster):
    ended = cluster.run(
        *("sbatch", "--nodes", "2", "--ntasks-per-node", "2", SBATCH, "--config", "run.yaml"),
        MODEL_ID="some model",
        LAYER_INDICES="0 3,5",
        OUTPUT_DIR="runs/it's here",
    )
    assert ended.returncode == 0, ended.stderr
    expected = ["--config", "run.yaml", "--subject.id", "some model", "--output", "runs/it's here"]
    expected += ["--neurons.layers", "[0, 3, 5]"]
    assert cluster.calls() == [expected] * 4
    ranks = [record["environment"]["SLURM_PROCID"] for record in cluster.records()]
    assert sorted(ranks) == ["0", "1", "2", "3"]


def test_no_overrides_add_no_flags(cluster):
    assert cluster.run("sbatch", SBATCH, "--config", "run.yaml").returncode == 0
    assert cluster.calls() == [["--config", "run.yaml"]]


CASES = {
    "all": ({"ALL_LAYERS": "1", "ALL_NEURONS": "true"}, "--neurons.layers all --neurons.indices all"),
    "none": ({"ALL_LAYERS": "0", "ALL_NEURONS": "false"}, ""),
    "range": ({"LAYER_INDICES": "0:30:3"}, "--neurons.layers 0:30:3"),
    "brackets": ({"LAYER_INDICES": "[1, 2]"}, "--neurons.layers '[1, 2]'"),
    "most": ({"MAX_SEQUENCES": "7"}, "--corpus.max_sequences 7"),
    "dataset": (
        {"DATASET_NAME": "org/name", "DATASET_CONFIG": "en", "DATASET_SPLIT": "train[:5%]"},
        """--corpus.sources '[{"dataset": "org/name", "config": "en", "split": "train[:5%]"}]' """
        "--corpus.valueeval_dir null",
    ),
    "preset": (
        {"DATASET_NAME": "fineweb", "DATASET_SPLIT": "train[:9]"},
        """--corpus.sources '[{"preset": "fineweb", "split": "train[:9]"}]' --corpus.valueeval_dir null""",
    ),
    "valueeval": (
        {"VALUEEVAL_DIR": "/v"},
        """--corpus.sources '[{"preset": "valueeval"}]' --corpus.valueeval_dir /v""",
    ),
    "valueeval by name": (
        {"VALUEEVAL_DIR": "/v", "DATASET_NAME": "valueeval", "DATASET_SPLIT": "train[:9]"},
        """--corpus.sources '[{"preset": "valueeval", "split": "train[:9]"}]' --corpus.valueeval_dir /v""",
    ),
    "valueeval splits": (
        {"VALUEEVAL_DIR": "/v", "VALUEEVAL_SPLITS": "training, test", "DATASET_NAME": "d"},
        """--corpus.sources '[{"dataset": "d"}, {"dataset": "csv", "data_files": """
        """["/v/arguments-training.tsv", "/v/arguments-test.tsv"], "delimiter": "\\t", """
        """"text_column": "Premise"}]' --corpus.valueeval_dir null""",
    ),
    "valueeval by name alone": (
        {"DATASET_NAME": "valueeval"},
        """--corpus.sources '[{"preset": "valueeval"}]'""",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_overrides(cluster, case):
    environment, expected = CASES[case]
    assert overrides(cluster, **environment).stdout.strip() == expected


BAD = {
    "layers": ({"LAYER_INDICES": "0,x"}, "LAYER_INDICES is '0,x'; give numbers"),
    "both": ({"LAYER_INDICES": "0", "ALL_LAYERS": "1"}, "LAYER_INDICES is '0'; ALL_LAYERS is set too"),
    "neither": ({"ALL_NEURONS": "maybe"}, "ALL_NEURONS is 'maybe'; give 1 or 0"),
    "split of nothing": ({"DATASET_SPLIT": "train"}, "DATASET_SPLIT is 'train'; set DATASET_NAME"),
    "valueeval of nowhere": ({"VALUEEVAL_SPLITS": "test"}, "VALUEEVAL_SPLITS is 'test'; set VALUEEVAL_DIR"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_overrides_end_the_job_before_it_starts(cluster, case):
    environment, sentence = BAD[case]
    cluster.run("sbatch", SBATCH, "--config", "run.yaml", **environment)
    assert cluster.calls() == []
    log = (cluster.folder / "slurm/log-100").read_text()
    assert log.startswith(f"error: {sentence}")
    assert log.count("\n") == 1
    assert (cluster.folder / "slurm/job-100/status").read_text() == "2"


@pytest.mark.parametrize(("statuses", "calls", "end"), [("75 75 0", 3, "0"), ("75 1", 2, "1"), ("2", 1, "2")])
def test_preempted_jobs_are_requeued_and_failed_ones_are_not(cluster, statuses, calls, end):
    cluster.run("sbatch", SBATCH, "--config", "run.yaml", STATUSES=statuses)
    assert cluster.calls() == [["--config", "run.yaml"]] * calls
    restarts = [int(record["environment"]["SLURM_RESTART_COUNT"]) for record in cluster.records()]
    assert restarts == list(range(calls))
    assert (cluster.folder / "slurm/job-100/status").read_text() == end


def test_requeues_end(cluster):
    cluster.run("sbatch", SBATCH, "--config", "run.yaml", STATUSES="75 75 75 0", MAX_REQUEUES="2")
    assert len(cluster.calls()) == 3
    log = (cluster.folder / "slurm/log-100").read_text()
    assert "error: the run was requeued 2 times and is not done" in log
    assert (cluster.folder / "slurm/job-100/status").read_text() == "75"


def test_an_array_without_slices_is_refused(cluster):
    cluster.run("sbatch", "--array=0-1", SBATCH, "--config", "run.yaml")
    assert cluster.calls() == []
    assert "JAXPLAIN_SLICES is ''" in (cluster.folder / "slurm/log-100").read_text()
    assert (cluster.folder / "slurm/job-100/status").read_text() == "2"


def test_cores_of_a_task_reach_srun(cluster):
    cluster.run("sbatch", SBATCH, "--config", "run.yaml", SLURM_CPUS_PER_TASK="8")
    assert [record["environment"].get("SRUN_CPUS_PER_TASK") for record in cluster.records()] == ["8"]


def test_a_signal_lets_the_run_save_and_requeues_it(cluster):
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(cluster.folder), "SLURM_NTASKS": "2"}
    (cluster.folder / "slurm").mkdir()
    script = cluster.start("bash", SBATCH, "--config", "run.yaml", STATUSES="slow slow", **job)
    while len(cluster.records()) < 2:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGTERM)
    assert script.wait(30) == 75
    assert (cluster.folder / "slurm/requeued-7").exists()


def slices(cluster, *arguments, **environment):
    ended = cluster.run("python", SLICES, *arguments, "--config", "run.yaml", **environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def read(arguments):
    """What the last of several configs says."""
    files = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--config"]
    with open(files[-1]) as file:
        return yaml.safe_load(file)


def test_slices_cover_the_corpus_and_are_merged(cluster):
    out = slices(cluster, "3", "--sbatch", "--gpus-per-node 8 --ntasks-per-node 2", MODEL_ID="m")
    assert out == "slices are job 100, and job 101 merges them\n"
    calls = cluster.calls()
    assert len(calls) == 6
    assert all(call[1].endswith("/run.yaml") and call[-2:] == ["--subject.id", "m"] for call in calls)
    found = [read(call) for call in calls[::2]]
    assert [slice_["corpus"]["sources"] for slice_ in found] == [
        [{"dataset": "d", "config": "c", "split": f"train[{part}]"}]
        for part in ("0%:33%", "33%:67%", "67%:100%")
    ]
    assert [slice_["corpus"]["max_sequences"] for slice_ in found] == [4, 4, 4]
    stores = [f"runs/whole/slices/{i}" for i in range(3)]
    assert [slice_["output"] for slice_ in found] == stores
    assert cluster.calls("jaxplain.merge") == [["runs/whole", *stores]]


def test_slices_take_their_sources_from_the_environment(cluster):
    given = {"DATASET_NAME": "ultrachat", "MAX_SEQUENCES": "7", "OUTPUT_DIR": "elsewhere"}
    slices(cluster, "2", VALUEEVAL_DIR="/v", **given)
    calls = cluster.calls()
    assert not any(word.startswith("--corpus") or word == "--output" for call in calls for word in call)
    for call, part in zip(calls, ("0%:50%", "50%:100%"), strict=True):
        corpus = read(call)["corpus"]
        assert corpus["sources"] == [
            {"preset": "ultrachat", "split": f"train_sft[{part}]"},
            {"preset": "valueeval", "split": f"train[{part}]"},
        ]
        assert (corpus["max_sequences"], corpus["valueeval_dir"]) == (4, "/v")
    assert cluster.calls("jaxplain.merge") == [["elsewhere", "elsewhere/slices/0", "elsewhere/slices/1"]]


def test_joined_splits_are_each_sliced(cluster):
    slices(cluster, "2", DATASET_NAME="d", DATASET_SPLIT="train+test")
    assert read(cluster.calls()[1])["corpus"]["sources"][0]["split"] == "train[50%:100%]+test[50%:100%]"


def test_without_one_slice_nothing_is_merged(cluster):
    assert slices(cluster, "3", STATUSES="0 1 0") == "slices are job 100, and job 101 merges them\n"
    assert len(cluster.calls()) == 3
    assert cluster.calls("jaxplain.merge") == []


def test_a_preempted_slice_goes_on_before_the_merge(cluster):
    slices(cluster, "2", STATUSES="75 0 0")
    tasks = [r["environment"].get("SLURM_ARRAY_TASK_ID") for r in cluster.records()]
    assert tasks == ["0", "0", "1", None]


def test_a_dry_run_prints_a_script_that_does_the_same(cluster):
    given = {"OUTPUT_DIR": "runs/it's here", "DATASET_NAME": "d", "MODEL_ID": "m"}
    script = slices(cluster, "2", "--dry-run", **given)
    assert cluster.records() == []
    assert not (cluster.folder / "runs").exists()
    assert cluster.run("bash", "-c", script, **given).returncode == 0
    printed, configs = cluster.records(), [read(call) for call in cluster.calls()]
    (cluster.folder / "calls").unlink()
    slices(cluster, "2", **given)
    assert [r["arguments"] for r in cluster.records()] == [r["arguments"] for r in printed]
    assert [read(call) for call in cluster.calls()] == configs


REFUSED = {
    "count": (["1"], {}, "slices is 1; give 2 to 100"),
    "sliced": (["2"], {"DATASET_NAME": "d", "DATASET_SPLIT": "train[:5%]"}, "corpus.sources.split is"),
    "max": (["2"], {"MAX_SEQUENCES": "many"}, "corpus.max_sequences is 'many'; give the number"),
    "remote": (["2"], {"OUTPUT_DIR": "gs://b/o"}, "output is 'gs://b/o'; it is no local folder"),
    "config": (["2", "--config", "no.yaml"], {}, "--config is 'no.yaml'; there is no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_slices_are_refused(cluster, case):
    arguments, environment, sentence = REFUSED[case]
    config = [] if "--config" in arguments else ["--config", "run.yaml"]
    ended = cluster.run("python", SLICES, *arguments, *config, **environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {sentence}")
    assert ended.stderr.count("\n") == 1
    assert not (cluster.folder / "slurm").exists()


def test_what_a_config_lacks_is_refused(cluster):
    config = json.loads((cluster.folder / "run.yaml").read_text())
    for block, field, named in (
        ("corpus", "max_sequences", None),
        ("corpus", "sources", None),
        (None, "output", None),
    ):
        lacking = json.loads(json.dumps(config))
        (lacking[block] if block else lacking).pop(field)
        (cluster.folder / "lacking.yaml").write_text(json.dumps(lacking))
        ended = cluster.run("python", SLICES, "2", "--config", "lacking.yaml")
        assert ended.stderr.startswith(f"error: {block + '.' if block else ''}{field} is {named}; ")


@pytest.mark.parametrize(
    ("block", "value", "sentence"),
    [
        ("exemplars", {"kinds": ["max", "quantile"]}, "exemplars.kinds is ['max', 'quantile']; stores with"),
        (
            "statistics",
            {"tokens": {"neurons": 3}},
            "statistics.tokens.neurons is 3; stores with token tables",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_before_it_is_extracted(cluster, block, value, sentence):
    config = json.loads((cluster.folder / "run.yaml").read_text())
    (cluster.folder / "run.yaml").write_text(json.dumps(config | {block: value}))
    ended = cluster.run("python", SLICES, "2", "--config", "run.yaml")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {sentence}")
    assert not (cluster.folder / "slurm").exists()


def test_a_remote_output_has_its_configs_in_a_folder(cluster):
    slices(cluster, "2", "--folder", "parts", OUTPUT_DIR="gs://b/o/")
    assert read(cluster.calls()[0])["output"] == "gs://b/o/slices/0"
    assert (cluster.folder / "parts/1.yaml").exists()


def test_slices_of_a_real_corpus_are_extracted(cluster):
    """Between them the slices read every document once."""
    tiny.write_model(cluster.folder / "model")
    tiny.write_corpus(cluster.folder / "docs.jsonl", 40)
    config = {
        "subject": {"id": "model"},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": "docs.jsonl"}],
            "sequence_length": 16,
            "windows": "head",
            "max_sequences": 100,
            "splits": {"train": 1.0},
        },
        "neurons": {"layers": [0], "indices": [1, 2]},
        "exemplars": {"k": 3, "splits": ["train"]},
        "run": {"batch_size": 8, "progress": False},
        "output": "run",
    }
    (cluster.folder / "run.yaml").write_text(yaml.safe_dump(config))
    real = "jaxplain.extract jaxplain.merge"
    slices(cluster, "2", REAL=real, PYTHONPATH=str(LAUNCH.parent), XLA_FLAGS="")
    logs = "".join(log.read_text() for log in (cluster.folder / "slurm").glob("log-*"))
    documents = []
    for number in range(2):
        store = cluster.folder / f"run/slices/{number}"
        assert store.exists(), logs
        split = jaxplain.open_store(store)["train"]
        documents.append(set(split.sequences(np.arange(split.sequence_count))["document"].tolist()))
    assert [len(found) for found in documents] == [20, 20]
    assert not documents[0] & documents[1]
    merged = cluster.folder / "run/exemplars.zarr"
    assert merged.exists(), logs
    assert jaxplain.open_store(merged)["train"].sequence_count == split.sequence_count * 2
