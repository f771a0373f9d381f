"""What a run makes of its corpus: windows, policies, streams, presets, from the command line to the store."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.configs.extraction import CorpusConfig, ExtractConfig, SourceConfig, SubjectConfig, recorded
from jaxplain.corpora.presets import preset
from jaxplain.corpora.tokens import token_batches
from jaxplain.corpora.workers import open_workers
from jaxplain.errors import JaxplainError
from jaxplain.extract import main
from jaxplain.progress import progress_bars
from tests import tiny

PREFIXED = "be kind<|user|>{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model whose chat template begins with a system prompt, two corpora, and a config."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny.write_model(folder / "model")
    settings = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    settings["chat_template"] = PREFIXED
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, texts in (("few", tiny.documents(12)), ("many", tiny.documents(40, seed=1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 2))
    config = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [
                {"dataset": "json", "data_files": str(folder / f"{n}.jsonl")} for n in ("few", "many")
            ],
            "sequence_length": 20,
            "windows": "head",
            "max_sequences": 0,
            "splits": {"train": 1.0},
            "exclude": {"special": False},
        },
        "neurons": {"layers": [0], "indices": [0, 1]},
        "exemplars": {"k": 6, "splits": ["train"], "kinds": ["max"]},
        "run": {"batch_size": 16, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def extract(workspace, output, *arguments):
    main(["--config", str(workspace / "config.yaml"), "--output", str(output), *arguments])
    return jaxplain.open_store(output)["train"]


def rows_of(split):
    return split.sequences(np.arange(split.sequence_count))


@pytest.mark.parametrize("kind", ["head", "packed"])
def test_tokens_of_a_chat_prefix_never_count(workspace, tmp_path, kind):
    split = extract(workspace, tmp_path, "--corpus.chat_prefix", "true", "--corpus.windows", kind)
    rows = rows_of(split)
    places = (rows["token"] >= 0).sum(1) - rows["length"]
    prefix = int(places[0])
    assert prefix > 2
    assert (places == prefix).all()
    assert (rows["token"][:, :prefix] == rows["token"][0, :prefix]).all()
    count, activation, sequence = split.layer_arrays(0, "stats/count", "max/activation", "max/sequence")
    assert count[0] == rows["length"].sum()
    text = np.arange(20) < prefix + rows["length"][sequence[0]][:, None]
    text &= np.arange(20) >= prefix
    np.testing.assert_array_equal(np.isfinite(activation[0]), text)


def test_without_a_chat_prefix_everything_counts_as_before(workspace, tmp_path):
    split = extract(workspace, tmp_path)
    assert split.layer_arrays(0, "stats/count")[0][0] == (rows_of(split)["token"] >= 0).sum()


def test_sources_stop_or_continue(workspace, tmp_path, capsys):
    stopped = rows_of(extract(workspace, tmp_path / "stop"))["corpus"]
    assert np.bincount(stopped).tolist() == [24, 24]
    said = capsys.readouterr().out
    assert f"train: {workspace / 'few.jsonl'} ran out, so there are 48 sequences" in said
    arguments = ["--corpus.when_exhausted", "continue"]
    went_on = rows_of(extract(workspace, tmp_path / "continue", *arguments))["corpus"]
    assert np.bincount(went_on).tolist() == [24, 80]
    assert (
        f"few.jsonl, {workspace / 'many.jsonl'} ran out, so there are 104 sequences"
        in capsys.readouterr().out
    )
    extract(workspace, tmp_path / "some", *arguments, "--corpus.max_sequences", "60")
    assert "few.jsonl ran out, so the other sources went on" in capsys.readouterr().out


def test_repeated_sequences_count_once(workspace, tmp_path, capsys):
    arguments = ["--corpus.deduplicate", "true", "--corpus.when_exhausted", "continue"]
    split = extract(workspace, tmp_path, *arguments)
    rows = rows_of(split)
    assert len(np.unique(rows["token"], axis=0)) == len(rows["token"]) == 52
    assert "train: 52 repeated sequences were left out" in capsys.readouterr().out
    assert split.layer_arrays(0, "stats/count")[0][0] == rows["length"].sum()
    top = split.layer_arrays(0, "max/sequence")[0][0]
    assert len(np.unique(rows["token"][top], axis=0)) == 6


def test_a_streamed_run_reads_the_same_sequences(workspace, tmp_path):
    def sources(streaming):
        fields = {"dataset": "json", "data_files": str(workspace / "many.jsonl"), "streaming": streaming}
        return ["--corpus.sources", json.dumps([fields])]

    found = [rows_of(extract(workspace, tmp_path / str(s), *sources(s))) for s in (False, True)]
    assert [len(rows["document"]) for rows in found] == [80, 80]
    assert sorted(found[0]["document"]) == sorted(found[1]["document"])


def test_input_workers_write_the_very_same_table(workspace, tmp_path, monkeypatch):
    counts = []

    def counting(count, shared):
        counts.append(count)
        return open_workers(count, shared)

    monkeypatch.setattr("jaxplain.extract.open_workers", counting)
    arguments = ["--corpus.windows", "packed", "--corpus.stride", "7"]
    for name, more in (
        ("0", ["--run.input_workers", "0"]),
        ("1", ["--run.input_workers", "1"]),
        ("none", []),
    ):
        some = ["--corpus.max_sequences", "90"] if name == "none" else ["--corpus.when_exhausted", "continue"]
        extract(workspace, tmp_path / name, *arguments, *more, *some)
    assert counts == [0, 1, 0]
    files = {
        name: {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in (tmp_path / name / "exemplars.zarr" / "train").rglob("*")
            if file.is_file()
        }
        for name in ("0", "1")
    }
    assert len(files["0"]) > 10
    assert files["0"] == files["1"]
    stores = [jaxplain.open_store(tmp_path / name) for name in ("0", "1", "none")]
    assert [store.config["run"].get("input_workers") for store in stores] == [0, 1, None]


def test_a_run_says_how_long_devices_waited_for_input(workspace, tmp_path, monkeypatch, capsys):
    extract(workspace, tmp_path / "quick")
    slowly = 0.3

    def slow(*arguments, **options):
        for batch in token_batches(*arguments, **options):
            time.sleep(slowly)
            yield batch

    monkeypatch.setattr("jaxplain.exemplars.extraction.token_batches", slow)
    capsys.readouterr()
    extract(workspace, tmp_path / "slow")
    quick, slow_one = (
        jaxplain.open_store(tmp_path / name).attributes["seconds"]["train"] for name in ("quick", "slow")
    )
    batches = 3
    assert batches * slowly <= slow_one["waited_for_input"] < slow_one["read"]
    assert quick["waited_for_input"] < slow_one["waited_for_input"] - 0.8 * batches * slowly
    assert 0 < quick["waited_for_input"] < quick["read"]
    assert quick["cut"] > 0
    said = capsys.readouterr().out
    found = re.search(
        r"train: 48 sequences cut in (.*) s and read in (.*) s, of which the devices waited (.*) s \((.*)%\)",
        said,
    )
    expected = [slow_one[name] for name in ("cut", "read", "waited_for_input")]
    expected.append(100 * slow_one["waited_for_input"] / slow_one["read"])
    np.testing.assert_allclose([float(number) for number in found.groups()], expected, atol=0.051)


def test_valueeval_from_its_folder(workspace, tmp_path):
    for number, file in enumerate(preset("valueeval").files):
        (tmp_path / file).write_text(f"Argument ID\tPremise\nA1\tthe cat sees {number}\n")
    arguments = ["--corpus.sources", "[{preset: valueeval}]", "--corpus.valueeval_dir", str(tmp_path)]
    assert extract(workspace, tmp_path / "run", *arguments).sequence_count == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--corpus.max_sequences", "9", "--corpus.expected_sequences", "9"],
            "max_sequences 9 is expected already",
        ),
        (
            ["--corpus.expected_sequences", "0"],
            "expected_sequences is 0; give a positive number, or leave it out",
        ),
        (["--corpus.stride", "4"], "corpus.stride is 4; head windows are one per document"),
        (["--corpus.windows", "tail"], "corpus.windows.*tail"),
        (["--corpus.when_exhausted", "repeat"], "corpus.when_exhausted.*repeat"),
        (
            ["--corpus.sources", "[{preset: fineweb, shuffle_buffer: -1}]"],
            "shuffle_buffer is -1; give 0 for no",
        ),
        *(
            (
                ["--corpus.sources", f"[{{preset: fineweb, weight: {weight}}}, {{preset: chitchat}}]"],
                f"corpus.sources.weight is {said}.*; give a positive number",
            )
            for weight, said in (("-1", "-1"), ("0", "0"), (".nan", "nan"), (".inf", "inf"))
        ),
        (["--run.input_workers", "-2"], "run.input_workers is -2; give 0 for none"),
        (["--corpus.sources", "[{preset: valueeval}]"], "the preset valueeval needs corpus.valueeval_dir"),
        (
            ["--corpus.chat_prefix", "true", "--corpus.sequence_length", "4"],
            "corpus.sequence_length is 4, but the subject's chat prefix alone takes",
        ),
    ],
)
def test_bad_input(workspace, tmp_path, arguments, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        extract(workspace, tmp_path, *arguments)
    assert "\n" not in str(caught.value)


def test_a_chat_prefix_that_does_not_fit_is_refused_before_weights_load(workspace, tmp_path, monkeypatch):
    extract(workspace, tmp_path)
    monkeypatch.setattr("jaxplain.extract.make_step", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(JaxplainError, match="chat prefix alone takes"):
        extract(
            workspace,
            tmp_path,
            "--overwrite",
            "--corpus.chat_prefix",
            "true",
            "--corpus.sequence_length",
            "4",
        )
    assert jaxplain.open_store(tmp_path)["train"].sequence_count == 48


def test_later_fields_are_recorded_only_where_they_are_set():
    source = SourceConfig(preset="chitchat")
    old = ExtractConfig(subject=SubjectConfig(id="x"), corpus=CorpusConfig(sources=(source,)), output="o")
    corpus = recorded(old)["corpus"]
    assert set(corpus) == {
        *("sources", "sequence_length", "stride", "separator", "max_sequences"),
        *("splits", "exclude", "seed"),
    }
    assert set(corpus["sources"][0]) == {
        *("preset", "dataset", "config", "revision", "split", "data_files", "delimiter"),
        *("text_column", "chat_column", "weight"),
    }
    changed = dataclasses.replace(old.corpus, sources=(dataclasses.replace(source, streaming=False),))
    changed = dataclasses.replace(changed, windows="head", deduplicate=True)
    corpus = recorded(dataclasses.replace(old, corpus=changed))["corpus"]
    assert (corpus["windows"], corpus["deduplicate"]) == ("head", True)
    assert corpus["sources"][0]["streaming"] is False
    everything = dataclasses.asdict(old)
    del everything["corpus"], everything["exemplars"]["strata"], everything["statistics"]["tokens"]
    del everything["exemplars"]["samples_per_quantile"]
    for name in (
        "input_workers",
        "shard_weights",
        "checkpoint_minutes",
        "checkpoint_steps",
        "checkpoint_folder",
        "check_memory",
    ):
        del everything["run"][name]
    del everything["subject"]["tokenizer"], everything["neurons"]["experts"]
    assert {name: value for name, value in recorded(old).items() if name != "corpus"} == everything


def test_bar_has_an_estimate_where_the_number_of_sequences_is_expected(workspace, tmp_path, capsys):
    extract(workspace, tmp_path / "a", "--run.progress", "true", "--corpus.expected_sequences", "48")
    known = capsys.readouterr().err
    assert "48/48 [" in known
    assert "cut: 100%" in known
    extract(workspace, tmp_path / "b", "--run.progress", "true")
    cut = [line for line in capsys.readouterr().err.replace("\n", "\r").split("\r") if "train: cut" in line]
    assert cut
    assert all(line.startswith("train: cut: ") and "/min]" in line for line in cut)
    assert not any("?" in line or "%" in line or "<" in line for line in cut)
    assert cut[-1].startswith("train: cut: 48 [00:0")


def test_bar_says_nothing_of_the_end_once_there_are_more_than_expected(capsys):
    with progress_bars(enabled=True)(total=2, desc="cut", unit="sequences", mininterval=0) as bar:
        list(bar.over(range(3)))
    lines = capsys.readouterr().err.split("\r")
    assert "2/2 [" in lines[-2] or any("2/2 [" in line for line in lines)
    assert lines[-1].startswith("cut: 3 [")
