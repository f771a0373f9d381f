"""The command, end to end on tiny models: its store against brute force, and every bad input."""

import json
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.corpora.hashing import lottery
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import counted_tokens
from jaxplain.exemplars.step import make_step
from jaxplain.extract import main
from tests import oracle, tiny
from tests.subjects.test_decoder import make_mesh, sown_activations

SEQUENCES = 45
EVERYTHING = ("max", "min", "random")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model, a corpus, and a config that uses both."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny.write_model(folder / "model")
    tiny.write_corpus(folder / "docs.jsonl", 150)
    config = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [
                {"dataset": "json", "data_files": str(folder / "docs.jsonl"), "weight": 2.0},
                {
                    "dataset": "json",
                    "data_files": str(folder / "docs.jsonl"),
                    "chat_column": "messages",
                },
            ],
            "sequence_length": 20,
            "max_sequences": SEQUENCES,
            "splits": {"train": 0.5, "valid": 0.5},
            "exclude": {"special": True, "first": 1},
        },
        "exemplars": {"k": 6},
        "run": {"batch_size": 16, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def extract(workspace, output, *arguments):
    main(["--config", str(workspace / "config.yaml"), "--output", str(output), *arguments])
    return jaxplain.open_store(output)


@pytest.fixture(scope="module")
def store(workspace):
    return extract(workspace, workspace / "run", "--run.mesh.model", "2")


def expected(workspace, split, kind, k=6):
    """Brute force on the sequences that the store says were seen."""
    rows = split.sequences(np.arange(split.sequence_count))
    acts_LNTF, _ = sown_activations(workspace / "model", rows["token"].clip(0), make_mesh())
    counted_NT = counted_tokens(rows["token"], excluded=frozenset(range(4)), first=1)
    drawn_N = lottery(0, rows["document"], rows["start"])
    return (
        acts_LNTF,
        counted_NT,
        [oracle.exemplars(acts_NTF, counted_NT, kind, k, drawn_N) for acts_NTF in acts_LNTF],
    )


def assert_layer_equals(split, place, kind, columns, answer):
    score, sequence, activation = answer
    found = split.layer_arrays(place, f"{kind}/score", f"{kind}/sequence", f"{kind}/activation")
    scale = np.nanmax(np.abs(score))
    np.testing.assert_array_equal(found[1][columns], sequence)
    np.testing.assert_allclose(found[0][columns], score, atol=1e-5 * scale)
    np.testing.assert_allclose(found[2][columns], activation, atol=2e-3 * scale, rtol=2e-3)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("kind", EVERYTHING)
def test_store_equals_brute_force(store, workspace, split, kind):
    split = store[split]
    assert split.sequence_count == SEQUENCES
    _, _, answers = expected(workspace, split, kind)
    for layer, answer in enumerate(answers):
        assert_layer_equals(split, layer, kind, slice(None), answer)


def test_statistics_equal_brute_force(store, workspace):
    split = store["train"]
    acts_LNTF, counted_NT, _ = expected(workspace, split, "max")
    for layer, acts_NTF in enumerate(acts_LNTF):
        count, mean, variance, skewness, kurtosis, active = oracle.statistics(acts_NTF, counted_NT)
        names = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
        found = split.layer_arrays(layer, *(f"stats/{name}" for name in names))
        np.testing.assert_array_equal(found[0], count)
        np.testing.assert_allclose(found[1], mean, atol=1e-5)
        np.testing.assert_allclose(found[2], variance, rtol=1e-4)
        np.testing.assert_allclose(found[3], skewness, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[4], kurtosis, rtol=1e-4)
        np.testing.assert_allclose(found[5], active, atol=1e-6)


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (4, 2)])
def test_every_mesh_and_batch_size_gives_the_same_store(store, workspace, tmp_path, mesh):
    arguments = ["--run.mesh.data", str(mesh[0]), "--run.mesh.model", str(mesh[1])]
    other = extract(workspace, tmp_path, *arguments, "--run.batch_size", "8")
    for split in ("train", "valid"):
        for kind in EVERYTHING:
            names = [f"{kind}/sequence", f"{kind}/score"]
            for layer in range(3):
                ours, theirs = (s[split].layer_arrays(layer, *names) for s in (store, other))
                np.testing.assert_array_equal(ours[0], theirs[0])
                np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


def test_chosen_layers_and_neurons(store, workspace, tmp_path):
    arguments = ["--neurons.layers", "[0, 1]", "--neurons.indices", "[40, 3, 7]"]
    part = extract(workspace, tmp_path, *arguments, "--run.mesh.model", "2")["train"]
    assert part.layers.tolist() == [0, 1]
    assert part.neurons.tolist() == [3, 7, 40]
    for layer in (0, 1):
        ours = part.layer_arrays(layer, "max/sequence", "stats/mean")
        whole = store["train"].layer_arrays(layer, "max/sequence", "stats/mean")
        np.testing.assert_array_equal(ours[0], whole[0][[3, 7, 40]])
        np.testing.assert_allclose(ours[1], whole[1][[3, 7, 40]], rtol=1e-4, atol=1e-6)


def test_pairs_from_a_file(store, workspace, tmp_path):
    np.save(tmp_path / "pairs.npy", np.array([[2, 5], [0, 11], [0, 5], [2, 5]]))
    part = extract(workspace, tmp_path / "run", "--neurons.file", str(tmp_path / "pairs.npy"))["train"]
    for layer, index in ((0, 5), (0, 11), (2, 5)):
        ours = [e.sequence for e in part.neuron(layer, index).exemplars("min")]
        assert ours == [e.sequence for e in store["train"].neuron(layer, index).exemplars("min")]
    with pytest.raises(JaxplainError, match="neuron 11 of layer 2 was not among those extracted"):
        part.neuron(2, 11)


def test_bfloat16_and_float32_activations(workspace, tmp_path):
    arguments = ["--subject.dtype", "bfloat16", "--exemplars.activation_dtype", "float32"]
    exemplar = extract(workspace, tmp_path, *arguments)["train"].neuron(1, 1).exemplars()[0]
    assert np.nanmax(exemplar.activations) == exemplar.score


def test_fewer_sequences_than_wanted_is_said(workspace, tmp_path, capsys):
    store = extract(workspace, tmp_path, "--corpus.max_sequences", "5000", "--neurons.layers", "[0]")
    rows = store["train"].sequence_count
    assert 100 < rows < 5000
    said = capsys.readouterr().out
    assert f"train: {workspace / 'docs.jsonl'} ran out, so there are {rows} sequences" in said


def test_zero_means_until_a_source_runs_out(workspace, tmp_path, capsys):
    store = extract(workspace, tmp_path, "--corpus.max_sequences", "0", "--neurons.layers", "[0]")
    assert store["train"].sequence_count > SEQUENCES
    assert "ran out" in capsys.readouterr().out


def test_nothing_is_said_when_no_source_runs_out(workspace, tmp_path, capsys):
    extract(workspace, tmp_path, "--neurons.layers", "[0]")
    assert "ran out" not in capsys.readouterr().out


def test_ends_with_a_sample_and_the_next_command(workspace, tmp_path, capsys):
    extract(workspace, tmp_path, "--neurons.layers", "[0, 1]")
    shown = capsys.readouterr().out
    assert "layer 0, neuron" in shown
    assert f"-m jaxplain.show {tmp_path} --layer" in shown
    assert "--kind min" in shown


def test_same_config_gives_the_same_files(workspace, tmp_path):
    for name in ("a", "b"):
        extract(workspace, tmp_path / name, "--neurons.layers", "[1]")
    first = {
        p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("c/*") if p.is_file()
    }
    second = {
        p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("c/*") if p.is_file()
    }
    assert first
    assert first == second


def run_as_user(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxplain.extract", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_errors_are_one_sentence_and_status_two(workspace, tmp_path):
    result = run_as_user("--config", str(workspace / "config.yaml"), "--corpus.sequence_lenght", "9")
    assert result.returncode == 2
    assert result.stderr == (
        "error: unknown config key corpus.sequence_lenght; did you mean corpus.sequence_length?\n"
    )
    assert result.stdout == ""
    traced = run_as_user("--config", str(workspace / "config.yaml"), "--nope", "9", "--traceback")
    assert traced.returncode != 0
    assert "Traceback" in traced.stderr


def test_help_describes_every_field():
    result = run_as_user("--help")
    assert result.returncode == 0
    from jaxplain.commands import _known_keys
    from jaxplain.configs.extraction import ExtractConfig

    for key in _known_keys(ExtractConfig):
        name = key.rsplit(".", 1)[-1] if key.startswith("corpus.sources.") else f"--{key}"
        assert name in result.stdout, key
    for words in (
        "Sequences per neuron, split and kind",
        "(type: int, default: 96)",
        "Share of the sequences",
    ):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--corpus.exclude.frist", "1"],
            r"unknown config key corpus.exclude.frist; did you mean corpus.exclude.first\?",
        ),
        (["--exemplars.k", "many"], "config key exemplars.k: Expected a int. Got value: many"),
        (["--exemplars.k", "0"], "exemplars.k is 0; give a positive number"),
        (["--exemplars.kinds", "[max, best]"], "exemplars.kinds.*best"),
        (
            ["--exemplars.splits", "[train, exam]"],
            "exemplars.splits is 'exam'; corpus.splits has train, valid",
        ),
        (["--exemplars.kinds", "[]"], "name at least one"),
        (["--corpus.splits.train", "0.9"], "sum to at most 1"),
        (["--corpus.stride", "21"], "corpus.stride is 21; give 1 to 20 tokens"),
        (["--corpus.sequence_length", "65"], "is 65, but .* reads at most 64 tokens"),
        (["--corpus.sources", "[{preset: nothing}]"], "preset is 'nothing'; known are"),
        (
            ["--corpus.sources", "[{preset: chitchat, dataset: json}]"],
            "either a preset or a dataset",
        ),
        (
            ["--corpus.sources", "[{preset: chitchat, weight: 0}]"],
            "weight is 0.*; give a positive number",
        ),
        (
            ["--corpus.sources", "[{preset: chitchat, wieght: 1}]"],
            r"unknown config key wieght; did you mean corpus.sources.weight\?",
        ),
        (
            ["--corpus.sources", "[{dataset: json, data_files: /no/file.jsonl}]"],
            "no such file: /no/file.jsonl",
        ),
        (["--corpus.sources", "[]"], "corpus.sources is .*; give at least one source"),
        (["--corpus.seed", "-1"], "corpus.seed is -1; give a number from 0"),
        (["--corpus.splits", '{"../up": 1.0}'], "corpus.splits is '../up'; name splits with letters"),
        (["--corpus.splits", '{"vocabulary": 1.0}'], "vocabulary is taken"),
        (["--corpus.exclude.first", "-1"], "exclude.first is -1; give 0 to 19 tokens"),
        (["--corpus.exclude.first", "20"], "exclude.first is 20; give 0 to 19 tokens"),
        (["--corpus.exclude.tokens", "[384]"], "names token 384, but the subject's tokens are 0 to 383"),
        (["--corpus.sources", "[{preset: chitchat, text_column: a}]"], "sets text_column itself"),
        (["--output", ""], "output is ''; name a folder"),
        (["--neurons.layers", "[99999999999999999999]"], "names layer 99999999999999999999, but"),
        (
            ["--exemplars.k", "1000000000"],
            r"GiB of exemplars and statistics and about .* GiB besides, and has .* GiB; lower exemplars.k",
        ),
        (["--subject.id", ""], "subject.id is '', but there is no such folder"),
        (["--neurons.layers", "[3]"], "names layer 3, but the subject's layers are 0 to 2"),
        (["--neurons.indices", "[-1]"], "names neuron -1, but the subject's neurons are 0 to 47"),
        (["--neurons.indices", "[]"], "neurons.indices names no neuron"),
        (["--neurons.file", "/no/pairs.npy"], "no such file: /no/pairs.npy"),
        (["--run.mesh.model", "3"], "data -1 x model 3, which does not make the 8 devices"),
        (["--run.mesh.model", "0"], "does not make the 8 devices"),
        (["--run.batch_size", "12"], "batch_size is 12, which the 8 devices"),
        (["--subject.id", "/no/such/folder"], "'/no/such/folder', but there is no such folder"),
        (["--subject.id", "no/such-model"], "which is no packaged subject"),
        (["--subject.dtype", "int8"], "subject.dtype"),
        (["--config", "/no/config.yaml"], "does not exist.*/no/config.yaml"),
    ],
)
def test_bad_input(workspace, tmp_path, arguments, message, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JaxplainError, match=message) as caught:
        extract(workspace, tmp_path / "run", *arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(JaxplainError, match=r"there is no store|is incomplete"):
        jaxplain.open_store(tmp_path / "run")


def test_mesh_must_divide_the_neurons(workspace, tmp_path):
    config = tiny.LLAMA | {"intermediate_size": 44}
    folder = tiny.write_model(tmp_path / "model", config)
    with pytest.raises(JaxplainError, match="model is 8, which does not divide the subject's 44 neurons"):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder), "--run.mesh.model", "8")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (np.zeros((2, 3), np.int64), r"shape \(2, 3\)"),
        (np.zeros((2, 2)), "dtype float64"),
        (np.array([[0, 48]]), "names neuron 48"),
        (np.zeros((0, 2), np.int64), "names no layer"),
    ],
)
def test_bad_pairs(workspace, tmp_path, pairs, message):
    np.save(tmp_path / "pairs.npy", pairs)
    with pytest.raises(JaxplainError, match=message):
        extract(workspace, tmp_path / "run", "--neurons.file", str(tmp_path / "pairs.npy"))


def test_empty_corpus(workspace, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    source = f"[{{dataset: json, data_files: {tmp_path / 'blank.jsonl'}}}]"
    with pytest.raises(
        JaxplainError, match="the corpus is empty: no source gave a sequence for split 'train'"
    ):
        extract(workspace, tmp_path / "run", "--corpus.sources", source)
    with pytest.raises(JaxplainError, match="is incomplete"):
        jaxplain.open_store(tmp_path / "run")


def test_chat_data_with_a_plain_subject(workspace, tmp_path):
    folder = tiny.write_model(tmp_path / "model", chat=False)
    with pytest.raises(JaxplainError, match="no chat template"):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder))


def test_existing_output_is_kept_unless_told(workspace, tmp_path, capsys):
    extract(workspace, tmp_path, "--neurons.layers", "[0]")
    before = (tmp_path / "exemplars.zarr" / "zarr.json").read_text()
    with pytest.raises(JaxplainError, match=r"exists already, and is not what .* --overwrite"):
        extract(workspace, tmp_path)
    capsys.readouterr()
    extract(workspace, tmp_path, "--neurons.layers", "[0]")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'exemplars.zarr'} is complete already\n")
    assert (tmp_path / "exemplars.zarr" / "zarr.json").read_text() == before
    # A run that fails does not cost the old store even when it may be replaced.
    with pytest.raises(JaxplainError, match="names layer 99"):
        extract(workspace, tmp_path, "--overwrite", "--neurons.layers", "[99]")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    blank = f"[{{dataset: json, data_files: {tmp_path / 'blank.jsonl'}}}]"
    with pytest.raises(JaxplainError, match="corpus is empty"):
        extract(workspace, tmp_path, "--overwrite", "--corpus.sources", blank)
    assert (tmp_path / "exemplars.zarr" / "zarr.json").read_text() == before
    arguments = ["--neurons.layers", "[1]", "--exemplars.splits", "[train]"]
    store = extract(workspace, tmp_path, "--overwrite", *arguments)
    assert store["train"].layers.tolist() == [1]
    assert not (tmp_path / "exemplars.zarr" / "valid").exists(), "nothing of the old store is left"


def test_activations_that_are_not_finite_are_an_error_at_once(workspace, tmp_path, monkeypatch):
    steps = []

    def counting(*arguments, **options):
        step, weights = make_step(*arguments, **options)
        return lambda *inputs: steps.append(1) or step(*inputs), weights

    monkeypatch.setattr("jaxplain.extract.make_step", counting)
    weights = tiny.tensors(tiny.LLAMA)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    folder = tiny.write_model(tmp_path / "model", weights=weights)
    with pytest.raises(JaxplainError, match="layer 1 has activations that are not finite"):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder))
    assert len(steps) == 1


def test_config_in_the_store_is_the_whole_config(store):
    assert store.config["corpus"]["sequence_length"] == 20
    assert store.config["run"]["mesh"] == {"data": -1, "model": 2}
    assert json.dumps(store.attributes["subject"]["architecture"]["neurons"]) == "48"
    assert jnp.dtype(store.config["exemplars"]["activation_dtype"]) == jnp.float16


def test_sources_on_the_command_line_replace_those_of_the_config(workspace):
    """Lists of equal length are not merged item by item."""
    from jaxplain.commands import config_parser, parse_config
    from jaxplain.configs.extraction import ExtractConfig

    sources = "[{preset: chitchat}, {dataset: text, data_files: a.txt}]"
    arguments = ["--config", str(workspace / "config.yaml"), "--corpus.sources", sources]
    config, _ = parse_config(config_parser(ExtractConfig, "extract"), ExtractConfig, arguments)
    assert [s.preset for s in config.corpus.sources] == ["chitchat", None]
    assert [s.chat_column for s in config.corpus.sources] == [None, None]
    assert [s.weight for s in config.corpus.sources] == [1.0, 1.0]


def test_flags_do_not_belong_into_configs(workspace, tmp_path):
    config = yaml.safe_load((workspace / "config.yaml").read_text()) | {"overwrite": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(JaxplainError, match="--overwrite is for the command line"):
        main(["--config", str(tmp_path / "config.yaml")])
    (tmp_path / "config.yaml").write_bytes(b"output: \xff\xfe")
    with pytest.raises(JaxplainError, match="not UTF-8"):
        main(["--config", str(tmp_path / "config.yaml")])


def test_tokenizer_of_another_model_is_refused(workspace, tmp_path):
    folder = tiny.write_model(tmp_path / "model", tiny.LLAMA | {"vocab_size": 300})
    with pytest.raises(JaxplainError, match=r"gives token 3.., but the subject has embeddings of 300"):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder))


@pytest.mark.parametrize("file", ["pairs.npz", "empty.npy", "folder"])
def test_files_of_pairs_that_are_none(workspace, tmp_path, file):
    np.savez(tmp_path / "pairs.npz", a=np.zeros((1, 2), int))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(JaxplainError, match=r"neurons\.file"):
        extract(workspace, tmp_path / "run", "--neurons.file", str(tmp_path / file))


def test_interrupt_ends_with_one_word_and_its_own_status(workspace, tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jaxplain.extract", "--config", str(workspace / "config.yaml")),
            *("--output", str(tmp_path), "--corpus.max_sequences", "0", "--run.progress", "true"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    with process:
        while "train: read" not in said and (character := process.stderr.read(1)):
            said += character
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert said.rstrip().endswith("interrupted")
    assert "Traceback" not in said
    with pytest.raises(JaxplainError, match="is incomplete"):
        jaxplain.open_store(tmp_path)


def test_output_that_cannot_be_written(workspace, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JaxplainError, match=r"file/exemplars\.zarr.* could not be written: ") as caught:
        extract(workspace, tmp_path / "file")
    assert "\n" not in str(caught.value)
