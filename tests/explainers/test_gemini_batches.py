"""The batch API through the real client library, against a local server: faults, restarts, and the budget."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest

from jaxplain.configs.explanation import BudgetConfig, PriceConfig, PromptConfig, SamplingConfig
from jaxplain.explain import explain
from jaxplain.explainers import gemini_batches
from tests.explainers.faults import (
    answers,
    blank,
    client_error,
    cut_off,
    dropped,
    hang,
    malformed,
    rate_limited,
    refused,
    server_error,
    text,
    wrong_shape,
)
from tests.explainers.gemini_server import gemini_server
from tests.explainers.remote_runs import (
    FINE,
    KEYS,
    SECRET,
    both_explanations_for,
    explanation_for,
    query,
    refusal,
    samples_of,
    spent,
    subject_of,
)

# The most that a request can cost in the tests of the budget lies between these, at half price.
PRICE = PriceConfig(input=10.0, output=1000.0)
LEAST_DOLLARS, MOST_DOLLARS = 0.050, 0.060
SAMPLING = SamplingConfig(max_tokens=100)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(gemini_batches, "_FIRST_POLL", 0.002)


@pytest.fixture
def config(config):
    """The same for batches of both signs."""

    def make(server, **changes):
        return config("gemini", server, **{"neurons": 6, "signs": ("max", "min"), "mode": "batch"} | changes)

    return make


def statuses(wanted):
    return Counter(sample["status"] for sample in samples_of(wanted))


def assert_all_explained(wanted, neurons=6):
    found = samples_of(wanted)
    assert [s["text"] for s in found] == [f"{n} {sign}" for n in range(neurons) for sign in ("max", "min")]
    assert query(wanted, "SELECT * FROM batches") == []


def creations(server):
    return [request for request in server.requests if "batchGenerateContent" in request.path]


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("echo", [True, False], ids=["metadata", "no metadata"])
def test_end_to_end(echo, config):
    with gemini_server(FINE, batch_polls=3) as server:
        server.echo_metadata = echo
        wanted = config(server, prices={"m": PRICE}, parameters={"top_k": 7})
        explain(wanted)
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == len(creations(server)) == 1
    assert len(server.requests) == 1 + 3
    (job,) = server.jobs.values()
    sent = [item["request"]["generationConfig"] for item in job["requests"]]
    assert len({settings["seed"] for settings in sent}) == 12
    assert all(settings["topK"] == 7 for settings in sent)
    assert "systemInstruction" in job["requests"][0]["request"]
    cost = (100 * PRICE.input + 10 * PRICE.output) / 1e6 / 2
    assert [s["cost_usd"] for s in samples_of(wanted)] == pytest.approx([cost] * 12)
    assert spent(wanted) == (12, pytest.approx(12 * cost))


def test_results_out_of_order(config):
    with gemini_server(FINE) as server:
        server.shuffle = True
        wanted = config(server, neurons=20)
        explain(wanted)
    assert_all_explained(wanted, 20)


def test_several_jobs(config, monkeypatch):
    with gemini_server(FINE) as server:
        wanted = config(server, batch_requests=5)
        explain(wanted)
        assert [len(job["requests"]) for job in server.jobs.values()] == [5, 5, 2]
        assert_all_explained(wanted)
        # Nor do jobs grow too large.
        size = len(json.dumps(server.inlined[0].body["contents"]))
        monkeypatch.setattr(gemini_batches, "_MOST_JOB_BYTES", 4 * (500 + 900 + size))
        wanted = config(server, output="other")
        explain(wanted)
    sizes = [len(job["requests"]) for job in server.jobs.values()][3:]
    assert sum(sizes) == 12
    assert 1 < len(sizes) < 12
    assert_all_explained(wanted)


ITEMS = {
    "0 max": (server_error(500), "failed", "(code 13)"),
    "0 min": (rate_limited(retry_delay=3), "failed", "Rate limit reached (code 8)"),
    "1 max": (client_error(400, "Too long.", code="TOO_LONG"), "failed", "Too long (code 3)"),
    "1 min": (dropped(), "failed", "left it out"),
    "2 max": (wrong_shape(), "failed", "not of the protocol"),
    "2 min": (refused(), "refused", "prompt blocked: SAFETY"),
    "3 max": (refused(in_candidate=True), "refused", "finish reason SAFETY"),
    "3 min": (blank(), "unparsable", "explanation is empty"),
}


def test_items_have_outcomes_of_their_own(config):
    def plan(request, number):
        outcome = ITEMS.get(subject_of(request.prompt))
        return outcome[0] if outcome else FINE(request, number)

    with gemini_server(plan) as server:
        wanted = config(server)
        explain(wanted)
        for sample in samples_of(wanted):
            _, status, detail = ITEMS.get(f"{sample['neuron']} {sample['sign']}", (None, "explained", None))
            assert sample["status"] == status
            assert detail in sample["detail"] if detail else sample["detail"] is None
        assert query(wanted, "SELECT * FROM batches") == []
        server.plan = FINE
        explain(wanted)
        asked = sorted(subject_of(request.prompt) for request in server.inlined[12:])
        assert asked == ["0 max", "0 min", "1 max", "1 min", "2 max"]
        assert statuses(wanted) == {"explained": 9, "refused": 2, "unparsable": 1}
        assert len(server.jobs) == 2


@pytest.mark.parametrize("state", ["FAILED", "EXPIRED", "CANCELLED"])
def test_failed_jobs_are_submitted_anew_by_the_next_run(state, config):
    with gemini_server(FINE) as server:
        server.fail_next_batch = state
        wanted = config(server, prices={"m": PRICE})
        explain(wanted)
        assert statuses(wanted) == {"failed": 12}
        assert {s["detail"] for s in samples_of(wanted)} == {f"the batch job ended as JOB_STATE_{state}"}
        assert spent(wanted) == (12, 0), "it costs nothing"
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == 2


@pytest.mark.parametrize("fault", [server_error(503), dropped(), cut_off(), malformed(), rate_limited(0.001)])
def test_polling_survives_what_passes(fault, config):
    with gemini_server(FINE, calls=lambda _, n: fault if n in (1, 2, 4) else None) as server:
        wanted = config(server)
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == 1


def test_polling_survives_a_server_that_hangs(config):
    with gemini_server(FINE, calls=lambda _, n: hang(10) if n == 1 else None) as server:
        wanted = config(server, timeout_seconds=0.5)
        explain(wanted)
    assert_all_explained(wanted)


def test_polling_gives_up_and_the_next_run_finds_the_job(config):
    with gemini_server(FINE, calls=lambda _, n: server_error(500) if n else None) as server:
        wanted = config(server)
        assert "jobs that were submitted are found again" in refusal(wanted)
        assert len(server.requests) == 1 + 3
        assert samples_of(wanted) == []
        noted = [row["name"] for row in query(wanted, "SELECT name FROM batches")]
        assert noted == list(server.jobs), "by its name, without a look through all of the account's jobs"
        server.calls = None
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == 1


LOST = {"dropped": dropped(), "cut off": cut_off(), "malformed": malformed(), "hang": hang(10)}


@pytest.mark.parametrize("name", LOST)
def test_a_job_whose_creation_was_not_answered_is_found_by_its_label(name, config):
    with gemini_server(FINE, calls=lambda _, n: LOST[name] if n == 0 else None) as server:
        wanted = config(server, timeout_seconds=0.5 if name == "hang" else 20.0)
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == len(creations(server)) == 1


def test_a_job_that_did_not_arrive_is_submitted_again(config):
    with gemini_server(FINE, calls=lambda _, n: server_error(500) if n == 0 else None) as server:
        wanted = config(server)
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == 1
    assert len(creations(server)) == 2


def test_a_job_that_is_refused_ends_the_run_and_costs_nothing(config):
    with gemini_server(FINE, calls=lambda *_: client_error(400, "No batches for you.")) as server:
        wanted = config(server, prices={"m": PRICE}, budget=BudgetConfig(max_requests=12))
        assert "No batches for you" in refusal(wanted)
        assert spent(wanted) == (0, 0)
        assert query(wanted, "SELECT * FROM batches") == []
        server.calls = None
        explain(wanted)
    assert_all_explained(wanted)


def unname(wanted, label):
    """What a process leaves that dies after noting a job: requests booked, and no name known."""
    with closing(sqlite3.connect(f"{wanted.output}/explanations.sqlite")) as connection:
        connection.execute("UPDATE batches SET name = NULL, label = coalesce(?, label)", (label,))
        connection.commit()


@pytest.mark.parametrize("arrived", [True, False], ids=["submitted", "not submitted"])
def test_a_process_that_died_between_noting_and_submitting(arrived, config):
    with gemini_server(FINE, calls=lambda _, n: server_error(500) if n else None) as server:
        wanted = config(server, prices={"m": PRICE}, budget=BudgetConfig(max_requests=12))
        refusal(wanted)
        before = spent(wanted)
        assert before[0] == 12
        # Under a label that no job has, it did not arrive.
        unname(wanted, None if arrived else "jaxplain-never-sent")
        server.calls = None
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == (1 if arrived else 2)
    # Requests that were never sent count for nothing.
    assert spent(wanted) == (12, pytest.approx(12 * 0.0055))


def test_a_killed_process_finds_its_jobs_again(config, store, tmp_path):
    with gemini_server(FINE, batch_polls=10**9) as server:
        wanted = config(server, batch_requests=5, prices={"m": PRICE})
        command = [sys.executable, "-m", "jaxplain.explain", "--store", str(store), "--progress", "false"]
        command += ["--explainer", json.dumps({"provider": "gemini", "model": "m", "base_url": server.url})]
        command += ["--explainer.mode", "batch", "--explainer.batch_requests", "5"]
        command += ["--explainer.prices", json.dumps({"m": {"input": 10, "output": 1000}})]
        command += ["--explainer.timeout_seconds", "20", "--neurons.indices", "0:6"]
        command += ["--prompt.few_shot", "none", "--output", wanted.output]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "GEMINI_API_KEY": SECRET}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        try:
            wait_until(
                lambda: process.poll() is not None or any(job["polls"] > 0 for job in server.jobs.values())
            )
        finally:
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        assert len(server.jobs) == 3
        assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*.sqlite*"))
        server.batch_polls = 0
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.jobs) == len(creations(server)) == 3
    assert spent(wanted) == (12, pytest.approx(12 * 0.0055))


def test_what_was_read_is_not_lost_with_a_neuron_that_is_not_written(config):
    """A neuron of two jobs is written when both are in; the first job is not forgotten until then."""
    with gemini_server(FINE, batch_polls=1) as server:
        server.calls = lambda request, _: server_error(500) if "job1x" in request.path else None
        wanted = config(server, neurons=3, batch_requests=3, prices={"m": PRICE})
        refusal(wanted)
        assert [(s["neuron"], s["sign"]) for s in samples_of(wanted)] == [(0, "max"), (0, "min")]
        server.calls = None
        explain(wanted)
    assert_all_explained(wanted, 3)
    assert len(server.jobs) == 2
    assert spent(wanted) == (6, pytest.approx(6 * 0.0055))


def test_jobs_of_other_neurons_are_left_alone(config):
    """They are another process's, or of a run over more neurons."""
    with gemini_server(FINE, calls=lambda _, n: server_error(500) if n else None) as server:
        wanted = config(server, prices={"m": PRICE})
        refusal(wanted)
        server.calls = None
        part = config(server, neurons=2, prices={"m": PRICE})
        explain(part)
        assert statuses(part) == {"explained": 4}
        explain(wanted)
        assert_all_explained(wanted)
        assert len(server.jobs) == 1
    assert spent(wanted) == (12, pytest.approx(12 * 0.0055))


def test_only_as_many_requests_as_the_budget_allows_are_submitted(config):
    with gemini_server(FINE) as server:

        def limited(requests):
            return config(server, batch_requests=4, budget=BudgetConfig(max_requests=requests))

        sentence = refusal(limited(7))
        assert "max_requests 7" in sentence
        assert "3 of the 6 neurons are done, 3 are left" in sentence
        assert len(server.inlined) == spent(limited(7))[0] == 7
        refusal(limited(7))
        assert len(server.inlined) == 7
        explain(limited(12))
        assert_all_explained(limited(12))
    assert len(server.inlined) == spent(limited(12))[0] == 12
    asked = Counter(subject_of(request.prompt) for request in server.inlined)
    assert set(asked.values()) == {1}


def test_the_budget_in_dollars_counts_half_the_price(config):
    def plan(request, number):
        return text(explanation_for(request.prompt), output_tokens=SAMPLING.max_tokens)

    with gemini_server(plan) as server:

        def limited(dollars):
            budget = BudgetConfig(max_cost_usd=dollars)
            return config(server, prices={"m": PRICE}, budget=budget, sampling=SAMPLING)

        wanted = limited(3 * MOST_DOLLARS)
        sentence = refusal(wanted)
        assert re.search(r"max_cost_usd 0\.18.*1 of the 6 neurons are done", sentence)
        assert len(server.inlined) == 3
        requests, cost = spent(wanted)
        assert requests == 3
        assert cost == pytest.approx(3 * (100 * PRICE.input + 100 * PRICE.output) / 1e6 / 2)
        assert 3 * MOST_DOLLARS - cost < LEAST_DOLLARS
        explain(limited(10.0))
        assert_all_explained(wanted)


def test_keys_that_the_service_echoes_are_taken_out(config, monkeypatch, tmp_path):
    monkeypatch.setenv(KEYS[1], SECRET)
    with gemini_server(lambda *_: client_error(400, f"Bad key {SECRET}.")) as server:
        wanted = config(server)
        explain(wanted)
        assert statuses(wanted) == {"failed": 12}
        assert all("Bad key [key]" in s["detail"] for s in samples_of(wanted))
        server.calls = lambda *_: client_error(403, f"Bad key {SECRET}.")
        assert "Bad key [key]" in refusal(wanted)
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*.sqlite*"))


def test_prompts_about_both_signs(config):
    with gemini_server(answers(both_explanations_for)) as server:
        wanted = config(server, prompt=PromptConfig(few_shot="none", style="highlighted_both_signs"))
        explain(wanted)
    assert_all_explained(wanted)
    assert len(server.inlined) == 6
