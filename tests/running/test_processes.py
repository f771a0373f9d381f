"""Runs of several processes, which talk over gloo: the same store as of one process, and common ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxplain
from jaxplain.corpora.records import row_blocks
from jaxplain.errors import Stopped
from jaxplain.processes import first_works
from jaxplain.stopping import StopRequest
from tests import tiny
from tests.running import runs

LIMIT = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("processes"))


def start(config, output, *arguments, processes, devices, of_each=lambda _: (), folder_of=lambda _: None):
    """The processes of a run, of which each may get arguments and a working folder of its own."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def command(process):
        meet = ("--coordinator", f"127.0.0.1:{port}", "--processes", processes, "--process", process)
        given = ("--config", config, "--output", output, *arguments, *of_each(process))
        return list(map(str, [sys.executable, "-m", "jaxplain.extract", *meet, *given]))

    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [
        subprocess.Popen(
            command(process),
            cwd=folder_of(process),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]


def ended(started):
    """Statuses and what was written to standard output and error, of each process."""
    try:
        told = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    said = ([_own_words(text) for text in texts] for texts in zip(*told, strict=True))
    return [process.returncode for process in started], *said


def _own_words(text):
    """What jaxplain said, without the lines that jax's libraries log."""
    # Gloo's threads write into each other's lines, which leaves ends of lines.
    logged = re.compile(r"\[Gloo\]|[\d\s]*$|.*peer ranks|[IWE]\d{4} \d\d:|[IWE]\d{4} \d+")
    return "".join(line for line in text.splitlines(keepends=True) if not logged.match(line))


def assert_lost_others(text):
    """One sentence, beside what jax logs of it, which has several lines."""
    (said,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: the processes of the run lost each other (")


def finish(config, output, *arguments, **processes):
    statuses, out, err = ended(start(config, output, *arguments, **processes))
    assert statuses == [0] * len(statuses), err
    return out, err


def mesh(data, model):
    return "--run.mesh.data", data, "--run.mesh.model", model


@pytest.fixture(scope="module")
def references(config):
    """Folders of runs of one process, by mesh."""
    made = {}

    def reference(data, model):
        if (data, model) not in made:
            folder = config.parent / f"one-{data}-{model}"
            finish(config, folder, *mesh(data, model), processes=1, devices=data * model)
            made[data, model] = folder
        return made[data, model]

    return reference


@pytest.mark.parametrize(
    ("processes", "shape"), [(2, (4, 1)), (2, (2, 2)), (2, (1, 4)), (4, (4, 2))], ids=str
)
def test_several_processes_make_the_store_of_one(config, references, tmp_path, processes, shape):
    out, err = finish(config, tmp_path, *mesh(*shape), processes=processes, devices=2)
    assert "The store is" in out[0]
    assert out[1:] == [""] * (processes - 1)
    assert err == [""] * processes
    if shape[1] == 1:  # sums over axis model are taken in another order between processes than within one
        runs.assert_same_bits(tmp_path, references(*shape))
    runs.assert_nothing_left(tmp_path)
    other = jaxplain.open_store(references(1, 1))
    runs.assert_same_answer(jaxplain.open_store(tmp_path), other)


def test_processes_that_disagree_are_told_so(config, tmp_path):
    def of_each(process):
        return ("--exemplars.k", 5) if process else ()

    statuses, _, err = ended(start(config, tmp_path, processes=2, devices=2, of_each=of_each))
    assert statuses == [2, 2]
    assert err[0] == (
        "error: the processes of the run disagree: exemplars.k is 6 in process 0 and 5 in process 1; start "
        "all of them with the same command and versions.\n"
    )
    assert err[1] == ""


def test_an_error_of_all_is_said_once(config, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    blank = f"[{{dataset: json, data_files: {tmp_path / 'blank.jsonl'}}}]"
    arguments = ("--neurons.layers", "[7]")
    statuses, _, err = ended(start(config, tmp_path / "a", *arguments, processes=2, devices=2))
    assert statuses == [2, 2]
    assert err == ["error: neurons.layers names layer 7, but the subject's layers are 0 to 1.\n", ""]
    arguments = ("--corpus.sources", blank)
    statuses, _, err = ended(start(config, tmp_path / "b", *arguments, processes=2, devices=2))
    assert statuses == [2, 2]
    assert err[0].startswith("error: the corpus is empty")
    assert err[1] == ""


def test_an_error_of_one_ends_all(config, tmp_path):
    def of_each(process):
        return ("--output", tmp_path / "elsewhere") if process else ()

    statuses, _, err = ended(start(config, tmp_path / "run", processes=2, devices=2, of_each=of_each))
    assert statuses == [2, 2]
    assert err[0].startswith("error: process 1 of the run stopped with an error of its own")
    assert "elsewhere/exemplars.zarr is not seen by all processes of the run; name a folder" in err[1]


@pytest.fixture(scope="module")
def long_config(tmp_path_factory):
    """Two hundred steps or so for each split."""
    return runs.write_config(tmp_path_factory.mktemp("long"), documents=2500, sequences=1600)


def wait_for(condition, started):
    deadline = time.monotonic() + LIMIT
    while not condition():
        time.sleep(0.01)
        assert all(process.poll() is None for process in started), ended(started)
        assert time.monotonic() < deadline


def saved(output, split="train"):
    folder = output / "exemplars.zarr.checkpoints" / split
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_job_and_the_job_goes_on(long_config, tmp_path, victim):
    arguments = (*mesh(4, 1), "--run.checkpoint_steps", 20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = start(long_config, killed, *arguments, processes=2, devices=2)
    wait_for(lambda: saved(killed), started)
    started[victim].send_signal(signal.SIGKILL)
    statuses, _, err = ended(started)  # which waits for all of them
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] != 0
    if victim:  # with the first process dies what the others meet at, of which jax itself tells
        assert statuses[0] == 2
        assert_lost_others(err[0])
    else:
        assert err[1]
    _, err = finish(long_config, killed, *arguments, processes=2, devices=2)
    assert "train: going on from sequence " in err[0]
    finish(long_config, whole, *arguments, processes=1, devices=4)
    runs.assert_same_bits(killed, whole)


def test_a_signal_amid_a_collection_of_garbage_is_heard_after_it():
    """Python would print what is raised there, and go on."""

    class Garbage:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def work():
        with stop.at_once("stopped"):
            Garbage()
            time.sleep(10)

    with StopRequest() as stop:
        with pytest.raises(Stopped, match="stopped"):
            work()
        assert stop.requested


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=str)
def test_sigterm_to_any_process_saves_and_ends_all(long_config, tmp_path, told):
    arguments = (*mesh(4, 1), "--run.checkpoint_steps", 20)
    started = start(long_config, tmp_path, *arguments, processes=2, devices=2)
    wait_for(lambda: saved(tmp_path), started)
    for process in told:
        started[process].send_signal(signal.SIGTERM)
    statuses, _, err = ended(started)
    assert statuses == [75, 75], err
    assert err[0].startswith("stopped by SIGTERM: the same command goes on from sequence ")
    assert err[1] == ""
    # As one process, on another mesh, it goes on too.
    _, err = finish(long_config, tmp_path, processes=1, devices=2)
    row = int(err[0].split("going on from sequence ")[1].split(" of")[0].replace(",", ""))
    assert row > 0


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory):
    """Arguments for a corpus that takes a while to cut."""
    file = tiny.write_corpus(tmp_path_factory.mktemp("large") / "many.jsonl", 60_000)
    source = json.dumps([{"dataset": "json", "data_files": str(file)}])
    return "--corpus.sources", source, "--corpus.max_sequences", 0


def cutting(output):
    return (output / "exemplars.zarr.partial" / "train" / "sequences" / "zarr.json").exists


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_while_all_cut(config, large_corpus, tmp_path, told):
    started = start(config, tmp_path, *large_corpus, processes=2, devices=2)
    wait_for(cutting(tmp_path), started)
    started[told].send_signal(signal.SIGTERM)
    at = time.monotonic()
    statuses, _, err = ended(started)
    assert statuses == [75, 75], err
    assert time.monotonic() - at < 30
    assert err[0] == "stopped by SIGTERM: the same command cuts the sequences of train again.\n"
    assert err[1] == ""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_while_all_cut_ends_all(config, large_corpus, tmp_path, victim):
    started = start(config, tmp_path, *large_corpus, processes=2, devices=2)
    wait_for(cutting(tmp_path), started)
    started[victim].send_signal(signal.SIGKILL)
    at = time.monotonic()
    statuses, _, err = ended(started)
    assert time.monotonic() - at < 60
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] != 0
    if victim:
        assert_lost_others(err[0])


def workers_of(process):
    """The processes that tokenise for one of a run's."""
    found = []
    for child in Path(f"/proc/{process.pid}/task").glob("*/children"):
        pids = child.read_text().split()
        found += [int(p) for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc which processes there are")
def test_each_process_has_workers_and_the_death_of_one_ends_all(config, large_corpus, tmp_path):
    arguments = (*large_corpus, "--run.input_workers", 1)
    started = start(config, tmp_path, *arguments, processes=2, devices=2)
    wait_for(cutting(tmp_path), started)
    wait_for(lambda: all(workers_of(process) for process in started), started)
    os.kill(workers_of(started[1])[0], signal.SIGKILL)
    statuses, _, err = ended(started)
    assert statuses == [2, 2], err
    assert err[0].startswith("error: one of the processes that tokenise the corpus died")
    assert err[0].count("\n") == 1
    assert err[1] == ""


def test_an_error_that_nobody_expected_in_a_share_ends_its_process(monkeypatch):
    """All others learn of it by the end of this process."""
    seen = []

    def others(over):
        seen.append(over)
        raise OSError("a disk is gone")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr("jaxplain.processes.exchange", lambda values: np.zeros((2, 2), np.int32))
    with pytest.raises(OSError, match="a disk is gone"), StopRequest() as stop:
        first_works(pytest.fail, stop, "", others=others)
    assert seen[0].is_set()


REFUSES = (
    "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def test_a_bad_record_in_the_share_of_another_process_is_said_by_the_first(config, tmp_path):
    model = tmp_path / "model"
    tiny.write_model(model)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": REFUSES}))
    texts = tiny.documents(1000)
    bad = list(row_blocks(len(texts), seed=0))[1].rows[7]
    texts[bad] = "bad"
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"chat": [{"role": "user", "content": text}]}) + "\n" for text in texts)
    )
    source = json.dumps([{"dataset": "json", "data_files": str(chats), "chat_column": "chat"}])
    arguments = ("--subject.id", model, "--corpus.sources", source, "--corpus.max_sequences", 0)
    arguments += ("--corpus.splits", '{"train": 1.0}', "--exemplars.splits", "[train]")
    statuses, _, err = ended(start(config, tmp_path / "run", *arguments, processes=2, devices=2))
    assert statuses == [2, 2], err
    assert err[0].startswith(f"error: the subject's chat template refuses row {bad} of ")
    assert err[1] == ""


def test_processes_that_see_other_texts_are_told_so(config, tmp_path):
    for process in range(2):
        (folder := tmp_path / f"host-{process}").mkdir()
        tiny.write_corpus(folder / "docs.jsonl", 50, seed=process)
    source = json.dumps([{"dataset": "json", "data_files": "docs.jsonl"}])
    started = start(
        config.resolve(),
        tmp_path / "run",
        "--corpus.sources",
        source,
        processes=2,
        devices=2,
        folder_of=lambda process: tmp_path / f"host-{process}",
    )
    statuses, _, err = ended(started)
    assert statuses == [2, 2]
    assert err[0].startswith(
        "error: the processes of the run disagree: what corpus.sources[0] holds is [50, "
    )
    assert err[1] == ""
