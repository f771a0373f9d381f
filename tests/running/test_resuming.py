"""A run that is interrupted goes on where it was, and ends as if it had not been."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import jaxplain
from jaxplain.corpora.tokens import write_token_table
from jaxplain.errors import JaxplainError, Stopped
from jaxplain.store.writer import SplitWriter, StoreWriter
from tests import families
from tests.running import runs
from tests.running.runs import BATCH, STEPS, Crash, crash, interrupted, run, terminate

MESH = ("--run.mesh.data", 2, "--run.mesh.model", 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("resuming"))


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that was not interrupted, on MESH."""
    run(config, config.parent / "whole", *MESH)
    return config.parent / "whole"


def checkpoints(output, split="train"):
    folder = output / "exemplars.zarr.checkpoints" / split
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def damage(output, step, how):
    """Spoil the largest file of a checkpoint."""
    folder = output / "exemplars.zarr.checkpoints" / "train" / str(step) / "state"
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(how(bytearray(path.read_bytes())))


@pytest.mark.parametrize("steps", [1, 3, STEPS, STEPS + 2])
def test_sigterm_saves_and_the_same_command_goes_on(config, whole, tmp_path, monkeypatch, steps):
    stopped = interrupted(monkeypatch, config, tmp_path, *MESH, steps=steps, act=terminate, raised=Stopped)
    split, row = ("train", steps * BATCH) if steps < STEPS else ("valid", (steps - STEPS) * BATCH)
    if steps == STEPS:  # heard when the split is read to its end, and its layers are about to be written
        split, row = "train", 0
    assert str(stopped) == f"stopped by SIGTERM: the same command goes on from sequence {row} of {split}."
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert len(taken) == 2 * STEPS - (steps if steps != STEPS else 0)
    runs.assert_same_bits(tmp_path, whole)
    runs.assert_nothing_left(tmp_path)


def test_a_crash_costs_what_came_after_the_last_checkpoint(config, whole, tmp_path, monkeypatch, capsys):
    often = ("--run.checkpoint_steps", 2)
    interrupted(monkeypatch, config, tmp_path, *MESH, *often, steps=5, act=crash, raised=Crash)
    assert checkpoints(tmp_path) == [2 * BATCH, 4 * BATCH]
    with pytest.raises(JaxplainError, match="is incomplete"):
        jaxplain.open_store(tmp_path)
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert f"train: going on from sequence {4 * BATCH} of 45" in capsys.readouterr().err
    assert len(taken) == 2 * STEPS - 4
    runs.assert_same_bits(tmp_path, whole)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (4, 2)])
def test_it_may_go_on_on_another_mesh(config, whole, tmp_path, monkeypatch, mesh):
    interrupted(monkeypatch, config, tmp_path, *MESH, steps=3, act=terminate, raised=Stopped)
    taken = runs.after_steps(monkeypatch, 0, crash)
    store = run(config, tmp_path, "--run.mesh.data", mesh[0], "--run.mesh.model", mesh[1])
    assert len(taken) == 2 * STEPS - 3
    runs.assert_same_answer(store, jaxplain.open_store(whole))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A config with a mixture of experts whose first layer is plain."""
    model = families.QWEN2_MOE | {"mlp_only_layers": [0]}
    return runs.write_config(tmp_path_factory.mktemp("mixture"), model=model)


@pytest.mark.parametrize("chosen", [(), ("--neurons.experts", "[1, 4]", "--neurons.indices", "[3, 7, 12]")])
def test_a_mixture_of_experts_goes_on(mixture, tmp_path, monkeypatch, chosen):
    arguments = (*MESH, *chosen)
    reference = run(mixture, tmp_path / "whole", *arguments)
    for output, other in ((tmp_path / "same", MESH), (tmp_path / "other", ("--run.mesh.model", 2))):
        interrupted(monkeypatch, mixture, output, *arguments, steps=3, act=terminate, raised=Stopped)
        runs.assert_same_answer(run(mixture, output, *other, *chosen), reference)
    runs.assert_same_bits(tmp_path / "same", tmp_path / "whole")


def test_the_first_mesh_may_be_wider_in_either_way(config, whole, tmp_path, monkeypatch):
    for mesh in ((8, 1), (1, 8)):
        output = tmp_path / str(mesh[0])
        arguments = ("--run.mesh.data", mesh[0], "--run.mesh.model", mesh[1])
        interrupted(monkeypatch, config, output, *arguments, steps=4, act=terminate, raised=Stopped)
        runs.assert_same_answer(run(config, output, *MESH), jaxplain.open_store(whole))


@pytest.mark.parametrize("models", [(2, 4), (4, 1)])
def test_chosen_neurons_fill_another_mesh_up(config, tmp_path, monkeypatch, models):
    chosen = ("--neurons.indices", "[40, 3, 7]", "--neurons.layers", "[0, 1]")
    before, after = (("--run.mesh.model", model) for model in models)
    reference = run(config, tmp_path / "whole", *chosen)
    output = tmp_path / "run"
    interrupted(monkeypatch, config, output, *chosen, *before, steps=3, act=terminate, raised=Stopped)
    runs.assert_same_answer(run(config, output, *chosen, *after), reference)


def test_one_neuron_alone_may_change_the_mesh(config, tmp_path, monkeypatch):
    chosen = ("--neurons.indices", "[5]", "--neurons.layers", "[1]")
    reference = run(config, tmp_path / "whole", *chosen)
    output = tmp_path / "run"
    before, after = ("--run.mesh.model", 1), ("--run.mesh.model", 2)
    interrupted(monkeypatch, config, output, *chosen, *before, steps=3, act=terminate, raised=Stopped)
    runs.assert_same_answer(run(config, output, *chosen, *after), reference)


def test_no_tokens_drawn(config, tmp_path, monkeypatch):
    nothing = (*MESH, "--statistics.quantiles", "[]")
    run(config, tmp_path / "whole", *nothing)
    output = tmp_path / "run"
    interrupted(monkeypatch, config, output, *nothing, steps=3, act=terminate, raised=Stopped)
    run(config, output, *nothing)
    runs.assert_same_bits(output, tmp_path / "whole")


def flipped(data):
    data[len(data) // 2] ^= 1
    return data


# What Orbax leaves of a failed read is collected at any time.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "how", [lambda data: b"torn", lambda data: data[: len(data) // 2], flipped], ids=["torn", "cut", "bit"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(config, whole, tmp_path, monkeypatch, capsys, how):
    often = ("--run.checkpoint_steps", 2)
    interrupted(monkeypatch, config, tmp_path, *MESH, *often, steps=5, act=crash, raised=Crash)
    damage(tmp_path, 4 * BATCH, how)
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    said = capsys.readouterr().err
    assert f"checkpoint {4 * BATCH} in" in said
    assert "cannot be read (" in said
    assert f"going on from sequence {2 * BATCH} of 45" in said
    assert len(taken) == 2 * STEPS - 2
    runs.assert_same_bits(tmp_path, whole)


def test_where_no_checkpoint_can_be_read_nothing_starts_over(config, tmp_path, monkeypatch):
    often = ("--run.checkpoint_steps", 2)
    interrupted(monkeypatch, config, tmp_path, *MESH, *often, steps=5, act=crash, raised=Crash)
    for step in (2 * BATCH, 4 * BATCH):
        damage(tmp_path, step, flipped)
    with pytest.raises(JaxplainError, match="nor any before it; start anew with --overwrite") as caught:
        run(config, tmp_path, *MESH)
    assert "\n" not in str(caught.value)
    assert checkpoints(tmp_path) == [2 * BATCH, 4 * BATCH]


def test_bits_that_changed_are_found_by_their_sum(config, tmp_path, monkeypatch, capsys):
    """A file may be whole by every sum of its own, and yet hold something else."""
    often = ("--run.checkpoint_steps", 2)
    interrupted(monkeypatch, config, tmp_path, *MESH, *often, steps=5, act=crash, raised=Crash)
    beside = tmp_path / "exemplars.zarr.checkpoints" / "train" / str(4 * BATCH) / "about"
    (path,) = (p for p in beside.rglob("*") if p.is_file() and "bit_sums" in p.read_text())
    about = json.loads(path.read_text())
    name = next(name for name in about["bit_sums"] if "activation" in name)
    about["bit_sums"][name] += 1
    path.write_text(json.dumps(about))
    run(config, tmp_path, *MESH)
    said = capsys.readouterr().err
    assert f"(the bits of {name} are not those that were saved)" in said
    assert f"going on from sequence {2 * BATCH} of 45" in said


def test_another_config_is_refused_by_its_field(config, tmp_path, monkeypatch):
    interrupted(monkeypatch, config, tmp_path, steps=2, act=terminate, raised=Stopped)
    with pytest.raises(
        JaxplainError, match=r"holds a run with exemplars\.k 6, and it is 5 now; name another"
    ):
        run(config, tmp_path, "--exemplars.k", 5)
    with pytest.raises(JaxplainError, match=r"corpus\.seed 0, and it is 1 now"):
        run(config, tmp_path, "--corpus.seed", 1)
    assert checkpoints(tmp_path) == [2 * BATCH]
    taken = runs.after_steps(monkeypatch, 0, crash)
    store = run(config, tmp_path, "--exemplars.k", 5, "--overwrite")
    assert len(taken) == 2 * STEPS
    assert store.config["exemplars"]["k"] == 5
    runs.assert_nothing_left(tmp_path)


def test_how_it_runs_may_change(config, tmp_path, monkeypatch):
    interrupted(monkeypatch, config, tmp_path, steps=2, act=terminate, raised=Stopped)
    store = run(config, tmp_path, "--run.batch_size", 16, "--run.checkpoint_steps", 1)
    assert store.config["run"]["batch_size"] == 16


def test_overwrite_starts_anew_and_the_old_store_stays_meanwhile(config, whole, tmp_path, monkeypatch):
    run(config, tmp_path, *MESH, "--neurons.layers", "[0]")
    before = (tmp_path / "exemplars.zarr" / "zarr.json").read_bytes()
    for _ in range(2):
        interrupted(
            monkeypatch, config, tmp_path, *MESH, "--overwrite", steps=4, act=terminate, raised=Stopped
        )
        assert checkpoints(tmp_path) == [4 * BATCH]
        assert (tmp_path / "exemplars.zarr" / "zarr.json").read_bytes() == before
    # Without the flag it goes on, and replaces the old store in the end.
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert len(taken) == 2 * STEPS - 4
    runs.assert_same_bits(tmp_path, whole)


def test_a_split_is_cut_and_read_once(config, whole, tmp_path, monkeypatch):
    cut = []

    def counting(writer, sources, corpus, split, *arguments, **options):
        cut.append(split)
        return write_token_table(writer, sources, corpus, split, *arguments, **options)

    monkeypatch.setattr("jaxplain.extract.write_token_table", counting)
    interrupted(monkeypatch, config, tmp_path, *MESH, steps=STEPS + 1, act=crash, raised=Crash)
    assert cut == ["train", "valid"]
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert cut == ["train", "valid"]
    assert len(taken) == STEPS
    runs.assert_same_bits(tmp_path, whole)


def test_sigterm_while_a_corpus_is_cut(config, whole, tmp_path, monkeypatch):
    write = StoreWriter.write_sequences

    def stopping(writer, split, blocks, **options):
        def some():
            for block in blocks:
                yield block
                if split == "valid":
                    terminate()

        return write(writer, split, some(), **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_sequences", stopping)
        with pytest.raises(Stopped, match="the same command cuts the sequences of valid again"):
            run(config, tmp_path, *MESH)
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert len(taken) == STEPS
    runs.assert_same_bits(tmp_path, whole)


def test_what_fails_of_sigterm_before_it_is_heard_is_no_error(config, tmp_path, monkeypatch):
    """Processes that cut for this one are sent SIGTERM too, and may die of it first."""

    def failing(*_, **__):
        with contextlib.suppress(Stopped):
            terminate()
        raise JaxplainError("one of the processes died")

    monkeypatch.setattr("jaxplain.extract.write_token_table", failing)
    with pytest.raises(Stopped, match="cuts the sequences of train again"):
        run(config, tmp_path)


@pytest.mark.parametrize("act", [terminate, crash])
def test_an_end_while_layers_are_written(config, whole, tmp_path, monkeypatch, act):
    often = ("--run.checkpoint_steps", 2)
    write = SplitWriter.write_statistics
    calls = []

    def stopping(*arguments, **values):
        write(*arguments, **values)
        calls.append(1)
        if len(calls) == 1:
            act()

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "write_statistics", stopping)
        with pytest.raises((Stopped, Crash)):
            run(config, tmp_path, *MESH, *often)
    assert len(calls) == 1
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert len(taken) == 2 * STEPS - 4
    runs.assert_same_bits(tmp_path, whole)


def test_a_store_that_only_lacks_its_name_gets_it(config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jaxplain.store.files.Files.rename_to", lambda *_: crash())
        with pytest.raises(Crash):
            run(config, tmp_path, *MESH)
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, tmp_path, *MESH)
    assert taken == []
    runs.assert_same_bits(tmp_path, whole)
    runs.assert_nothing_left(tmp_path)


def test_a_run_that_found_nothing_yet_may_be_begun_anew(config, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    blank = f"[{{dataset: json, data_files: {tmp_path / 'blank.jsonl'}}}]"
    with pytest.raises(JaxplainError, match="corpus is empty"):
        run(config, tmp_path / "run", "--corpus.sources", blank)
    run(config, tmp_path / "run", "--neurons.layers", "[0]")


def test_stale_locks_of_killed_writers_are_removed(config, whole, tmp_path, monkeypatch):
    interrupted(monkeypatch, config, tmp_path, *MESH, steps=2, act=terminate, raised=Stopped)
    table = tmp_path / "exemplars.zarr.partial" / "train" / "sequences" / "token"
    (table / "zarr.json.__lock").write_bytes(b"")
    run(config, tmp_path, *MESH)
    runs.assert_same_bits(tmp_path, whole)
    runs.assert_nothing_left(tmp_path)


def test_the_newest_two_checkpoints_are_kept(config, tmp_path, monkeypatch):
    interrupted(monkeypatch, config, tmp_path, "--run.checkpoint_steps", 1, steps=5, act=crash, raised=Crash)
    assert checkpoints(tmp_path) == [3 * BATCH, 4 * BATCH]


@pytest.mark.parametrize(("minutes", "found"), [(1e-9, [BATCH, 2 * BATCH]), (1000, []), (0, [])])
def test_minutes_between_checkpoints(config, tmp_path, monkeypatch, minutes, found):
    arguments = ("--run.checkpoint_minutes", minutes)
    interrupted(monkeypatch, config, tmp_path, *arguments, steps=3, act=crash, raised=Crash)
    assert checkpoints(tmp_path) == found


def test_checkpoints_may_lie_elsewhere(config, whole, tmp_path, monkeypatch):
    elsewhere = ("--run.checkpoint_folder", tmp_path / "kept")
    output = tmp_path / "run"
    interrupted(monkeypatch, config, output, *MESH, *elsewhere, steps=3, act=terminate, raised=Stopped)
    kept = tmp_path / "kept" / "exemplars.zarr.checkpoints"
    assert (kept / "train" / str(3 * BATCH)).is_dir()
    assert [path.name for path in output.iterdir()] == ["exemplars.zarr.partial"]
    # A run does not start over because it is told to look elsewhere.
    other = tmp_path / "other"
    interrupted(monkeypatch, config, other, *MESH, steps=2, act=terminate, raised=Stopped)
    with pytest.raises(JaxplainError, match=r"checkpoints of the store in the making are in '.*other'"):
        run(config, other, *MESH, *elsewhere)
    # Those of another store are not taken for this one's.
    shutil.rmtree(other / "exemplars.zarr.checkpoints")
    with pytest.raises(JaxplainError, match="are of another store than the one in the making; name another"):
        run(config, other, *MESH, *elsewhere)
    # Nor are they removed for one that begins.
    with pytest.raises(JaxplainError, match=r"are of a store that is not at .*new/exemplars\.zarr; name"):
        run(config, tmp_path / "new", *MESH, *elsewhere)
    taken = runs.after_steps(monkeypatch, 0, crash)
    run(config, output, *MESH, *elsewhere)
    assert len(taken) == 2 * STEPS - 3
    runs.assert_same_bits(output, whole)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run.checkpoint_minutes", -1), r"run\.checkpoint_minutes is -1\.0; give 0 or more"),
        (("--run.checkpoint_steps", -1), r"run\.checkpoint_steps is -1; give 0 or more"),
        (("--run.checkpoint_folder", " "), r"run\.checkpoint_folder is ' '; name a folder"),
    ],
)
def test_bad_input(config, tmp_path, arguments, message):
    with pytest.raises(JaxplainError, match=message):
        run(config, tmp_path, *arguments)


def start(config, output, *arguments):
    """The command in a process of its own, on eight devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "jaxplain.extract", "--config", config, "--output", output, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_ends_with_a_sentence_and_a_status_of_its_own(config, whole, tmp_path):
    process = start(config, tmp_path, *MESH, "--run.checkpoint_steps", 1)
    while not checkpoints(tmp_path):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert said.startswith("stopped by SIGTERM: the same command goes on from sequence ")
    assert said.count("\n") == 1
    process = start(config, tmp_path, *MESH)
    _, said = process.communicate()
    assert process.returncode == 0, said
    runs.assert_same_bits(tmp_path, whole)


def test_more_tokens_than_can_be_counted_in_one_shard(config, tmp_path, monkeypatch):
    arguments = ("--run.mesh.data", 8)
    interrupted(monkeypatch, config, tmp_path, *arguments, steps=3, act=terminate, raised=Stopped)
    # The fullest of two shards has at most 228 tokens from before, and may get half of the 420 that are left.
    monkeypatch.setattr("jaxplain.exemplars.checkpointing._MOST_TOKENS", 400)
    with pytest.raises(JaxplainError, match=r"run\.mesh\.data is 2 and was 8 before.*go on with 8 or more"):
        run(config, tmp_path, *MESH)
    monkeypatch.setattr("jaxplain.exemplars.checkpointing._MOST_TOKENS", 439)
    run(config, tmp_path, *MESH)
