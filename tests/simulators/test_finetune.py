"""The command: what it leaves, how it goes on after a kill, and every bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoTokenizer

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.finetune import main
from jaxplain.simulators.records import Metrics, read_metrics
from jaxplain.subjects.subject import open_subject
from tests import tiny, workspace


@pytest.fixture
def finetune(explained, tmp_path):
    def run(*arguments, **training):
        config = workspace.finetuning(explained, tmp_path / "sim", **training)
        (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config))
        main(["--config", str(tmp_path / "finetune.yaml"), *map(str, arguments)])
        return tmp_path / "sim"

    return run


def losses(folder):
    return {line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line}


def held_out(folder):
    return {line["step"]: line["held_out/loss"] for line in read_metrics(folder) if "held_out/loss" in line}


def test_a_run_leaves_a_simulator_and_its_records(finetune, explained, capsys):
    output = finetune()
    assert list(losses(output)) == list(range(1, 13))
    assert list(held_out(output)) == [0, 4, 8, 12]
    assert held_out(output)[12] < held_out(output)[0]
    best = min(held_out(output), key=lambda step: held_out(output)[step])
    about = json.loads((output / "model" / "simulator.json").read_text())
    assert about["step"] == best
    assert about["held_out"]["loss"] == pytest.approx(held_out(output)[best], rel=1e-5)
    assert about["pairs"]["held_out_neurons"] == 0.3
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events*"))
    card = (output / "model" / "README.md").read_text()
    assert f"{about['held_out']['loss']:.4f}" in card
    said = capsys.readouterr().out
    assert f"step {best}: cross-entropy {about['held_out']['loss']:.4f}" in said
    subject = open_subject(SubjectConfig(id=str(output / "model")))
    assert (
        subject.tokenizer_hash() == open_subject(SubjectConfig(id=str(explained / "model"))).tokenizer_hash()
    )


def test_a_shallow_simulator_has_that_many_layers(finetune):
    output = finetune("--depth", 1, steps=1)
    assert json.loads((output / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    assert open_subject(SubjectConfig(id=str(output / "model"))).arch.layers == 1


def test_a_simulator_goes_on_from_what_it_has_learnt(finetune, tmp_path):
    first = finetune()
    finetune("--model.id", first / "model", "--output", tmp_path / "second", steps=1)
    assert held_out(tmp_path / "second")[0] == pytest.approx(min(held_out(first).values()), rel=1e-4)
    finetune(
        *("--model.id", first / "model", "--output", tmp_path / "third"),
        *("--training.reset_readout", "true"),
        steps=1,
    )
    assert held_out(tmp_path / "third")[0] == pytest.approx(np.log(11), rel=1e-4)


def test_tensorboard_has_what_metrics_has(finetune):
    output = finetune(steps=4)
    found = {}
    for path in (output / "tensorboard").glob("events*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
            data = data[16 + size :]
    assert found["train/loss"] == pytest.approx(list(losses(output).values()))
    assert found["held_out/loss"] == pytest.approx(list(held_out(output).values()))


def command(config):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxplain.finetune", "--config", str(config)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(explained, tmp_path):
    folders = []
    for name in ("whole", "killed"):
        config = workspace.finetuning(explained, tmp_path / name, steps=30, checkpoint_every=3, warmup=4)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        folders.append(tmp_path / name)
    whole, killed = folders
    process = command(tmp_path / "killed.yaml")
    for least in (5, 14):
        while max(losses(killed), default=0) < least:
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = command(tmp_path / "killed.yaml")
    undisturbed = command(tmp_path / "whole.yaml")
    for running in (process, undisturbed):
        _, errors = running.communicate()
        assert running.returncode == 0, errors
    assert losses(killed) == losses(whole)
    assert held_out(killed) == held_out(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_it_may_go_on_on_another_mesh(finetune):
    output = finetune(steps=8)
    longer = losses(output)
    (output / "metrics.jsonl").unlink()
    for step in (output / "checkpoints" / "newest").glob("8"):
        for path in sorted(step.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        step.rmdir()
    finetune("--mesh.model", 4, steps=8)
    again = losses(output)
    assert list(again) == [5, 6, 7, 8]
    for step, loss in again.items():
        assert loss == pytest.approx(longer[step], rel=1e-4)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finetune, capsys):
    output = finetune(steps=8)
    whole = losses(output)
    newest = output / "checkpoints" / "newest" / "8" / "state"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(b"torn")
    finetune(steps=8)
    assert losses(output) == whole
    said = capsys.readouterr().err
    assert "checkpoint 8 in" in said
    assert "going on from step 4" in said
    for path in (output / "checkpoints" / "newest").rglob("state/**/*"):
        if path.is_file():
            path.write_bytes(b"torn")
    with pytest.raises(JaxplainError, match="nor any before it; start anew with --overwrite"):
        finetune(steps=8)


def test_training_stops_when_the_held_out_loss_no_longer_falls(finetune):
    output = finetune(steps=400, learning_rate=0.05, evaluate_every=1, patience=3)
    curve = held_out(output)
    best = min(curve, key=lambda step: curve[step])
    assert max(curve) == best + 3 < 400
    assert json.loads((output / "model" / "simulator.json").read_text())["step"] == best


@pytest.mark.parametrize("package", ["matplotlib", "tensorboardX"])
def test_missing_packages_are_named_before_any_work(finetune, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JaxplainError, match=rf"needs the package {package}; .* 'jaxplain\[plots\]'"):
        finetune()
    assert not (tmp_path / "sim").exists()


def test_added_tokens_that_stand_for_nothing_get_rows_too(finetune):
    names = [f"<|new {number}|>" for number in range(20)]  # more than the model has rows to spare
    output = finetune("--readout.added_tokens", json.dumps(names), steps=1)
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    rows = json.loads((output / "model" / "config.json").read_text())["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(names[-1]) == len(tokenizer) - 1 == rows - 1
    assert rows > workspace.MODEL["vocab_size"]


def test_special_tokens_may_be_remapped(finetune, explained):
    output = finetune("--readout.special_tokens", "remap", parts="last_layers", last_layers=1)
    about = json.loads((output / "model" / "simulator.json").read_text())
    before = AutoTokenizer.from_pretrained(explained / "model")
    after = AutoTokenizer.from_pretrained(output / "model")
    remapped = about["readout"]["remapped"]
    assert set(remapped) == {"<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"}
    assert after.convert_tokens_to_ids(list(remapped.values())) == list(range(len(before), len(before) + 4))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "nowhere"], "the store has no split 'nowhere'"),
        (["--pairs.providers", "['gemini']"], "there are no explanations of these"),
        (["--training.parts", "lora", "--training.lora.rank", 0], "training.lora.rank is 0"),
        (["--training.parts", "last_layers", "--training.last_layers", 4], "the model has 3 layers"),
        (["--pairs.held_out_neurons", 0.0001], "no pair of explanation and sequence is held out"),
        (["--model.dtype", "bfloat16"], "weights are trained in float32"),
        (["--depth", 4], "depth is 4, but the model has 3 layers"),
        (["--depth", 0], "depth is 0; give 1 or more"),
        (["--training.accumulate", 3], "choose a divisor of training.batch_size 16"),
        (["--explanations", "/nowhere"], "there are no explanations at /nowhere"),
        (["--training.steps", 0], "training.steps is 0; give 1 or more"),
        (["--store", "/nowhere"], "there is no store at /nowhere"),
        (["--model.id", "/nowhere"], "model.id is '/nowhere', but there is no such folder"),
    ],
)
def test_bad_input_is_one_sentence(finetune, arguments, said):
    with pytest.raises(JaxplainError, match=said) as raised:
        finetune(*arguments)
    assert "\n" not in str(raised.value)


def test_another_tokenizer_is_refused_with_the_first_difference(finetune, tmp_path):
    folder = tiny.write_model(tmp_path / "other")
    settings = json.loads((folder / "tokenizer.json").read_text())
    merges = settings["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(JaxplainError, match=r"model\.id needs the subject's own tokenizer, but merge 3 is"):
        finetune("--model.id", folder)


def test_a_folder_with_another_run_is_refused(finetune, tmp_path):
    output = finetune(steps=1)
    with pytest.raises(JaxplainError, match=r"training\.learning_rate 0\.003, and it is 0\.001 now"):
        finetune("--training.learning_rate", 0.001, steps=1)
    before = (output / "model" / "model.safetensors").read_bytes()
    finetune("--training.learning_rate", 0.001, "--overwrite", steps=1)
    assert (output / "model" / "model.safetensors").read_bytes() != before
    (tmp_path / "sim2").mkdir()
    (tmp_path / "sim2" / "thesis.txt").write_text("mine")
    with pytest.raises(JaxplainError, match="holds something else"):
        finetune("--output", tmp_path / "sim2")
    assert (tmp_path / "sim2" / "thesis.txt").read_text() == "mine"


def test_metrics_drop_what_a_later_step_left(tmp_path):
    with Metrics(tmp_path, start=0) as metrics:
        for step in (1, 2, 3):
            metrics.add(step, {"train/loss": float(step)})
        metrics.add(4, {"train/loss": np.nan})
    assert read_metrics(tmp_path)[-1] == {"step": 4, "train/loss": None}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')
    with Metrics(tmp_path, start=2) as metrics:
        metrics.add(3, {"train/loss": 30.0})
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
