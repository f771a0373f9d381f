"""A tiny Mixtral all the way: extracted, explained by token tables, scored, shown, exported, learned from."""

import csv
import json
import sqlite3
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

import jaxplain
from jaxplain.configs.finetuning import PairsConfig
from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import main as explain
from jaxplain.explainers.token_means import token_means
from jaxplain.export import main as export
from jaxplain.extract import main as extract
from jaxplain.score import main as score
from jaxplain.show import main as show
from jaxplain.simulators.pairs import is_held_out, make_dataset
from jaxplain.simulators.readout import Readout
from jaxplain.store.explanations import open_explanations
from jaxplain.store.neuron_id import neuron_of
from tests import families, tiny

EXPERTS, INDICES = (0, 1, 3), (2, 5)
CHOSEN = ["--neurons.experts", json.dumps(EXPERTS), "--neurons.indices", json.dumps(INDICES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    tiny.write_model(folder / "model", families.MIXTRAL | {"max_position_embeddings": 256})
    tiny.write_corpus(folder / "docs.jsonl", 150)
    run = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": 16,
            "max_sequences": 40,
            "splits": {"train": 0.4, "valid": 0.3, "test": 0.3},
        },
        "exemplars": {"k": 10, "splits": ["train", "valid", "test"]},
        "run": {"batch_size": 8, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(run))
    extract(["--config", str(folder / "extract.yaml")])
    table = ("--explainer.provider", "token_table", "--prompt.tokens", "3")
    explain(["--store", str(folder / "run"), "--progress", "false", *table, *CHOSEN])
    scoring = {
        "store": str(folder / "run"),
        "simulators": [{"name": "table", "kind": "token_table"}],
        "splits": ["valid", "test"],
        "top": 4,
        "random": 4,
        "strips": 2,
        "progress": False,
    }
    (folder / "score.yaml").write_text(yaml.safe_dump(scoring))
    score(["--config", str(folder / "score.yaml")])
    return folder


@pytest.fixture(scope="module")
def explanations(folder):
    with open_explanations(folder / "run" / "explanations.sqlite") as database:
        return database.explanations()


def test_every_chosen_neuron_is_explained(explanations):
    wanted = {(layer, expert, index) for layer in range(3) for expert in EXPERTS for index in INDICES}
    assert {neuron_of(e) for e in explanations} == wanted
    assert len({(neuron_of(e), e.sign) for e in explanations}) == len(explanations) >= 1.8 * len(wanted)
    texts = {neuron_of(e): e.text for e in explanations if e.sign == "max"}
    assert len(set(texts.values())) > len(texts) / 2, "experts differ"


def test_explanations_and_scores_are_those_of_the_expert(folder, explanations):
    split = jaxplain.open_store(folder / "run")["valid"]
    for expert in EXPERTS:
        neuron = split.neuron(1, 5, expert=expert)
        found = neuron.explanations()
        assert found == [e for e in explanations if neuron_of(e) == (1, expert, 5)]
        scores = neuron.scores()
        assert {s.explanation for s in scores} == {e.id for e in found}
        assert {s.split for s in scores} == {"valid", "test"}
    assert split.neuron(1, 5, expert=2).explanations() == []
    assert split.neuron(1, 5, expert=2).scores() == []


def test_a_second_run_has_nothing_to_do(folder, capsys):
    table = ("--explainer.provider", "token_table", "--prompt.tokens", "3")
    arguments = ["--store", str(folder / "run"), "--progress", "false", *table, *CHOSEN]
    explain(arguments)
    assert "18 of 18 neurons are complete (nothing new)" in capsys.readouterr().out
    before = rows(folder, "samples")
    explain([*arguments, "--overwrite"])
    said = capsys.readouterr().out
    assert "layer 0, expert 0, neuron 2" in said
    assert len(rows(folder, "samples")) == len(before)
    score(["--config", str(folder / "score.yaml")])


def rows(folder, table):
    with closing(sqlite3.connect(folder / "run" / "explanations.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]


def test_token_tables_predict_what_experts_do(folder, explanations):
    """In texts that the table was not made from, better than chance, so that it is the right neuron's."""
    found = [
        r for r in rows(folder, "scores") if (r["metric"], r["sequences"]) == ("correlation", "top+random")
    ]
    values = [r["value"] for r in found if r["value"] is not None]
    assert len(found) == 2 * len(explanations)
    assert len(values) > len(found) / 2
    assert np.mean(values) > 0.15


def test_the_report_names_experts(folder):
    page = (folder / "run" / "reports" / "scores.html").read_text()
    assert "<p>Layer 0, expert 0, neuron 2 +" in page
    with (folder / "run" / "reports" / "scores.csv").open() as file:
        assert {int(row["expert"]) for row in csv.DictReader(file)} == set(EXPERTS)


def test_show_has_explanations(folder, capsys):
    show([str(folder / "run"), "--layer", "1", "--expert", "3", "--neuron", "5", "--limit", "1"])
    said = capsys.readouterr().out
    assert said.count("layer 1, expert 3, neuron 5") >= 2
    assert "tokens such as" in said


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_export(folder, explanations, tmp_path, suffix):
    out = tmp_path / f"out.{suffix}"
    export([str(folder / "run"), "--explanations", str(out)])
    if suffix == "parquet":
        found = pq.read_table(out).to_pylist()
    elif suffix == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        with out.open() as file:
            found = list(csv.DictReader(file))
    assert [(int(r["layer"]), int(r["expert"]), int(r["index"])) for r in found] == [
        neuron_of(e) for e in explanations
    ]


def test_token_means_weigh_random_sequences_by_the_tokens_that_they_stand_for(folder):
    """However many of the sequences have tokens for the expert."""
    split = jaxplain.open_store(folder / "run")["train"]
    neuron = split.neuron(0, 2, expert=1)
    extreme = neuron.exemplars("max")
    inside = {e.sequence for e in extreme}
    others = [e for e in neuron.exemplars("random") if e.sequence not in inside]
    counted = [sum((~np.isnan(e.activations)).sum() for e in group) for group in (extreme, others)]
    share = (neuron.stats.count - counted[0]) / counted[1]
    assert 1 < share < 40
    totals = {}
    for weight, group in ((1.0, extreme), (share, others)):
        for e in group:
            for token, act in zip(e.tokens.tolist(), e.activations.tolist(), strict=True):
                if not np.isnan(act):
                    total = totals.setdefault(token, [0.0, 0.0, 0])
                    totals[token] = [total[0] + weight * act, total[1] + weight, total[2] + 1]
    means = token_means(neuron, "max")
    for token, mean in zip(means.tokens.tolist(), means.means.tolist(), strict=True):
        total, weight, count = totals[token]
        expected = (count * total / weight + max(neuron.stats.mean, 0.0)) / (count + 1)
        assert mean == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_simulators_learn_from_experts(folder, explanations):
    split = jaxplain.open_store(folder / "run")["train"]
    config = PairsConfig(top=2, random=2, held_out_neurons=0.3, held_out_documents=0.3)
    readout = Readout(ReadoutConfig(), AutoTokenizer.from_pretrained(folder / "model"))
    dataset = make_dataset(explanations, split, config, readout, longest_row=256)
    assert sum(dataset.neurons) <= 18
    held_out = {
        expert: {index for index in range(24) if is_held_out(0, index, config, expert=expert)}
        for expert in range(4)
    }
    assert len({frozenset(indices) for indices in held_out.values()}) == 4, "drawn for every expert"
    shares = [len(indices) / 24 for indices in held_out.values()]
    assert 0.1 < np.mean(shares) < 0.5


def test_an_index_alone_is_refused_everywhere(folder):
    run = str(folder / "run")
    with pytest.raises(JaxplainError, match="mixture of experts"):
        explain(["--store", run, "--explainer.provider", "token_table", "--neurons.indices", "[2]"])
    with pytest.raises(JaxplainError, match="mixture of experts"):
        score(["--config", str(folder / "score.yaml"), "--neurons.indices", "[2]"])
    with pytest.raises(JaxplainError, match="mixture of experts"):
        show([run, "--layer", "0", "--neuron", "2"])
    with pytest.raises(JaxplainError, match="mixture of experts"):
        jaxplain.open_store(run)["train"].neuron(0, 2)
