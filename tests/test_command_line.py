import contextlib
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxplain
from jaxplain.__main__ import main as overview
from jaxplain.commands import config_parser, parse_config
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.configs.scoring import ScoreConfig
from jaxplain.errors import JaxplainError
from jaxplain.guide import COMMANDS, EXIT_STATUSES
from jaxplain.summary import summarised
from tests.store.formats import stores

PACKAGE = Path(jaxplain.__file__).parent
ROOT = PACKAGE.parent


class Options:
    def __init__(self, *, quiet=False, json=False):
        self.quiet, self.json = quiet, json


def main_of(command):
    return importlib.import_module(f"jaxplain.{command}").main


def test_every_command_is_in_the_guide():
    files = [path.stem for path in PACKAGE.glob("*.py") if "\n    run(main" in path.read_text("utf-8")]
    assert sorted(files) == sorted([*COMMANDS, "__main__"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(command)(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    guide = COMMANDS[command]
    assert guide.does in said.replace("\n", " ")
    assert f"example:\n  python -m jaxplain.{command} {guide.example}\nthen: {guide.then}\n" in said
    for flag in ("--quiet", "--json", "--traceback"):
        assert len(re.findall(rf"^  {flag} ", said, re.MULTILINE)) == 1
    for status, meaning in EXIT_STATUSES.items():
        assert re.search(rf"^  {status} +{re.escape(meaning)}$", said, re.MULTILINE)
    assert len(said.split("\n\n")[0].splitlines()) < 16, "usage, in short"


def test_overview(capsys):
    overview([])
    said = capsys.readouterr().out
    for command, guide in COMMANDS.items():
        assert (
            f"\n{command:<9} {guide.does}\n          $ python -m jaxplain.{command} {guide.example}" in said
        )
        assert f"then: {guide.then}\n" in said
    with pytest.raises(JaxplainError, match=r"takes no 'extrcat'; call python -m jaxplain\.extract\."):
        overview(["extrcat", "--config", "x"])
    with pytest.raises(JaxplainError, match=r"takes no 'zzz'; the commands are fetch, plan, extract"):
        overview(["zzz"])


def test_files_of_examples_exist():
    named = [re.findall(r"configs/\S+", guide.example) for guide in COMMANDS.values()]
    assert sum(map(len, named)) >= 4
    for path in itertools.chain(*named):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("command", ["fetch", "merge", "show", "view", "export", "ingest"])
def test_missing_arguments_are_one_sentence(command):
    with pytest.raises(JaxplainError, match=r"^the following arguments are required: .*; see --help\.$"):
        main_of(command)([])


@pytest.mark.parametrize(
    ("kind", "command", "required", "shown"),
    [
        (
            ExtractConfig,
            "extract",
            ["--subject.id=x", '--corpus.sources=[{"preset": "fineweb"}]', "--output=o"],
            lambda config: config.run.progress,
        ),
        (
            ScoreConfig,
            "score",
            ["--store=x", '--simulators=[{"name": "a", "kind": "token_table"}]'],
            lambda config: config.progress,
        ),
    ],
)
def test_quiet_shows_no_bars(kind, command, required, shown):
    assert shown(parse_config(config_parser(kind, command), kind, required)[0])
    config, options = parse_config(config_parser(kind, command), kind, [*required, "--quiet"])
    assert not shown(config)
    assert options.quiet


def test_flags_stay_out_of_configs(tmp_path):
    (tmp_path / "c.yaml").write_text("json: true\nstore: x\nsimulators: [{name: a, kind: token_table}]\n")
    with pytest.raises(JaxplainError, match="--json is for the command line; take it out"):
        parse_config(config_parser(ScoreConfig, "score"), ScoreConfig, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("options", "text", "has_json"),
    [
        (Options(), True, False),
        (Options(quiet=True), False, False),
        (Options(json=True), False, True),
        (Options(quiet=True, json=True), False, True),
    ],
)
def test_what_is_said(options, text, has_json, capsys):
    with summarised(options) as summary:
        print("text")
        print("a warning", file=sys.stderr)
        summary |= {"mean": np.float32(0.5), "none": math.nan, "at": Path("a") / "b", "N": np.arange(2)}
    said = capsys.readouterr()
    assert said.err == "a warning\n"
    assert ("text" in said.out) == text
    if has_json:
        assert json.loads(said.out) == {"mean": 0.5, "none": None, "at": "a/b", "N": [0, 1]}
    else:
        assert "mean" not in said.out


def test_what_was_done_before_an_error_is_summed_up(capsys):
    with contextlib.suppress(JaxplainError), summarised(Options(json=True)) as summary:
        summary["failed"] = 3
        raise JaxplainError("3 samples failed")
    assert json.loads(capsys.readouterr().out) == {"failed": 3}
    with pytest.raises(JaxplainError), summarised(Options(json=True)):
        raise JaxplainError("nothing was done")
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.write(tmp_path_factory.mktemp("store") / "run")


def test_a_neuron_as_json(store, capsys):
    layer, index = stores.names(store["train"])[0]
    place = ["--layer", str(layer), "--neuron", str(index), "--split", "train", "--limit", "2"]
    main_of("show")([store.zarr_path, *place, "--json"])
    shown = json.loads(capsys.readouterr().out)
    neuron = store["train"].neuron(layer, index)
    assert (shown["split"], shown["layer"], shown["index"], shown["kind"]) == ("train", layer, index, "max")
    assert shown["statistics"]["mean"] == neuron.stats.mean
    for ours, theirs in zip(shown["exemplars"], neuron.exemplars(limit=2), strict=True):
        assert ours["text"] == theirs.text == "".join(ours["token_strings"])
        acts = np.array(ours["activations"], np.float32)
        np.testing.assert_array_equal(acts, theirs.activations)
        assert int(ours["document"], 16) == theirs.document


def test_exports_as_json(store, tmp_path, capsys):
    main_of("export")([store.zarr_path, str(tmp_path / "o"), "--format", "parquet", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["format"] == "parquet"
    assert made["path"] == str(tmp_path / "o")
    assert made["rows"]["exemplars"] > 0
    main_of("export")([store.zarr_path, str(tmp_path / "p"), "--format", "parquet", "--quiet"])
    assert capsys.readouterr() == ("", "")


def test_a_process_ends_as_documented(tmp_path):
    command = [sys.executable, "-m", "jaxplain.show", str(tmp_path), "--layer", "0", "--neuron", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch(r"error: there is no store at .*\n", ended.stderr)
    ended = subprocess.run([sys.executable, "-m", "jaxplain"], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "then: " in ended.stdout
