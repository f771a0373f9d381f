"""The command, end to end: token tables, a local model, a server; interruptions, and every bad input."""

import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.explain import main
from jaxplain.export import main as export
from jaxplain.extract import main as extract
from jaxplain.show import main as show
from jaxplain.store.explanations import open_explanations
from tests import tiny
from tests.explainers.faults import answers, client_error, text
from tests.explainers.openai_server import openai_server

NEURONS = 12  # of each of two layers


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny model that reads long prompts, a store of its neurons, and a config for each provider."""
    folder = tmp_path_factory.mktemp("explain")
    tiny.write_model(folder / "model", tiny.LLAMA | {"max_position_embeddings": 4096})
    tiny.write_corpus(folder / "docs.jsonl", 80)
    run = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": 24,
            "max_sequences": 40,
            "splits": {"train": 0.5, "valid": 0.5},
        },
        "neurons": {"layers": [0, 2], "indices": list(range(NEURONS))},
        "exemplars": {"k": 8, "splits": ["train"]},
        "run": {"batch_size": 8, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(run))
    extract(["--config", str(folder / "extract.yaml")])
    return folder


@pytest.fixture
def explain(workspace, tmp_path, monkeypatch):
    """Runs the command into a folder of this test, and gives the samples that are there afterwards."""
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        main([*command(workspace, tmp_path), *arguments])
        return rows(tmp_path)

    return run


def command(workspace, output):
    return ["--store", str(workspace / "run"), "--output", str(output), "--progress", "false"]


def rows(folder, table="samples"):
    connection = sqlite3.connect(folder / "explanations.sqlite")
    connection.row_factory = sqlite3.Row
    found = [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY layer, neuron, sign")]
    connection.close()
    return found


def keys(samples):
    return [(row["layer"], row["neuron"], row["sign"], row["sample"]) for row in samples]


EVERY_SIGN = [(layer, n, sign, 0) for layer in (0, 2) for n in range(NEURONS) for sign in ("max", "min")]
TOKEN_TABLE = ("--explainer.provider", "token_table")


def remote(server):
    return ("--explainer.provider", "openai", "--explainer.model", "m", "--explainer.base_url", server.url)


def test_token_table_explains_every_neuron_by_its_strongest_tokens(explain, workspace, tmp_path, capsys):
    samples = explain(*TOKEN_TABLE, "--prompt.tokens", "3")
    assert keys(samples) == EVERY_SIGN
    split = jaxplain.open_store(workspace / "run")["train"]
    for row in samples[:6]:
        assert row["status"] == "explained"
        assert row["text"].startswith("tokens such as ")
        listed = json.loads(row["reply"])
        assert 1 <= len(listed) <= 3
        assert listed == sorted(listed, key=lambda item: -item[1])
        neuron = split.neuron(row["layer"], row["neuron"])
        (explanation,) = [e for e in neuron.explanations(tmp_path) if e.sign == row["sign"]]
        assert explanation.text == row["text"]
        assert (explanation.provider, explanation.model, explanation.sample) == ("token_table", None, 0)
    assert "24 of 24 neurons are complete (48 explained)" in capsys.readouterr().out


def test_explanations_lie_beside_the_store_and_show_in_the_terminal(workspace, capsys):
    database = workspace / "run" / "explanations.sqlite"
    neuron = jaxplain.open_store(workspace / "run")["train"].neuron(0, 3)
    assert neuron.explanations() == []
    try:
        main(
            [
                "--store",
                str(workspace / "run"),
                "--progress",
                "false",
                *TOKEN_TABLE,
                "--neurons.layers",
                "[0]",
            ]
        )
        assert [e.sign for e in neuron.explanations()] == ["max", "min"]
        capsys.readouterr()
        show([str(workspace / "run"), "--layer", "0", "--neuron", "3", "--limit", "1"])
        assert neuron.explanations()[0].text in capsys.readouterr().out
    finally:
        for path in workspace.joinpath("run").glob("explanations.sqlite*"):
            path.unlink()
    assert not database.exists()


def test_second_run_does_nothing_and_overwrite_does_all_again(explain, tmp_path, capsys):
    before = explain(*TOKEN_TABLE, "--neurons.layers", "0:1")
    capsys.readouterr()
    assert explain(*TOKEN_TABLE, "--neurons.layers", "0:1") == before
    assert "nothing new" in capsys.readouterr().out
    after = explain(*TOKEN_TABLE, "--neurons.layers", "0:1", "--overwrite")
    assert keys(after) == keys(before)
    assert [row["text"] for row in after] == [row["text"] for row in before]
    assert all(b["created"] > a["created"] for a, b in zip(before, after, strict=True))
    # More neurons only add to what is there; another config is another recipe.
    assert len(explain(*TOKEN_TABLE)) == 4 * NEURONS
    assert len(explain(*TOKEN_TABLE, "--prompt.tokens", "2", "--neurons.layers", "[0]")) == 6 * NEURONS


def test_local_model_explains_on_the_mesh(explain, workspace):
    arguments = ["--explainer.provider", "local", "--explainer.model", str(workspace / "model")]
    arguments += ["--neurons.layers", "[2]", "--neurons.indices", "0:12:4", "--sampling.max_tokens", "8"]
    arguments += ["--prompt.few_shot_count", "1", "--prompt.exemplars", "2", "--prompt.context", "3"]
    samples = explain(*arguments, "--sampling.samples", "2", "--explainer.local.mesh.model", "2")
    assert keys(samples) == [(2, n, s, i) for n in (0, 4, 8) for s in ("max", "min") for i in (0, 1)]
    for row in samples:
        assert row["status"] in ("explained", "unparsable")
        assert row["model"] == str(workspace / "model")
        assert row["output_tokens"] <= 8
        assert row["input_tokens"] > 100
    replies = [row["reply"] for row in samples]
    assert len(set(replies)) > 1
    # The same config gives the same replies, whatever the batches.
    again = explain(
        *arguments, "--sampling.samples", "2", "--overwrite", "--explainer.local.batch_size", "16"
    )
    assert sum(a == row["reply"] for a, row in zip(replies, again, strict=True)) >= len(replies) - 1


def test_samples_keep_everything_to_audit_them(explain, tmp_path):
    with openai_server(lambda request, number: text("Explanation: odd words", input_tokens=70)) as server:
        arguments = ("--neurons.layers", "[0]", "--explainer.concurrency", "1")
        (first, *_) = explain(*remote(server), *arguments)
        sent = server.requests[0].body["messages"]
    connection = sqlite3.connect(tmp_path / "explanations.sqlite")
    numbers = json.loads(first["messages"])
    texts = dict(connection.execute("SELECT id, content FROM messages"))
    recipe = json.loads(connection.execute("SELECT config FROM recipes").fetchone()[0])
    connection.close()
    assert [texts[number] for number in numbers] == [message["content"] for message in sent]
    assert first["text"] == "odd words"
    assert first["reply"] == "Explanation: odd words"
    assert first["input_tokens"] == 70
    assert len(json.loads(first["sequences"])["max"]) == 8
    assert recipe["explainer"]["model"] == "m"
    assert recipe["prompt"]["style"] == "highlighted"
    assert len(texts) < 3 + 2 * 3 + 2 * NEURONS  # what prompts share is kept once


def test_both_signs_come_from_one_prompt(explain):
    reply = "Positive explanation: ups\nNegative explanation: downs"
    with openai_server(lambda request, number: text(reply, output_tokens=9)) as server:
        samples = explain(
            *remote(server), "--prompt.style", "highlighted_both_signs", "--neurons.layers", "[0]"
        )
        assert len(server.requests) == NEURONS
    assert {(row["sign"], row["text"]) for row in samples} == {("max", "ups"), ("min", "downs")}
    assert sum(row["output_tokens"] for row in samples) == 9 * NEURONS  # counted once


def test_full_text_search(explain, tmp_path):
    def reply(prompt):
        return f"Explanation: about {'colours' if 'blue' in prompt.split('Excerpt 1')[-1] else 'numbers'}"

    with openai_server(answers(reply)) as server:
        samples = explain(*remote(server), "--neurons.layers", "[0]")
    with open_explanations(tmp_path / "explanations.sqlite") as database:
        found = database.search("colours")
        assert sorted((e.index, e.sign) for e in found) == [
            (row["neuron"], row["sign"]) for row in samples if "colours" in row["text"]
        ]
        with pytest.raises(JaxplainError, match="no full-text query"):
            database.search('"')


def start(workspace, output, server, *arguments):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxplain.explain", *command(workspace, output), *remote(server), *arguments],
        env=os.environ | {"JAXPLAIN_CACHE": str(output / "cache"), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def asked(server):
    """The part of every prompt that is about a neuron, in order."""
    return [request.body["messages"][-1]["content"] for request in server.requests]


def test_killed_runs_do_only_what_is_missing(workspace, tmp_path):
    reply = answers(lambda prompt: "Explanation: words", seconds=0.05)
    arguments = ("--explainer.concurrency", "3", "--explainer.cache", "false")
    with openai_server(reply) as server:
        for killed_after in (5, 17):
            process = start(workspace, tmp_path, server, *arguments)
            wait_for(lambda n=killed_after: len(server.requests) >= n, process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = keys(rows(tmp_path))
        assert len(done) >= 4
        before = len(server.requests)
        process = start(workspace, tmp_path, server, *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert len(server.requests) - before == len(EVERY_SIGN) - len(done)
    assert keys(rows(tmp_path)) == EVERY_SIGN


def test_processes_share_a_database_without_doing_a_neuron_twice(workspace, tmp_path):
    arguments = ("--explainer.concurrency", "3", "--explainer.cache", "false")
    with openai_server(answers(lambda prompt: "Explanation: words", seconds=0.1)) as server:
        processes = [start(workspace, tmp_path, server, *arguments) for _ in range(2)]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        assert len(asked(server)) == len(EVERY_SIGN)
    assert keys(rows(tmp_path)) == EVERY_SIGN


def test_interrupt_keeps_what_is_done(workspace, tmp_path):
    with openai_server(answers(lambda prompt: "Explanation: words", seconds=0.05)) as server:
        process = start(workspace, tmp_path, server, "--explainer.concurrency", "2")
        wait_for(lambda: len(server.requests) >= 8, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("interrupted")
    assert 2 <= len(rows(tmp_path)) < len(EVERY_SIGN)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_export(explain, tmp_path, capsys, suffix):
    samples = explain(*TOKEN_TABLE, "--neurons.layers", "[0]")
    out = tmp_path / f"out.{suffix}"
    export([str(tmp_path), "--explanations", str(out)])
    assert f"{len(samples)} explanations are in" in capsys.readouterr().out
    match suffix:
        case "csv":
            with out.open(encoding="utf-8", newline="") as file:
                found = list(csv.DictReader(file))
        case "jsonl":
            found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        case "parquet":
            found = pq.read_table(out).to_pylist()
    assert [(int(row["layer"]), int(row["index"]), row["sign"], row["text"]) for row in found] == [
        (row["layer"], row["neuron"], row["sign"], row["text"]) for row in samples
    ]
    assert {row["provider"] for row in found} == {"token_table"}


def test_export_refuses_what_it_cannot_write(explain, tmp_path):
    with pytest.raises(JaxplainError, match="there are no explanations at"):
        export([str(tmp_path), "--explanations", str(tmp_path / "a.csv")])
    explain(*TOKEN_TABLE, "--neurons.layers", "[0]")
    with pytest.raises(JaxplainError, match=r"must end in \.parquet, \.jsonl, \.csv"):
        export([str(tmp_path), "--explanations", str(tmp_path / "a.xlsx")])
    with pytest.raises(JaxplainError, match="cannot be written"):
        export([str(tmp_path), "--explanations", str(tmp_path / "none" / "a.csv")])
    assert not (tmp_path / "none").exists()


BAD = [
    ((), "explainer"),
    (("--explainer.provider", "local"), "explainer.model is None; name the model"),
    (
        ("--explainer.provider", "gemini", "--explainer.model", "m"),
        "GEMINI_API_KEY or GOOGLE_API_KEY is not set",
    ),
    (("--explainer.provider", "openai", "--explainer.model", "m"), "OPENAI_API_KEY is not set"),
    (
        ("--explainer.provider", "local", "--explainer.model", "/none"),
        "explainer.model is '/none', but there is no",
    ),
    ((*TOKEN_TABLE, "--explainer.model", "m"), "uses no model, so leave it out"),
    ((*TOKEN_TABLE, "--neurons.layers", "[1]"), "neurons.layers names layer 1, but the store holds 2 layers"),
    ((*TOKEN_TABLE, "--neurons.indices", "[12]"), "neurons.indices names neuron 12"),
    ((*TOKEN_TABLE, "--neurons.layers", "1:2"), "none of those chosen is in the store"),
    ((*TOKEN_TABLE, "--neurons.layers", "first"), "write a range as start:stop"),
    ((*TOKEN_TABLE, "--neurons.count", "3"), "give neurons.by and neurons.count together"),
    ((*TOKEN_TABLE, "--neurons.count", "99", "--neurons.by", "random"), "but 24 neurons are there"),
    ((*TOKEN_TABLE, "--split", "valid"), "the store has no split 'valid'; it has train"),
    ((*TOKEN_TABLE, "--store", "/nowhere"), "there is no store at /nowhere"),
    ((*TOKEN_TABLE, "--signs", "[max, max]"), "name max, min or both, and none twice"),
    ((*TOKEN_TABLE, "--prompt.ranks", "0-20", "--prompt.style", "highlighted"), None),
    ((*TOKEN_TABLE, "--promt.style", "highlighted"), "did you mean prompt.style?"),
    (
        ("--explainer.provider", "openai", "--explainer.model", "m", "--explainer.budget.max_cost_usd", "1"),
        "add explainer.prices for m",
    ),
    (
        (
            "--explainer.provider",
            "openai",
            "--explainer.model",
            "m",
            "--explainer.base_url",
            "http://a:b@c/v1",
        ),
        "put the key into the environment",
    ),
    (("--explainer.provider", "openai", "--explainer.model", "m", "--explainer.mode", "batch"), "use online"),
    ((*TOKEN_TABLE, "--output", "/proc/none"), "cannot be made"),
    (
        ("--explainer.provider", "openai", "--explainer.model", "m", "--explainer.base_url", ""),
        "begin it with",
    ),
    ((*TOKEN_TABLE, "--explainer.parameters", "{n: 3}"), "explainer.parameters.n is 3; the budget"),
    ((*TOKEN_TABLE, "--explainer.parameters", "{max_tokens: 9}"), "use sampling.max_tokens"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_bad_input(explain, monkeypatch, arguments, sentence):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    if sentence is None:  # token tables look at no ranks
        explain(*arguments)
        return
    with pytest.raises(JaxplainError, match=re.escape(sentence)) as error:
        explain(*arguments)
    assert "\n" not in str(error.value)


def test_failed_samples_end_in_a_sentence_and_the_reason_is_shown(explain, tmp_path, capsys):
    with (
        openai_server(lambda request, number: client_error(400, "too many tokens")) as server,
        pytest.raises(JaxplainError, match="4 samples failed; run the same command again"),
    ):
        explain(*remote(server), "--neurons.layers", "0", "--neurons.indices", "3:5")
    assert "most often because: 400 from 127.0.0.1: too many tokens" in capsys.readouterr().out
    assert {row["status"] for row in rows(tmp_path)} == {"failed"}


def test_overwrite_asks_again_in_spite_of_the_cache(explain):
    arguments = ("--neurons.layers", "2", "--neurons.indices", "3")
    with openai_server(answers(lambda prompt: "Explanation: words")) as server:
        explain(*remote(server), *arguments)
        explain(*remote(server), *arguments, "--overwrite")
        assert len(server.requests) == 4


def test_explanations_are_read_from_a_folder_that_cannot_be_written_to(explain, tmp_path, monkeypatch):
    explain(*TOKEN_TABLE, "--neurons.layers", "0")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    out = tmp_path / "out.csv"
    export([str(tmp_path), "--explanations", str(out)])
    assert len(out.read_text("utf-8").splitlines()) == 1 + 2 * NEURONS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out.csv"])
    with pytest.raises(JaxplainError, match="cannot be written to; name another folder"):
        explain(*TOKEN_TABLE)


def test_output_that_is_cut_off_by_its_reader(workspace, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxplain.explain", *command(workspace, tmp_path), *TOKEN_TABLE],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=60) == 141


def test_a_password_is_not_repeated(explain):
    address = "https://me:hunter2@host/v1"
    with pytest.raises(JaxplainError) as error:
        explain("--explainer.provider", "openai", "--explainer.model", "m", "--explainer.base_url", address)
    assert "hunter2" not in str(error.value)


def test_missing_kind_is_named(workspace, tmp_path):
    store = tmp_path / "run"
    extract(
        ["--config", str(workspace / "extract.yaml"), "--output", str(store), "--exemplars.kinds", "[max]"]
    )
    with pytest.raises(JaxplainError, match="needs exemplars of kind 'min', but the store holds max"):
        main(["--store", str(store), "--progress", "false", *TOKEN_TABLE])
    main(["--store", str(store), "--progress", "false", *TOKEN_TABLE, "--signs", "[max]"])
    with (
        openai_server(lambda request, number: text("Explanation: x")) as server,
        pytest.raises(JaxplainError, match="kind 'random'"),
    ):
        main(["--store", str(store), *remote(server), "--signs", "[max]", "--prompt.style", "contrastive"])
    # A store that is made again with other sequences is another store.
    extract(
        [
            *("--config", str(workspace / "extract.yaml"), "--output", str(store), "--overwrite"),
            *("--corpus.seed", "1"),
        ]
    )
    with pytest.raises(JaxplainError, match="holds explanations of another store"):
        main(["--store", str(store), "--progress", "false", *TOKEN_TABLE])
    with pytest.raises(JaxplainError, match="holds explanations of another store"):
        jaxplain.open_store(store)["train"].neuron(0, 0).explanations()


@pytest.mark.parametrize("content", [b"", b"no database, and longer than a header of SQLite is" * 9])
def test_a_file_that_is_no_database(explain, tmp_path, content):
    (tmp_path / "explanations.sqlite").write_bytes(content)
    if content:
        with pytest.raises(JaxplainError, match="is no database of explanations that can be used here"):
            explain(*TOKEN_TABLE)
        assert (tmp_path / "explanations.sqlite").read_bytes() == content
    else:
        assert len(explain(*TOKEN_TABLE, "--neurons.layers", "[0]")) == 2 * NEURONS


def test_a_newer_database_is_refused(explain, tmp_path):
    explain(*TOKEN_TABLE, "--neurons.layers", "[0]")
    connection = sqlite3.connect(tmp_path / "explanations.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(JaxplainError, match="of version 99, and this jaxplain reads version 1"):
        explain(*TOKEN_TABLE)


def test_incomplete_store_is_refused(workspace, tmp_path):
    shutil.copytree(workspace / "run" / "exemplars.zarr", tmp_path / "exemplars.zarr.partial")
    root = tmp_path / "exemplars.zarr.partial" / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"].pop("complete")
    root.write_text(json.dumps(content))
    with pytest.raises(JaxplainError, match="is incomplete"):
        main(["--store", str(tmp_path), *TOKEN_TABLE])


def test_prompts_too_long_for_the_local_model(explain, workspace, tmp_path):
    small = tiny.write_model(tmp_path / "small")
    with pytest.raises(
        JaxplainError, match="longer than the 64 tokens that the model reads; use fewer"
    ) as error:
        explain("--explainer.provider", "local", "--explainer.model", str(small))
    assert "0 of the 24 neurons are done, 24 are left" in str(error.value)


def test_help_describes_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for line in ("--explainer.budget.max_cost_usd", "--prompt.resample_few_shot", "US dollars"):
        assert line in out
