"""The command: stores of real runs over parts of a corpus, merged, against one run over all of it."""

import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.corpora.hashing import token_lottery
from jaxplain.exemplars.extraction import counted_tokens
from jaxplain.extract import main as extract
from jaxplain.merge import main
from jaxplain.progress import ByteBar, progress_bars
from jaxplain.store import schema
from jaxplain.store.schema import STATISTICS
from tests import families, tiny
from tests.subjects.test_decoder import make_mesh, sown_activations

KINDS = ("max", "min", "random")
SAMPLED = 64
PARTS = {"all": "train", "first": "train[:50%]", "middle": "train[50%:70%]", "last": "train[70%:]"}
SPLITS = ("train", "valid")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run over a whole corpus, and runs over three slices of it."""
    return run_over_parts(tmp_path_factory.mktemp("runs"), tiny.LLAMA, {"layers": [0, 2]})


@pytest.fixture(scope="module")
def runs_of_experts(tmp_path_factory):
    """The same of a mixture of experts with a plain layer, of which not all neurons are asked for."""
    model = families.QWEN2_MOE | {"mlp_only_layers": [1]}
    chosen = {"layers": [1, 2], "experts": "all", "indices": "0:30:3"}
    return run_over_parts(tmp_path_factory.mktemp("experts"), model, chosen)


def run_over_parts(folder, model, chosen):
    tiny.write_model(folder / "model", model)
    tiny.write_corpus(folder / "docs.jsonl", 150)
    for name, part in PARTS.items():
        source = {"dataset": "json", "data_files": str(folder / "docs.jsonl"), "split": part}
        config = {
            "subject": {"id": str(folder / "model")},
            "corpus": {
                "sources": [source],
                "sequence_length": 20,
                "windows": "head",
                "max_sequences": 0,
                "splits": {"train": 0.5, "valid": 0.5},
                "exclude": {"special": True, "first": 1},
            },
            "neurons": chosen,
            "exemplars": {"k": 6},
            "statistics": {"sampled_tokens": SAMPLED},
            "run": {"batch_size": 16, "progress": False},
            "output": str(folder / name),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        extract(["--config", str(folder / f"{name}.yaml")])
    return folder


def origins(split, sequence):
    """Where sequences come from: documents and starts, in one array."""
    rows = split.sequences(np.arange(split.sequence_count))
    origin_S2 = np.stack([rows["document"], rows["start"]], axis=-1)[sequence]
    return np.where(sequence[..., None] >= 0, origin_S2, -1)


def layer(split, place, *names):
    return dict(zip(names, split.layer_arrays(place, *names), strict=True))


def assert_same_store(found, expected):
    for name in SPLITS:
        ours, theirs = found[name], expected[name]
        assert ours.sequence_count == theirs.sequence_count
        for place in range(2):
            for kind in KINDS:
                names = [f"{kind}/{array}" for array in ("score", "sequence", "activation")]
                our, their = (layer(split, place, *names) for split in (ours, theirs))
                np.testing.assert_allclose(our[names[0]], their[names[0]], rtol=1e-4, atol=1e-6)
                np.testing.assert_array_equal(origins(ours, our[names[1]]), origins(theirs, their[names[1]]))
                np.testing.assert_allclose(our[names[2]], their[names[2]], rtol=2e-3, atol=2e-3)
            names = [f"stats/{array}" for array in (*STATISTICS, "quantile")]
            our, their = (layer(split, place, *names) for split in (ours, theirs))
            np.testing.assert_array_equal(our["stats/count"], their["stats/count"])
            for array in names:
                np.testing.assert_allclose(our[array], their[array], rtol=1e-3, atol=1e-4, err_msg=array)


def test_merged_slices_equal_one_run(runs, tmp_path, capsys):
    parts = [str(runs / name) for name in ("first", "middle", "last")]
    main([str(tmp_path / "merged"), *parts])
    said = capsys.readouterr()
    whole = jaxplain.open_store(runs / "all")
    counts = [jaxplain.open_store(part)["train"].sequence_count for part in parts]
    assert min(counts) > 10
    assert sum(counts) == whole["train"].sequence_count
    assert said.out.splitlines()[0] == f"train: {sum(counts)} sequences"
    assert said.out.splitlines()[-1] == f"The store is {tmp_path / 'merged'}/exemplars.zarr."
    merged = jaxplain.open_store(tmp_path / "merged")
    assert_same_store(merged, whole)
    exemplar = merged["valid"].neuron(2, 7).exemplars()[0]
    assert exemplar.text == whole["valid"].neuron(2, 7).exemplars()[0].text
    assert exemplar.corpus == str(runs / "docs.jsonl")


@pytest.mark.parametrize("file_bytes", [500, 5000, 2**26], ids=["neurons", "experts", "layer"])
def test_merged_slices_of_a_mixture_equal_one_run(runs_of_experts, tmp_path, monkeypatch, file_bytes):
    """Merged by blocks of some of an expert's neurons, of some experts, and of a whole layer."""
    monkeypatch.setattr(schema, "_SHARD_BYTES", file_bytes)
    parts = [str(runs_of_experts / name) for name in ("first", "middle", "last")]
    main([str(tmp_path / "merged"), *parts, "--quiet"])
    merged, whole = (jaxplain.open_store(path) for path in (tmp_path / "merged", runs_of_experts / "all"))
    assert_same_store(merged, whole)
    for name in SPLITS:
        ours, theirs = merged[name], whole[name]
        for axis in ("layers", "experts", "neurons", "shared"):
            np.testing.assert_array_equal(getattr(ours, axis), getattr(theirs, axis))
        assert len(ours.experts) > 2
        [count] = ours.layer_arrays(1, "stats/count")
        assert len(np.unique(count[count >= 0])) > 2, "experts read different numbers of tokens"
    neuron = merged["valid"].neuron(2, 3, expert=1)
    expected = whole["valid"].neuron(2, 3, expert=1)
    assert [e.text for e in neuron.exemplars()] == [e.text for e in expected.exemplars()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--exemplars.kinds", "[max, quantile]"], "has quantile, which cannot be merged, since the slices'"),
        (
            ["--statistics.tokens.neurons", "3"],
            "statistics.tokens of .* cannot be merged; extract the slices",
        ),
    ],
)
def test_what_slices_keep_too_little_of_is_refused(runs, tmp_path, arguments, sentence):
    extract(["--config", str(runs / "first.yaml"), "--output", str(tmp_path / "one"), *arguments])
    with pytest.raises(jaxplain.JaxplainError, match=sentence) as caught:
        main([str(tmp_path / "merged"), str(tmp_path / "one"), str(runs / "last"), "--quiet"])
    assert "\n" not in str(caught.value)


def test_slices_that_overlap(runs, tmp_path, capsys):
    main([str(tmp_path / "merged"), str(runs / "first"), str(runs / "all")])
    count = jaxplain.open_store(runs / "first")["train"].sequence_count
    said = capsys.readouterr().out
    assert f"train: {count} more are in an earlier store too; they are once among the exemplars" in said
    whole, merged = (jaxplain.open_store(path)["train"] for path in (runs / "all", tmp_path / "merged"))
    assert merged.sequence_count == whole.sequence_count
    for kind in KINDS:
        names = f"{kind}/score", f"{kind}/sequence"
        our, their = (layer(split, 1, *names) for split in (merged, whole))
        np.testing.assert_allclose(our[names[0]], their[names[0]], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(origins(merged, our[names[1]]), origins(whole, their[names[1]]))


def test_overwrite_replaces_what_is_there(runs, tmp_path):
    arguments = [str(tmp_path / "merged"), str(runs / "first"), "--quiet"]
    main(arguments)
    before = jaxplain.open_store(tmp_path / "merged").fingerprint
    with pytest.raises(jaxplain.JaxplainError, match=r"exists already; .* --overwrite"):
        main(arguments)
    main([*arguments, str(runs / "last"), "--overwrite"])
    assert jaxplain.open_store(tmp_path / "merged").fingerprint != before


def test_a_run_that_has_not_finished_stays(runs, tmp_path, monkeypatch):
    """Merging into its folder would throw its token tables away."""
    arguments = ["--config", str(runs / "first.yaml"), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("jaxplain.extract.make_step", lambda *_, **__: (lambda *_: 1 // 0, None))
        with pytest.raises(ZeroDivisionError):
            extract(arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "exemplars.zarr.partial").rglob("*")}
    assert before
    with pytest.raises(jaxplain.JaxplainError, match="is being made by an extraction that has not finished"):
        main([str(tmp_path), str(runs / "first"), str(runs / "last")])
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "exemplars.zarr.partial").rglob("*")}
    assert after == before


def test_the_sampled_tokens_are_in_the_store(runs):
    split = jaxplain.open_store(runs / "all")["train"]
    rows = split.sequences(np.arange(split.sequence_count))
    counted_NT = counted_tokens(rows["token"], excluded=frozenset(range(4)), first=1)
    assert counted_NT.sum() > SAMPLED
    drawn_NT = np.where(counted_NT, token_lottery(0, rows["document"], rows["start"], 20), -np.inf)
    order = np.argsort(-drawn_NT.ravel(), kind="stable")[:SAMPLED]
    acts_LNTF, _ = sown_activations(runs / "model", rows["token"].clip(0), make_mesh())
    files = split.store._files
    for place, number in enumerate((0, 2)):
        lottery, sequence, activation = files.read(
            *(files.open_array(f"train/sample/{name}") for name in ("lottery", "sequence", "activation"))
        )
        np.testing.assert_array_equal(lottery, drawn_NT.ravel()[order])
        np.testing.assert_array_equal(sequence, order // 20)
        expected_FM = np.asarray(acts_LNTF[number]).reshape((-1, 48))[order].T
        np.testing.assert_allclose(activation[place], expected_FM, rtol=2e-3, atol=2e-3)


def test_fewer_tokens_than_were_to_be_sampled(runs, tmp_path):
    """All of them are, and the rest of the sample is empty."""
    arguments = ["--statistics.sampled_tokens", "4000", "--output", str(tmp_path), "--neurons.layers", "[0]"]
    extract(["--config", str(runs / "all.yaml"), *arguments])
    split = jaxplain.open_store(tmp_path)["train"]
    files = split.store._files
    lottery, sequence, activation = files.read(
        *(files.open_array(f"train/sample/{name}") for name in ("lottery", "sequence", "activation"))
    )
    count = split.neuron(0, 0).stats.count
    assert 500 < count < 4000
    assert (np.diff(lottery[:count]) <= 0).all()
    assert (sequence[:count] >= 0).all()
    assert (sequence[count:] == -1).all()
    assert np.isnan(lottery[count:]).all()
    assert np.isnan(activation[0]).sum(axis=1).tolist() == [4000 - count] * 48


def test_errors_are_one_sentence_and_status_two(runs, tmp_path):
    arguments = [str(tmp_path / "out"), str(runs / "first"), str(runs / "first")]
    command = [sys.executable, "-m", "jaxplain.merge"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {runs / 'first'} is named twice; name every store once.\n"
    result = subprocess.run(
        [*command, *arguments, "--traceback"], capture_output=True, text=True, check=False
    )
    assert "Traceback" in result.stderr


def test_the_bar_gives_megabytes_per_second():
    said = StringIO()
    make = progress_bars(enabled=True, kind=ByteBar)
    with make(total=4_000_000, desc="train: merge", unit="B", mininterval=0, file=said) as bar:
        bar.start_t -= 2
        bar.update(3_000_000)
        bar.refresh()
    assert "3.00M/4.00M [00:02<00:00, 1 MB/s]" in said.getvalue()
