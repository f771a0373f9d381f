"""Blocks dealt out over processes, of which threads stand in for all here: the same results, in order."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest

from jaxplain.corpora.records import BLOCK
from jaxplain.corpora.shares import help_first, shared_out
from jaxplain.corpora.windows import reading, windows_of_split
from jaxplain.corpora.workers import AHEAD, in_this_process, open_workers
from jaxplain.errors import JaxplainError
from tests import tiny
from tests.corpora.makers import config, source


class Mailbox:
    """Messages within this process."""

    def __init__(self):
        self.waiting = {}
        self.names = []
        self._changed = threading.Condition()

    def send(self, name, contents):
        with self._changed:
            assert name not in self.names
            self.names.append(name)
            self.waiting[name] = contents
            self._changed.notify_all()

    def receive(self, name):
        with self._changed:
            self._changed.wait_for(lambda: name in self.waiting, timeout=0.05)
            return self.waiting.pop(name, None)


@contextlib.contextmanager
def run_of(shared, processes, *, workers=0, opened=None):
    """Work by a run of so many processes; `shared` names what each of them works with."""
    mailbox, over = Mailbox(), threading.Event()
    failures = []

    def help_it(process):
        try:
            work = opened or in_this_process(shared(process))
            help_first(work, mailbox, process=process, workers=workers, over=over)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=help_it, args=[process]) for process in range(1, processes)]
    for thread in threads:
        thread.start()
    try:
        work = opened or in_this_process(shared(0))
        yield shared_out(work, mailbox, processes=processes, workers=workers), mailbox, failures, threads
    finally:
        over.set()
        for thread in threads:
            thread.join()


def who_and(shared, item):
    return shared, item


def itself(process):
    return process


def fails_at(shared, item):
    if item == shared:
        raise JaxplainError(f"item {item} is wrong.")
    return item


def breaks_at(shared, item):
    if item == shared:
        raise OSError(f"item {item} is on a disk that is gone.")
    return item


def test_each_process_does_its_share():
    with run_of(itself, 3) as (work, *_):
        # Several sources are read in turns.
        one, other = work(who_and, range(20)), work(who_and, range(100, 107))
        found = list(itertools.zip_longest(one, other))
    assert [each for each, _ in found] == [(item % 3, item) for item in range(20)]
    assert [each for _, each in found if each] == [(item % 3, 100 + item) for item in range(7)]


def test_shares_are_done_by_workers():
    with open_workers(1, "shared") as opened, run_of(itself, 3, workers=1, opened=opened) as (work, *_):
        assert list(work(who_and, range(50))) == [("shared", item) for item in range(50)]


@pytest.mark.parametrize(
    "fields",
    [
        {"stride": 5},
        {"windows": "head", "sequence_length": 40, "deduplicate": True, "when_exhausted": "continue"},
        {"windows": "random", "seed": 7, "splits": {"rest": 0.4, "train": 0.6}},
        {"max_sequences": 300},
    ],
    ids=str,
)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_sequences_are_those_of_one_process(tokenizer, fields, processes, monkeypatch):
    monkeypatch.setattr("jaxplain.corpora.records.BLOCK", 16)
    texts = [*tiny.documents(150), None, "", *tiny.documents(40)]
    sources = [source(texts), source(tiny.documents(100, seed=4), weight=2.0)]

    def windows(work):
        mixed = windows_of_split(sources, config(**fields), "train", tokenizer, work)
        blocks = list(mixed)
        return blocks, mixed.exhausted, mixed.repeated

    expected, *ends = windows(None)
    with run_of(lambda _: reading(sources, tokenizer), processes) as (work, mailbox, *_):
        found, *found_ends = windows(work)
    assert (len(mailbox.names) > 10) == (processes > 1)
    assert found_ends == ends
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for field in dataclasses.fields(theirs):
            values = getattr(theirs, field.name)
            assert getattr(ours, field.name).dtype == values.dtype
            np.testing.assert_array_equal(getattr(ours, field.name), values)


@pytest.mark.parametrize("wrong", [3, 4])
def test_what_is_wrong_is_said_when_its_turn_comes(wrong, monkeypatch):
    monkeypatch.setattr("jaxplain.corpora.shares._SECONDS_FOR_A_STOP", 0)

    def broken():
        yield from range(wrong)
        raise JaxplainError("the rest cannot be read.")

    with run_of(lambda _: wrong, 2) as (work, *_):
        for found, message in (
            (work(fails_at, range(20)), rf"^item {wrong} is wrong\.$"),
            (work(fails_at, broken()), r"^the rest cannot be read\.$"),
        ):
            assert [next(found) for _ in range(wrong)] == list(range(wrong))
            with pytest.raises(JaxplainError, match=message):
                next(found)


def test_what_is_wrong_is_kept_where_the_run_is_stopped(monkeypatch):
    """Of SIGTERM to all processes of a host workers may die before it is known why."""
    over, mailbox = threading.Event(), Mailbox()
    begun = threading.Event()

    def dies(function, items):
        begun.set()
        raise JaxplainError("a worker died.")

    monkeypatch.setattr("jaxplain.corpora.shares._SECONDS_FOR_A_STOP", 60)
    thread = threading.Thread(
        target=help_first, args=[dies, mailbox], kwargs={"process": 1, "workers": 0, "over": over}
    )
    thread.start()
    work = shared_out(in_this_process(None), mailbox, processes=2, workers=0)
    assert next(work(who_and, range(2))) == (None, 0)
    assert begun.wait(60)
    over.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not any("done" in name for name in mailbox.names)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_nobody_expected_ends_its_process(workers):
    with run_of(lambda _: 1, 2, workers=workers) as (work, _, failures, threads):
        assert next(work(breaks_at, range(2))) == 0
        threads[0].join(30)
        assert not threads[0].is_alive()
        (failure,) = failures
    assert isinstance(failure, OSError)


def test_no_process_runs_far_ahead():
    taken = []

    def items():
        for item in range(5000):
            taken.append(item)
            yield item

    with run_of(itself, 3) as (work, mailbox, *_):
        results = work(who_and, items())
        assert next(results) == (0, 0)
        assert len(taken) == 3 * AHEAD
        assert next(results) == (1, 1)
        assert len(taken) == 3 * AHEAD + 1
    assert sum("asked" in name for name in mailbox.names) == 2 * AHEAD


def test_a_sample_tells_corpora_apart():
    texts = tiny.documents(2 * BLOCK)
    sample = source(texts).sample()
    assert source(list(texts)).sample() == sample
    assert sample[0] == 2 * BLOCK
    assert source(texts[::-1]).sample() != sample
    assert source(texts[1:]).sample() != sample
    assert source([]).sample() == []
    assert len(source(["one"]).sample()) == 2
