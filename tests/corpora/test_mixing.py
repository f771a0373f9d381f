"""Mixing: ratios at every point, what happens at a source's end, and repeated windows; all by counting."""

import collections
import hashlib

import numpy as np
import pytest

from jaxplain.corpora.hashing import split_of, text_hash
from jaxplain.corpora.windows import windows_of_split
from tests import tiny
from tests.corpora.makers import config, rows_of, source, windows


def texts(count, seed):
    return tiny.documents(count, seed=seed)


def assert_ratio(numbers, shares):
    """Every prefix has the shares to within the number of sources, which is far below sampling error."""
    total = sum(shares.values())
    for number, share in shares.items():
        found = np.cumsum([n == number for n in numbers])
        expected = share / total * np.arange(1, len(numbers) + 1)
        assert np.abs(found - expected).max() <= len(shares)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 8.0), (7.0, 3.0, 90.0)])
@pytest.mark.parametrize("kind", ["packed", "head"])
def test_ratios_hold_over_every_prefix(tokenizer, weights, kind):
    sources = [source(texts(150, i), f"s{i}", weight) for i, weight in enumerate(weights)]
    found = windows(sources, config(windows=kind), tokenizer)
    assert len(found) > 100
    assert_ratio([w.corpus for w in found], dict(enumerate(weights)))


def test_continue_reads_every_source_to_its_end_in_ratio(tokenizer):
    sizes, weights = (20, 60, 200), (2.0, 1.0, 1.0)
    sources = [source(texts(n, i), f"s{i}", w) for i, (n, w) in enumerate(zip(sizes, weights, strict=True))]
    mixed = windows_of_split(sources, config(windows="head", when_exhausted="continue"), "train", tokenizer)
    numbers = [w.corpus for w in rows_of(mixed)]
    assert collections.Counter(numbers) == dict(enumerate(sizes))
    ends = [len(numbers) - numbers[::-1].index(i) for i in range(3)]
    assert ends == sorted(ends)
    assert_ratio(numbers[: ends[0]], {0: 2.0, 1: 1.0, 2: 1.0})
    assert_ratio(numbers[ends[0] : ends[1]], {1: 1.0, 2: 1.0})
    assert set(numbers[ends[1] :]) == {2}
    assert mixed.exhausted == {0, 1, 2}


def test_stop_ends_with_the_first_source(tokenizer):
    sources = [source(texts(n, i), f"s{i}") for i, n in enumerate((20, 200))]
    mixed = windows_of_split(sources, config(windows="head"), "train", tokenizer)
    numbers = [w.corpus for w in rows_of(mixed)]
    assert collections.Counter(numbers) == {0: 20, 1: 20}
    assert mixed.exhausted == {0}


def test_continue_goes_on_without_a_source_that_has_nothing(tokenizer):
    sources = [source([None], "nothing"), source(texts(9, 1), "some")]
    going_on = config(windows="head", when_exhausted="continue")
    assert [w.corpus for w in windows(sources, going_on, tokenizer)] == [1] * 9
    assert windows(sources, config(windows="head"), tokenizer) == []


def test_deduplicate_drops_exact_repetitions_and_counts_them(tokenizer):
    once, other = texts(30, 0), texts(10, 1)
    sources = [source(once + once[:12] + other[:4], "a"), source(other, "b")]
    mixed = windows_of_split(
        sources,
        config(windows="head", when_exhausted="continue", deduplicate=True),
        "train",
        tokenizer,
    )
    found = list(rows_of(mixed))
    assert len(found) == 40
    assert len({w.tokens_T.tobytes() for w in found}) == 40
    assert mixed.repeated == 16
    everything = windows(sources, config(windows="head", when_exhausted="continue"), tokenizer)
    assert len(everything) == 56
    assert [len(list(rows_of(mixed))), mixed.repeated] == [40, 16], "the same once more"


def test_ratio_is_of_the_windows_that_are_left(tokenizer):
    """One source repeats everything three times, the other nothing."""
    repeating, fresh = texts(60, 0) * 3, texts(300, 1)
    sources = [source(repeating, "repeating"), source(fresh, "fresh")]
    numbers = [w.corpus for w in windows(sources, config(windows="head", deduplicate=True), tokenizer)]
    assert collections.Counter(numbers) == {0: 60, 1: 60}
    assert_ratio(numbers, {0: 1.0, 1: 1.0})


def test_windows_that_differ_in_padding_alone_are_not_the_same(tokenizer):
    found = windows(
        [source(["the cat", "the cat sees"])], config(windows="head", deduplicate=True), tokenizer
    )
    assert len(found) == 2


@pytest.mark.parametrize(
    "fields", [{}, {"deduplicate": True}, {"when_exhausted": "continue"}, {"max_sequences": 11}]
)
def test_state_resumes_across_an_end_and_repetitions(tokenizer, fields):
    short = texts(6, 0)
    sources = [source(short * 2, "a"), source(texts(40, 1), "b")]
    made = windows_of_split(sources, config(windows="head", **fields), "train", tokenizer)
    whole = [w.tokens_T.tolist() for w in rows_of(made)]
    made.size = 1
    for taken in (3, 10, len(whole) - 1, len(whole)):
        iterator = iter(made)
        for _ in range(taken):
            next(iterator)
        state = iterator.get_state()
        resumed = iter(made)
        resumed.set_state(state)
        assert [w.tokens_T.tolist() for w in rows_of(resumed)] == whole[taken:]


def test_a_repeated_document_lands_in_one_split_only(tokenizer):
    """Within a source, and in another source: the split is drawn by the hash of the text."""
    repeated = texts(40, 0)
    sources = [source(repeated * 3, "a"), source(repeated + texts(40, 1), "b")]
    splits = {"train": 0.4, "valid": 0.3, "test": 0.3}
    shared = config(windows="head", when_exhausted="continue", splits=splits)
    found = {split: windows(sources, shared, tokenizer, split) for split in splits}
    documents = {split: {w.document for w in found[split]} for split in splits}
    assert all(documents.values())
    assert sum(map(len, documents.values())) == len(set.union(*documents.values())) == 80
    seen = collections.Counter(w.document for split in splits for w in found[split])
    for text in repeated:
        assert seen[text_hash(text)] == 4
        assert text_hash(text) in documents[split_of(text_hash(text), splits)]


def test_an_old_config_still_gives_the_very_same_windows(tokenizer):
    """The digest was taken when there were packed windows alone, and no policy but to stop."""
    old = config(splits={"train": 0.6, "valid": 0.4}, stride=11, seed=5)
    sources = [source(texts(60, 0), "a", 0.3), source(texts(90, 1), "b", 0.7)]
    digest = hashlib.sha256()
    for w in windows(sources, old, tokenizer):
        digest.update(
            np.concatenate([w.tokens_T.astype(np.int64), [w.corpus, w.document, w.start, w.length]]).tobytes()
        )
    assert digest.hexdigest() == "524a78b418ec5b8444147b35caa1f0fbf7d0a59cdd96c5c56721aed0928fcd02"
