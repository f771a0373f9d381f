"""Worker processes: the same results in the same order, and an end of them all however the work ends."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxplain.configs.extraction import RunConfig, SourceConfig
from jaxplain.corpora.sources import open_source
from jaxplain.corpora.windows import reading, sequences_to_cut, windows_of_split
from jaxplain.corpora.workers import in_this_process, open_workers, worker_count
from jaxplain.errors import JaxplainError
from tests import tiny
from tests.corpora.makers import config, source

ROOT = Path(__file__).parents[2]


def pid_and(shared, item):
    """Later items are done sooner."""
    time.sleep(0.02 * (9 - item))
    return os.getpid(), shared, item


def fails_at(shared, item):
    if item == shared:
        raise JaxplainError(f"item {item} is wrong.")
    return item


def dies(shared, item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def threads_of_tokenizers(shared, item):
    return os.environ.get("TOKENIZERS_PARALLELISM")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer):
    """Texts with nulls and empty ones among them; chats; a stream of a file."""
    folder = tmp_path_factory.mktemp("sources")
    texts = [*tiny.documents(60), None, "", *tiny.documents(20), None]
    chats = [{"text": [{"role": "user", "content": t}]} for t in tiny.documents(40, seed=5)]
    chat = dataclasses.replace(source([], weight=2.0), records=chats, layout="chat", name="chat")
    file = str(tiny.write_corpus(folder / "docs.jsonl", 50, seed=3))
    stream = SourceConfig(dataset="json", data_files=file, streaming=True, shuffle_buffer=9)
    return [source(texts), chat, open_source(stream, tokenizer)]


@pytest.fixture(scope="module")
def two(sources, tokenizer):
    with open_workers(2, reading(sources, tokenizer)) as work:
        yield work


def blocks_of(sources, config, tokenizer, work):
    mixed = windows_of_split(sources, config, "train", tokenizer, work)
    blocks = list(mixed)
    joined = {
        field.name: np.concatenate([getattr(block, field.name) for block in blocks])
        for field in dataclasses.fields(blocks[0])
    }
    return joined, mixed.exhausted, mixed.repeated


VARIANTS = [
    {},
    {"stride": 5, "separator": False},
    {"windows": "head", "sequence_length": 40},
    {"windows": "random", "seed": 7},
    {"windows": "head", "when_exhausted": "continue", "deduplicate": True},
    {"splits": {"rest": 0.4, "train": 0.6}, "chat_prefix": True},
    {"max_sequences": 50},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_the_sequences_are_the_same_for_any_number_of_workers(sources, tokenizer, two, fields):
    expected, *ends = blocks_of(sources, config(**fields), tokenizer, None)
    found, *found_ends = blocks_of(sources, config(**fields), tokenizer, two)
    assert len(expected["corpus_N"]) >= 50
    assert set(expected["corpus_N"]) == {0, 1, 2}
    assert found_ends == ends
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_the_sequences_do_not_depend_on_the_size_of_blocks(sources, tokenizer, monkeypatch, block):
    for fields in VARIANTS[:4]:
        expected, *_ = blocks_of(sources, config(**fields), tokenizer, None)
        with monkeypatch.context() as patched:
            patched.setattr("jaxplain.corpora.records.BLOCK", block)
            patched.setattr("jaxplain.corpora.windows._CHARACTERS", block)
            found, *_ = blocks_of(sources, config(**fields), tokenizer, None)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_results_come_in_order_from_other_processes():
    before = multiprocessing.active_children()
    with open_workers(3, "shared") as work:
        found = list(work(pid_and, range(10)))
        assert set(work(threads_of_tokenizers, range(3))) == {"false"}, "a worker is one core's"
    assert [item for _, _, item in found] == list(range(10))
    assert {shared for _, shared, _ in found} == {"shared"}
    pids = {pid for pid, _, _ in found}
    assert os.getpid() not in pids
    assert len(pids) == 3
    assert set(multiprocessing.active_children()) <= set(before)
    assert list(in_this_process("here")(pid_and, [8])) == [(os.getpid(), "here", 8)]
    with open_workers(0, "here") as work:
        assert list(work(pid_and, [8])) == [(os.getpid(), "here", 8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_is_said_when_its_turn_comes(workers):
    def broken():
        yield from [0, 1, 2]
        raise JaxplainError("the fourth cannot be read.")

    with open_workers(workers, 3) as work:
        failing, unreadable = work(fails_at, range(10)), work(fails_at, broken())
        for found, message in (
            (failing, r"^item 3 is wrong\.$"),
            (unreadable, r"^the fourth cannot be read\.$"),
        ):
            assert [next(found) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(JaxplainError, match=message):
                next(found)


def test_a_worker_that_dies_ends_in_one_sentence():
    before = multiprocessing.active_children()
    with (
        pytest.raises(
            JaxplainError, match=r"processes .* died, .*; lower run.input_workers, or set"
        ) as caught,
        open_workers(2, None) as work,
    ):
        list(work(dies, range(50)))
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= set(before)


def test_no_worker_is_left_where_not_all_is_asked_for(sources, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = multiprocessing.active_children()
    with open_workers(2, reading(sources, tokenizer)) as work:
        mixed = iter(windows_of_split(sources, config(), "train", tokenizer, work))
        next(mixed)
        assert len(set(multiprocessing.active_children()) - set(before)) == 2
        assert len(list(tmp_path.iterdir())) == 1
    assert set(multiprocessing.active_children()) <= set(before)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import multiprocessing, os, time
from jaxplain.commands import run
from jaxplain.corpora.workers import open_workers
from tests.corpora.test_workers import waits

def main(arguments):
    with open_workers(2, None) as work:
        children = multiprocessing.active_children()
        print(*(child.pid for child in children), flush=True)
        for pid in work(waits, range(10**6)):
            print("ready", flush=True)

if __name__ == "__main__":
    run(main)
"""


def waits(shared, item):
    time.sleep(0.05)
    return os.getpid()


@pytest.fixture
def script(tmp_path):
    """A run with workers, in a process group of its own, as a terminal starts it."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def soon(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
@pytest.mark.parametrize("when", ["starting", "working"])
def test_ctrl_c_ends_run_and_workers_without_a_traceback(script, when):
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2
    if when == "working":
        assert script.stdout.readline() == "ready\n"
    os.killpg(script.pid, signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 130
    assert errors == "interrupted\n"
    assert all(map(has_ended, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
def test_workers_do_not_outlive_a_run_that_is_killed(script):
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert script.stdout.readline() == "ready\n"
    assert not any(map(has_ended, pids))
    script.kill()
    script.wait()
    assert soon(lambda: all(map(has_ended, pids)))


def test_how_many_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert worker_count(None, sequences=19_999) == 0
    assert worker_count(None, sequences=20_000) == worker_count(None, sequences=None) == 4
    assert [worker_count(chosen, sequences=10) for chosen in (0, 3)] == [0, 3]
    assert [worker_count(None, sequences=None, sharers=n) for n in (2, 3, 5)] == [2, 0, 0]
    assert worker_count(3, sequences=None, sharers=5) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert worker_count(None, sequences=None) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert worker_count(None, sequences=None) == 0
    with pytest.raises(JaxplainError, match=r"run.input_workers is -1; give 0 for none"):
        RunConfig(input_workers=-1)


def test_how_many_sequences_there_will_be(sources):
    some = sources[:2]
    assert sequences_to_cut(some, config(max_sequences=50), splits=3) == 150
    assert sequences_to_cut(some, config(expected_sequences=70), splits=2) == 140
    assert sequences_to_cut(some, config(), splits=2) == 83 + 40
    assert sequences_to_cut(sources, config(), splits=2) is None
    assert sequences_to_cut(sources, config(max_sequences=50), splits=1) == 50


def test_a_stream_is_not_given_to_workers(sources, tokenizer):
    given = reading(sources, tokenizer)
    assert list(given.sources[2].records) == []
    assert [len(each.records) for each in given.sources[:2]] == [83, 40]
