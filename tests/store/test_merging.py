"""Merged stores against a run over all windows at once, for slices that overlap and repeat themselves too."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.store import merging, repeats, schema
from jaxplain.store.files import Files
from jaxplain.store.merging import MergedSplit, merge_stores
from jaxplain.store.writer import SplitWriter
from tests.store import slices
from tests.store.slices import LAYERS, NEURONS, TOKENS, K

EXACT = (
    *(f"sequences/{name}" for name in ("token", "document", "start", "length")),
    *(f"{kind}/{name}" for kind in slices.KINDS for name in ("score", "sequence", "activation")),
    *(f"sample/{name}" for name in ("lottery", "sequence", "activation")),
    "stats/count",
    "stats/quantile",
)
ROUNDED = tuple(f"stats/{name}" for name in schema.STATISTICS if name != "count")

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A file system in memory, where hundreds of small files take no time."""

NEURONS_PER_BLOCK = 2
BLOCK_BYTES = NEURONS_PER_BLOCK * K * TOKENS * 2

WINDOW = st.tuples(st.integers(1, 4), st.sampled_from([0, 3]), st.integers(0, 1))
SLICE = st.lists(WINDOW, min_size=1, max_size=9)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Files, reads and passes so small that a made-up store takes several of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "_SHARD_BYTES", BLOCK_BYTES)
        patch.setattr(merging, "_TOKEN_BYTES_PER_READ", 2 * 4 * TOKENS)
        patch.setattr(repeats, "ROWS_PER_PASS", 5)
        patch.setattr(repeats, "_ROWS_PER_READ", 3)
        patch.setattr(repeats, "_TOKEN_BYTES_PER_READ", 2 * 4 * TOKENS)
        yield


def merge(out, *paths, **options):
    return merge_stores(str(out), paths, progress_bars(enabled=False), **options)


def store(folder, name, windows, **options):
    return slices.write(folder / name, slices.run(windows), **options)


def equal(found, expected):
    for name in EXACT:
        np.testing.assert_array_equal(found[name], expected[name], name)
    for name in ROUNDED:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(SLICE, min_size=1, max_size=4))
@example(parts=[[(1, 0, 0), (1, 0, 0), (2, 0, 0)], [(1, 0, 0), (1, 0, 0), (1, 0, 0)], [(1, 0, 1), (1, 0, 0)]])
@example(parts=[[(1, 0, 0), (2, 3, 0), (3, 0, 1)]] * 2)
@example(parts=[[(1, 0, 0)]] * 2)
def test_a_merged_store_is_that_of_a_run_over_all(parts):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        folder = Path(folder)
        paths = [store(folder, f"{number}.zarr", windows) for number, windows in enumerate(parts)]
        [merged] = merge(folder / "out", *paths)
        windows = slices.of_all(*parts)
        read = sum(map(len, parts))
        assert merged == MergedSplit(name="train", sequences=len(windows), repeated=read - len(windows))
        repeated = list(
            (sum(map(slices.Counter, parts), slices.Counter()) - slices.Counter(windows)).elements()
        )
        equal(
            slices.read(folder / "out" / "exemplars.zarr", EXACT + ROUNDED),
            slices.run(windows, repeated=repeated),
        )


@settings(max_examples=8, deadline=None)
@given(parts=st.lists(SLICE, min_size=3, max_size=3))
def test_merging_is_associative(parts):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        folder = Path(folder)
        a, b, c = (store(folder, f"{n}.zarr", windows, corpora=(str(n),)) for n, windows in enumerate(parts))
        merge(folder / "ab", a, b)
        merge(folder / "bc", b, c)
        merge(folder / "ab_c", folder / "ab", c)
        merge(folder / "a_bc", a, folder / "bc")
        left, right = (
            slices.read(folder / name / "exemplars.zarr", (*EXACT, *ROUNDED, "sequences/corpus"))
            for name in ("ab_c", "a_bc")
        )
        equal(left, right)
        np.testing.assert_array_equal(left["sequences/corpus"], right["sequences/corpus"])
        left, right = (jaxplain.open_store(folder / name).attributes for name in ("ab_c", "a_bc"))
        for attributes in (left, right):
            attributes["config"].pop("output")
        assert left == right
        assert [part["sequences"]["train"] for part in left["merged"]] == [len(part) for part in parts]


def kept(path, kind):
    """The scores of a kind, and which windows stand above each neuron's last rank."""
    found = slices.read(path, (f"{kind}/score", f"{kind}/sequence", *EXACT[:3]))
    score, sequence = found[f"{kind}/score"], found[f"{kind}/sequence"]
    origin = [
        (tokens.tobytes(), document, start)
        for tokens, document, start in zip(*(found[name] for name in EXACT[:3]), strict=True)
    ]
    above = score != score[..., -1:]
    return score, {
        (layer, neuron): sorted(origin[n] for n in sequence[layer, neuron][above[layer, neuron]] if n >= 0)
        for layer in range(len(LAYERS))
        for neuron in range(len(NEURONS))
    }


@settings(max_examples=8, deadline=None)
@given(first=SLICE, second=SLICE)
def test_the_order_of_stores_only_renumbers_and_settles_ties(first, second):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        folder = Path(folder)
        a, b = store(folder, "a.zarr", first), store(folder, "b.zarr", second)
        merge(folder / "ab", a, b)
        merge(folder / "ba", b, a)
        one, other = (folder / name / "exemplars.zarr" for name in ("ab", "ba"))
        for kind in slices.KINDS:
            (our_score, ours), (their_score, theirs) = kept(one, kind), kept(other, kind)
            np.testing.assert_array_equal(our_score, their_score)
            assert ours == theirs
        for name in ("stats/count", "sample/lottery"):
            np.testing.assert_array_equal(*(slices.read(path, [name])[name] for path in (one, other)))


def test_provenance_is_kept_and_corpora_are_numbered_anew(tmp_path):
    first, second = [(1, 0, 0), (2, 0, 0)], [(3, 0, 0), (4, 0, 0), (5, 0, 0), (2, 0, 0)]
    a = store(tmp_path, "a.zarr", first, corpora=("x", "y"), corpus_N=np.array([1, 0], np.int32))
    corpora = ("z", "y", "y")
    b = store(tmp_path, "b.zarr", second, corpora=corpora, corpus_N=np.array([0, 1, 2, 0], np.int32))
    merge(tmp_path / "out", a, b)
    merged = jaxplain.open_store(tmp_path / "out")
    assert merged.corpora == ("x", "y", "z", "y"), "the first y of both is one corpus"
    rows = merged["train"].sequences(np.arange(5))
    assert [merged.corpora[number] for number in rows["corpus"]] == ["y", "x", "z", "y", "y"]
    assert rows["corpus"].tolist() == [1, 0, 2, 1, 3]
    assert (rows["document"] - 2**62).tolist() == [1, 2, 3, 4, 5]


def test_neurons_that_were_not_asked_for_stay_empty(tmp_path):
    asked = [[0, 2, 4], [1]]
    a = store(tmp_path, "a.zarr", [(1, 0, 0), (2, 0, 0)], asked=asked)
    b = store(tmp_path, "b.zarr", [(3, 0, 0), (4, 0, 0)], asked=asked)
    merge(tmp_path / "out", a, b)
    split = jaxplain.open_store(tmp_path / "out")["train"]
    found = slices.read(tmp_path / "out" / "exemplars.zarr", EXACT + ROUNDED)
    expected = slices.run([(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)])
    for layer, columns in enumerate(asked):
        others = np.setdiff1d(np.arange(len(NEURONS)), columns)
        assert (found["stats/count"][layer, others] == -1).all()
        assert (found["max/sequence"][layer, others] == -1).all()
        for name in ("max/activation", "stats/mean", "stats/quantile", "sample/activation"):
            assert np.isnan(found[name][layer, others]).all()
            np.testing.assert_allclose(found[name][layer, columns], expected[name][layer, columns], rtol=1e-6)
    with pytest.raises(JaxplainError, match="neuron 2 of layer 1 was not among those extracted"):
        split.neuron(1, 2)


def test_without_quantiles_no_sample_is_needed(tmp_path):
    plain = slices.config(statistics={"quantiles": []})
    paths = [
        store(tmp_path, f"{n}.zarr", windows, changes=plain)
        for n, windows in enumerate([[(1, 0, 0)], [(2, 0, 0)]])
    ]
    merge(tmp_path / "out", *paths)
    assert not (tmp_path / "out" / "exemplars.zarr" / "train" / "sample").exists()
    merged = jaxplain.open_store(tmp_path / "out")
    assert merged["train"].neuron(1, 2).quantiles == {}
    assert merged.vocabulary.tokens() == slices.WORDS


def test_quantiles_without_their_sample_are_refused(tmp_path):
    import shutil

    a, b = (store(tmp_path, name, [(1, 0, 0)]) for name in ("a.zarr", "b.zarr"))
    shutil.rmtree(b / "train" / "sample")
    with pytest.raises(JaxplainError, match=r"b\.zarr has quantiles, but not the sampled tokens"):
        merge(tmp_path / "out", a, b)


def test_no_read_is_larger_than_a_block(tmp_path, monkeypatch):
    """Of what grows with the store: the ranks, activations and sample of neurons, and rows of the table."""
    rng = np.random.default_rng(0)
    windows = [(int(document), 0, 0) for document in rng.permutation(60)]
    paths = [store(tmp_path, "a.zarr", windows[:40]), store(tmp_path, "b.zarr", windows[30:])]
    shapes = []
    read = Files.read

    def recorded(self, *parts):
        values = read(self, *parts)
        shapes.extend(array.shape for array in values)
        return values

    monkeypatch.setattr(Files, "read", recorded)
    merge(tmp_path / "out", *paths)
    assert max(shape[0] for shape in shapes if len(shape) == 3) == NEURONS_PER_BLOCK
    assert max(shape[0] for shape in shapes if len(shape) == 2) == NEURONS_PER_BLOCK
    assert max(shape[0] for shape in shapes if len(shape) == 1) <= 10


def test_a_killed_merge_leaves_a_store_that_is_refused(tmp_path):
    paths = [store(tmp_path, f"{n}.zarr", [(n, 0, 0)]) for n in (1, 2)]
    code = (
        "import os, signal, sys\n"
        "from jaxplain.merge import main\n"
        "from jaxplain.store.writer import SplitWriter\n"
        "write = SplitWriter.write_statistics\n"
        "def deadly(self, layer, *others, **values):\n"
        "    if layer == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, layer, *others, **values)\n"
        "SplitWriter.write_statistics = deadly\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), *map(str, paths)]
    result = subprocess.run(arguments, check=False, capture_output=True, env=os.environ)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(JaxplainError, match="is incomplete"):
        jaxplain.open_store(tmp_path / "out")
    merge(tmp_path / "out", *paths)
    assert jaxplain.open_store(tmp_path / "out")["train"].sequence_count == 2


def test_a_merge_that_fails_stops_at_once_and_keeps_the_old_store(tmp_path, monkeypatch):
    paths = [store(tmp_path, f"{n}.zarr", [(n, 0, 0)]) for n in (1, 2)]
    merge(tmp_path / "out", *paths)

    def documents():
        rows = jaxplain.open_store(tmp_path / "out")["train"].sequences(np.arange(2))
        return (rows["document"] - 2**62).tolist()

    assert documents() == [1, 2]
    with pytest.raises(JaxplainError, match=r"exists already; .* --overwrite"):
        merge(tmp_path / "out", *paths)
    written = set()
    write = SplitWriter.write_exemplars

    def slow(self, kind, layer, columns, **values):
        written.add((layer, columns[0]))
        time.sleep(0.05)
        write(self, kind, layer, columns, **values)

    def full(self, layer, columns, **values):
        raise JaxplainError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "BLOCKS_AT_ONCE", 1)
        patch.setattr(SplitWriter, "write_exemplars", slow)
        patch.setattr(SplitWriter, "write_statistics", full)
        with pytest.raises(JaxplainError, match="no space left"):
            merge(tmp_path / "out", *paths, overwrite=True)
    assert {(0, 0), (0, 2), (0, 4)} <= written, "the first layer was done"
    assert (1, 4) not in written, "what was not begun never is"
    assert documents() == [1, 2]
    merge(tmp_path / "out", *reversed(paths), overwrite=True)
    assert documents() == [2, 1]


def test_more_sequences_than_a_store_can_number(tmp_path, monkeypatch):
    paths = [store(tmp_path, f"{n}.zarr", [(n, 0, 0), (n, 3, 0)]) for n in (1, 2)]
    monkeypatch.setattr(merging, "_MOST_SEQUENCES", 3)
    with pytest.raises(
        JaxplainError, match=r"split 'train' of all stores has 4\.0e\+00 sequences, more than"
    ):
        merge(tmp_path / "out", *paths)


def test_a_store_is_named_once_and_never_merged_into_itself(tmp_path):
    a = store(tmp_path, "a.zarr", [(1, 0, 0)])
    (tmp_path / "run").mkdir()
    b = store(tmp_path / "run", "exemplars.zarr", [(2, 0, 0)])
    with pytest.raises(JaxplainError, match="run is named twice"):
        merge(tmp_path / "out", b, a, tmp_path / "run")
    with pytest.raises(JaxplainError, match="run would be merged into itself"):
        merge(tmp_path / "run", a, tmp_path / "run", overwrite=True)
    with pytest.raises(JaxplainError, match="OUT is ''"):
        merge("", a)
    with pytest.raises(JaxplainError, match="there is no store at"):
        merge(tmp_path / "out", a, tmp_path / "nothing")
