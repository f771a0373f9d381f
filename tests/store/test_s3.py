"""Stores on S3, spoken to over the network: written, read, and cut off in the midst of writing."""

import pytest

import jaxplain
from jaxplain.errors import JaxplainError, Stopped
from tests.running import runs
from tests.store import s3_server

pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server():
    with s3_server.moto() as port, s3_server.Door(port) as door:
        yield door


@pytest.fixture
def s3(server, monkeypatch):
    server.writes_left = None
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jaxplain.store.files._RETRIES", 1)
    return server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("s3"))


@pytest.fixture(scope="module")
def local(config):
    return runs.run(config, config.parent / "local")


def test_a_store_on_s3_is_that_on_disk(config, s3, local):
    output = f"s3://{s3_server.BUCKET}/whole"
    store = runs.run(config, output)
    assert store.zarr_path == f"{output}/exemplars.zarr"
    runs.assert_same_answer(store, local)
    with pytest.raises(JaxplainError, match="exists already"):
        runs.run(config, output, "--exemplars.k", "2")
    runs.assert_same_answer(runs.run(config, output), local)


@pytest.mark.parametrize("writes", [5, 20, 60])
def test_a_write_that_fails_is_one_sentence_and_the_run_goes_on(config, s3, local, writes):
    output = f"s3://{s3_server.BUCKET}/broken-{writes}"
    s3.writes_left = writes
    with pytest.raises(JaxplainError, match=rf"{output}/exemplars\.zarr/ could not be written: ") as caught:
        runs.run(config, output)
    assert "\n" not in str(caught.value)
    s3.writes_left = None
    with pytest.raises(JaxplainError, match=r"is incomplete|there is no store"):
        jaxplain.open_store(output)
    runs.assert_same_answer(runs.run(config, output), local)


def test_checkpoints_of_a_run_to_s3(config, s3, local, tmp_path, monkeypatch, capsys):
    output, kept = f"s3://{s3_server.BUCKET}/kept", ("--run.checkpoint_folder", tmp_path)
    stopped = runs.interrupted(
        monkeypatch, config, output, *kept, steps=3, act=runs.terminate, raised=Stopped
    )
    assert "goes on from sequence 24 of train" in str(stopped)
    taken = runs.after_steps(monkeypatch, 0, runs.crash)
    runs.assert_same_answer(runs.run(config, output, *kept), local)
    assert len(taken) == 2 * runs.STEPS - 3


def test_without_a_folder_for_checkpoints_complete_splits_are_kept(config, s3, local, monkeypatch, capsys):
    output = f"s3://{s3_server.BUCKET}/none"
    stopped = runs.interrupted(
        monkeypatch, config, output, steps=runs.STEPS + 3, act=runs.terminate, raised=Stopped
    )
    assert "goes on from sequence 0 of valid" in str(stopped)
    assert "no checkpoints are saved, since run.checkpoint_folder names no folder" in capsys.readouterr().out
    taken = runs.after_steps(monkeypatch, 0, runs.crash)
    runs.assert_same_answer(runs.run(config, output), local)
    assert len(taken) == runs.STEPS
