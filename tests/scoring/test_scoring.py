"""The command: scores against numpy, what is kept and what is made anew, and every bad input."""

import csv
import dataclasses
import json
import re
import sqlite3

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.configs.finetuning import PairsConfig
from jaxplain.configs.scoring import BootstrapConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.token_means import token_means
from jaxplain.finetune import main as finetune
from jaxplain.score import main
from jaxplain.scoring import scoring
from jaxplain.scoring.report import best_explanations, summarise
from jaxplain.scoring.scoring import ScoredExplanation
from jaxplain.scoring.targets import target_of
from jaxplain.simulators.pairs import is_held_out
from jaxplain.store.explanations import Explanation, open_explanations
from jaxplain.store.scores import Score
from tests import workspace
from tests.explainers.faults import answers
from tests.explainers.openai_server import openai_server
from tests.simulators.test_logprob_free import right_answer

TABLE = {"name": "table", "kind": "token_table"}
METRICS = {
    "correlation",
    "correlation_per_sequence",
    "r2_centred",
    "r2_uncentred",
    "absolute_deviation_explained_mean",
    "absolute_deviation_explained_median",
}


@pytest.fixture
def run(explained, tmp_path):
    """Runs the command on a copy of the explanations, and gives the database's folder."""
    folder = tmp_path / "scored"
    folder.mkdir()
    source = sqlite3.connect(explained / "run" / "explanations.sqlite")
    with sqlite3.connect(folder / "explanations.sqlite") as copy:
        source.backup(copy)
    copy.close()
    source.close()

    def score(*arguments, **fields):
        config = {
            "store": str(explained / "run"),
            "explanations": str(folder),
            "splits": ["valid"],
            "simulators": [TABLE],
            "top": 3,
            "random": 4,
            "neurons": {"layers": [2]},
            "bootstrap": {"resamples": 50},
            "progress": False,
        }
        (tmp_path / "score.yaml").write_text(yaml.safe_dump(config | fields))
        main(["--config", str(tmp_path / "score.yaml"), *map(str, arguments)])
        return folder

    return score


@pytest.fixture(scope="session")
def simulator(explained, tmp_path_factory):
    """A simulator that was finetuned for a few steps."""
    output = tmp_path_factory.mktemp("simulator") / "sim"
    path = output.with_name("finetune.yaml")
    path.write_text(yaml.safe_dump(workspace.finetuning(explained, output, steps=2)))
    finetune(["--config", str(path)])
    return output / "model"


def neuron_of(explained, split="valid", index=3):
    return jaxplain.open_store(explained / "run")[split].neuron(2, index)


def table(folder, name):
    connection = sqlite3.connect(folder / "explanations.sqlite")
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]
    connection.close()
    return rows


def test_scores_are_those_of_real_and_simulated_activations(run, explained):
    folder = run()
    train, valid = neuron_of(explained, "train"), neuron_of(explained)
    for sign, direction in (("max", 1), ("min", -1)):
        means = token_means(train, sign)
        known = dict(zip(means.tokens.tolist(), means.means.tolist(), strict=True))
        strongest = valid.exemplars(sign, limit=3)
        target = target_of(valid, sign, top=3, random=4)
        assert target.sequences[:3] == [e.sequence for e in strongest]
        assert len(target.sequences) == len(set(target.sequences)) == 7
        assert set(target.sequences[3:]) <= {e.sequence for e in valid.exemplars("random")}
        truth, predicted = [], []
        for exemplar in strongest:
            for token, activation in zip(
                exemplar.tokens.tolist(), exemplar.activations.tolist(), strict=True
            ):
                if not np.isnan(activation):
                    truth.append(max(direction * activation, 0))
                    predicted.append(max(known.get(token, direction * train.stats.mean), 0))
        found = {
            (s.metric, s.sequences): s for s in valid.scores(folder) if s.sign == sign and s.split == "valid"
        }
        assert {metric for metric, _ in found} == METRICS
        assert {sequences for _, sequences in found} == {"top+random", "top", "random"}
        one = found["correlation", "top"]
        assert one.value == pytest.approx(np.corrcoef(truth, predicted)[0, 1], abs=2e-3)
        assert one.low < one.value < one.high
        residual = np.sum((np.array(truth) - np.array(predicted)) ** 2)
        assert found["r2_uncentred", "top"].value == pytest.approx(
            1 - residual / np.sum(np.square(truth)), abs=5e-3
        )


def test_the_report_has_what_was_scored(run, capsys):
    folder = run(strips=3)
    said = capsys.readouterr().out
    assert "mean correlation" in said
    assert str(folder / "reports" / "scores.html") in said.replace("\n", "")
    page = (folder / "reports" / "scores.html").read_text()
    assert page.count('<div class="neuron">') == 3
    assert page.count("<b>real</b>") == page.count("<b>table</b>") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    with (folder / "reports" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 * 3 * 6
    assert (folder / "reports" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_explanations_stay_text(run, tmp_path):
    path = tmp_path / "scored" / "explanations.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE samples SET text = '<script>alert(1)</script>' WHERE layer = 2")
    connection.close()
    page = (run() / "reports" / "scores.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_simulations_are_made_once(run, simulator, monkeypatch):
    """A second run needs no model: not even one that is there."""
    finetuned = {"name": "tuned", "kind": "finetuned", "model": str(simulator), "local": {"batch_size": 8}}
    folder = run(simulators=[finetuned, TABLE])
    kept = table(folder, "simulations")
    assert len(kept) == 2 * 24 * 7
    first = {
        (r["explanation"], r["metric"], r["sequences"], r["name"]): r["value"]
        for r in table(folder, "scores")
    }

    from jaxplain.scoring import scoring

    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(scoring, "open_simulator", fail)
    run(simulators=[finetuned, TABLE])
    again = {
        (r["explanation"], r["metric"], r["sequences"], r["name"]): r["value"]
        for r in table(folder, "scores")
    }
    assert again == first
    monkeypatch.undo()
    run(simulators=[finetuned | {"name": "renamed"}], top=4)
    # One more of the strongest, and another random one where that was among them.
    assert 2 * 24 * 7 + 12 < len(table(folder, "simulations")) <= 2 * 24 * 7 + 2 * 24


def test_simulations_need_not_be_kept(run):
    folder = run(keep_simulations=False)
    assert table(folder, "simulations") == []
    assert len(table(folder, "scores")) == 24 * 3 * 6


def test_what_is_about_an_explanation_goes_with_it(run):
    folder = run()
    with open_explanations(folder / "explanations.sqlite", fingerprint=None) as _:
        pass
    with sqlite3.connect(folder / "explanations.sqlite") as connection:
        connection.execute("DELETE FROM samples WHERE neuron < 6")
    connection.close()
    left = {row["id"] for row in table(folder, "samples")}
    for name in ("simulations", "scores"):
        assert {row["explanation"] for row in table(folder, name)} <= left
        assert table(folder, name)


@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_calibration_is_fitted_on_its_own_split(run, method, explained):
    folder = run(calibration={"method": method, "split": "test"})
    splits = {row["split"] for row in table(folder, "simulations")}
    assert splits == {"valid", "test"}
    assert {(row["split"], row["calibration"]) for row in table(folder, "scores")} == {("valid", method)}
    if method == "linear":
        found = [s for s in neuron_of(explained).scores(folder) if s.sign == "max"]
        plain = run(calibration={"method": "none"})
        raw = [s for s in neuron_of(explained).scores(plain) if s.sign == "max" and s.calibration == "none"]
        of = {(s.metric, s.sequences): s.value for s in found}
        for score in raw:
            if score.metric == "correlation":
                sign = 1 if of[score.metric, score.sequences] * score.value > 0 else -1
                assert of[score.metric, score.sequences] == pytest.approx(sign * score.value, abs=1e-6)


def test_an_output_that_cannot_be_made_is_found_before_any_work(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JaxplainError, match="which cannot be made: Not a directory"):
        run(output=str(tmp_path / "file" / "reports"))
    with sqlite3.connect(tmp_path / "scored" / "explanations.sqlite") as database:
        assert not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'simulations'").fetchall()


def test_an_explanation_that_calibration_cannot_be_fitted_for_costs_the_others_nothing(run, monkeypatch):
    folder = run(calibration={"method": "none"})
    with sqlite3.connect(folder / "explanations.sqlite") as database:
        (lost,) = database.execute("SELECT min(explanation) FROM simulations").fetchone()
    predicted = scoring._Run._predicted

    def without(self, explanation, number, split):
        found, failed = predicted(self, explanation, number, split)
        return (np.full_like(found, np.nan), failed) if explanation.id == lost else (found, failed)

    monkeypatch.setattr(scoring._Run, "_predicted", without)
    rows = table(run(calibration={"method": "linear", "split": "test"}), "scores")
    assert {row["calibration"] for row in rows} >= {"linear"}
    for row in rows:
        if row["calibration"] == "linear":
            missing = row["explanation"] == lost
            assert (row["reason"] or "").startswith("calibration is 'linear'") == missing
            assert not missing or row["value"] is None


def test_only_held_out_neurons(run, simulator, tmp_path):
    folder = run("--neurons.held_out_of", simulator, "--neurons.layers", "all")
    pairs = PairsConfig(**workspace.finetuning(tmp_path, tmp_path)["pairs"])
    wanted = {
        (r["layer"], r["neuron"])
        for r in table(folder, "samples")
        if is_held_out(r["layer"], r["neuron"], pairs)
    }
    ids = {row["explanation"] for row in table(folder, "scores")}
    scored = {(row["layer"], row["neuron"]) for row in table(folder, "samples") if row["id"] in ids}
    assert scored == wanted
    assert scored


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"splits": ["nowhere"]}, "the store has no split 'nowhere'"),
        ({"splits": ["train"]}, "leave out train, which was explained"),
        ({"neurons": {"layers": [1]}}, "neurons.layers names layer 1"),
        ({"providers": ["gemini"]}, "there are no explanations of the chosen neurons"),
        ({"calibration": {"method": "linear", "split": "valid"}}, "calibrate on a split that is not scored"),
        ({"simulators": []}, "list one or more, or judges, with different names"),
        ({"simulators": [TABLE, TABLE]}, "list one or more, or judges, with different names"),
        ({"simulators": [{"name": "x", "kind": "finetuned"}]}, "finetuned and prompted simulators need one"),
        ({"simulators": [{"name": "x", "kind": "logprob_free"}]}, "kind logprob_free needs it"),
        (
            {"simulators": [{"name": "x", "kind": "finetuned", "model": "/nowhere"}]},
            "simulators.model is '/nowhere', but there is no such folder",
        ),
        ({"explanations": "/nowhere"}, "there are no explanations at /nowhere"),
        ({"neurons": {"held_out_of": "/nowhere"}}, "neurons.held_out_of is '/nowhere'"),
        ({"top": 0, "random": 0}, "take some top or random sequences"),
    ],
)
def test_bad_input_is_one_sentence(run, fields, said):
    with pytest.raises(JaxplainError, match=said) as raised:
        run(**fields)
    assert "\n" not in str(raised.value)


def test_an_explanation_of_a_neuron_that_the_store_lacks_is_not_scored(run, tmp_path):
    with sqlite3.connect(tmp_path / "scored" / "explanations.sqlite") as connection:
        connection.execute("UPDATE samples SET neuron = neuron + 900 WHERE layer = 2")
    connection.close()
    with pytest.raises(JaxplainError, match="there are no explanations of the chosen neurons"):
        run()


def scored(number, value, split="valid", *, index=0, provider="local"):
    explanation = Explanation(
        id=number, layer=0, index=index, sign="max", text=f"text {number}", sample=0,
        provider=provider, model=None, style="highlighted", recipe=1,
    )  # fmt: skip
    score = Score(
        explanation=number, sign="max", simulator="s", split=split, sequences="top+random",
        metric="correlation", calibration="none", value=value, reason=None, low=np.nan, high=np.nan,
    )  # fmt: skip
    return ScoredExplanation(
        explanation=explanation, simulator="s", split=split, scores=[score], resampled=np.full(20, value)
    )


def test_the_best_is_chosen_on_one_split_and_reported_on_another():
    given = [scored(1, np.nan), scored(1, 0.99, "test"), scored(2, 0.3), scored(2, 0.1, "test")]
    given += [scored(3, 0.2), scored(3, 0.9, "test"), scored(4, np.nan, index=1)]
    (best,) = best_explanations(given, choose_on="valid", report_on="test")
    assert (best.explanation, best.chosen_by, best.reported) == (2, 0.3, 0.1)


def test_rows_are_means_by_provider_and_over_all():
    given = [
        scored(1, 0.2),
        scored(2, 0.4, index=1),
        scored(3, np.nan, index=2),
        scored(4, 0.9, provider="openai"),
    ]
    rows = {row.provider: row for row in summarise(given, BootstrapConfig(resamples=20))}
    assert rows["local"].correlation == pytest.approx(0.3)
    assert (rows["local"].explanations, rows["local"].missing, rows["local"].neurons) == (3, 1, 3)
    assert rows["local"].low <= 0.3 <= rows["local"].high
    assert rows["all"].correlation == pytest.approx(0.5)
    assert (rows["all"].explanations, rows["all"].neurons) == (4, 3)
    assert dataclasses.asdict(rows["openai"])["top"] != dataclasses.asdict(rows["openai"])["top"]


def judge_of(server, test="detection"):
    model = {"provider": "openai", "model": "m", "base_url": server.url, "retries": 0}
    return {"name": "judge", "test": test, "model": model, "firing": 3, "silent": 2, "threshold": 0.5}


def questions_in(prompt):
    return re.findall(r"^Excerpt \d+: (.*)$", prompt, re.MULTILINE)


@pytest.mark.parametrize("test", ["detection", "fuzzing"])
def test_judges_score_too(run, test, explained, capsys, tmp_path, monkeypatch):
    """A judge that always says yes is right about every true question, and about no other."""
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))

    def yes(prompt):
        return json.dumps({"verdicts": [1] * len(questions_in(prompt))})

    with openai_server(answers(yes)) as server:
        folder = run(simulators=[], judges=[judge_of(server, test)])
        asked = len(server.requests)
        run(simulators=[], judges=[judge_of(server, test)])
        assert len(server.requests) == asked  # the second run's replies come from the cache
    found = {row["metric"]: row for row in table(folder, "scores") if row["value"] is not None}
    assert found[f"{test}_balanced_accuracy"]["value"] == 0.5
    assert found[f"{test}_recall"]["value"] == 1.0
    assert found[f"{test}_true_negative_rate"]["value"] == 0.0
    assert f"{test} by judge: mean balanced accuracy 0.500" in capsys.readouterr().out
    assert {s.metric for s in neuron_of(explained).scores(folder)} >= {f"{test}_precision"}


def test_what_a_judge_does_not_answer_is_no_score(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    with openai_server(answers(lambda _: "yes, all of them")) as server:
        folder = run(simulators=[], judges=[judge_of(server)])
        questions = sum(len(questions_in(request.prompt)) for request in server.requests)
    assert {row["value"] for row in table(folder, "scores")} == {None}
    assert all(row["reason"] for row in table(folder, "scores"))
    assert f"judge: {questions} questions without an answer" in capsys.readouterr().out


def test_a_model_that_writes_json_simulates_too(run, tmp_path, monkeypatch, capsys):
    """Every third reply is out of step: those sequences are missing, and asked again by the next run."""
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    replies = []

    def reply(prompt):
        replies.append(prompt)
        return right_answer(prompt) if len(replies) % 3 else '{"activations": []}'

    def simulator_of(server):
        remote = {
            "provider": "openai",
            "model": "m",
            "base_url": server.url,
            "concurrency": 1,
            "cache": False,
        }
        return {"name": "json", "kind": "logprob_free", "remote": remote}

    with openai_server(answers(reply)) as server:
        folder = run(simulators=[simulator_of(server)], neurons={"layers": [2], "indices": [3]})
        kept = table(folder, "simulations")
        assert len(kept) == len(replies) == 14
        failed = [row for row in kept if row["expected"] is None]
        assert len(failed) == 4
        assert {row["reply"] for row in failed} == {'{"activations": []}'}
        assert "json: 4 questions without an answer" in capsys.readouterr().out
        run(simulators=[simulator_of(server)], neurons={"layers": [2], "indices": [3]})
        assert len(replies) == 18
    assert sum(row["expected"] is None for row in table(folder, "simulations")) < 4
