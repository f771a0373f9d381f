"""Runs of many requests to a remote model: all at once, waiting for one another, and ended by one."""

import random
import threading
from collections import Counter

import pytest

from jaxplain.configs.explanation import BudgetConfig, PromptConfig, SamplingConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain
from jaxplain.explainers import remote
from tests.explainers.faults import answers, client_error, faulty, hang, rate_limited, server_error, text
from tests.explainers.remote_runs import (
    ALL_KINDS,
    FINE,
    MOST_TOKENS,
    PRICE,
    both_explanations_for,
    explanation_for,
    number_of,
    refusal,
    samples_of,
    serve,
    spent,
    subject_of,
    write_neurons,
)

# ---- many requests ----


class Meeting:
    """A reply that the server holds back until so many requests have met."""

    kind, status, input_tokens, output_tokens = "", 200, 100, 10

    def __init__(self, barrier, string):
        self._barrier, self.text = barrier, string

    @property
    def seconds(self):
        self._barrier.wait()
        return 0.0


def test_as_many_requests_as_concurrency_are_under_way_at_once(provider, config, tmp_path):
    many = 110  # more than the clients' own limit
    path = write_neurons(tmp_path / "exemplars.zarr", many)
    barrier = threading.Barrier(many, timeout=20)
    with serve(provider, lambda request, _: Meeting(barrier, explanation_for(request.prompt))) as server:
        wanted = config(provider, server, store=str(path), neurons=many, concurrency=many, retries=0)
        explain(wanted)
    assert server.peak == many
    assert Counter(s["status"] for s in samples_of(wanted)) == {"explained": many}


def test_a_thousand_neurons_with_faults_are_all_accounted_for(provider, config, tmp_path):
    path = write_neurons(tmp_path / "exemplars.zarr", 1000)
    # Nothing waits for a timeout here, which a busy machine might reach by itself.
    plan = faulty(both_explanations_for, 0.2, [*ALL_KINDS, hang(0.2)], seed=1)
    with serve(provider, plan) as server:
        wanted = config(
            provider,
            server,
            store=str(path),
            neurons=1000,
            signs=("max", "min"),
            prompt=PromptConfig(style="highlighted_both_signs", few_shot="none"),
            concurrency=64,
            retries=1,
            cache=False,
        )
        explain(wanted)
        everything = Counter((n, sign) for n in range(1000) for sign in ("max", "min"))
        found = samples_of(wanted)
        assert Counter((s["neuron"], s["sign"]) for s in found) == everything
        explained = [s for s in found if s["status"] == "explained"]
        assert all(s["text"] == f"{s['neuron']} {s['sign']}" for s in explained)
        counts = Counter(s["status"] for s in found)
        assert counts.keys() == {"explained", "refused", "unparsable", "failed"}
        assert server.peak <= 64
        assert len(server.requests) == spent(wanted)[0]
        asked = Counter(number_of(request.prompt) for request in server.requests)
        assert sorted(asked) == list(range(1000))
        assert set(asked.values()) == {1, 2}

        again = {s["neuron"] for s in found if s["status"] == "failed"}
        assert 2 * len(again) == counts["failed"]
        first = len(server.requests)
        server.plan = answers(both_explanations_for)
        explain(wanted)
        assert sorted(number_of(r.prompt) for r in server.requests[first:]) == sorted(again)
        found = samples_of(wanted)
        assert Counter((s["neuron"], s["sign"]) for s in found) == everything
        moved = Counter(explained=counts.pop("failed"))
        assert Counter(s["status"] for s in found) == counts + moved
        explain(wanted)
        assert len(server.requests) == spent(wanted)[0] == first + len(again)


# ---- waits ----


@pytest.mark.parametrize("where", ["header", "body"])
def test_rate_limits_close_the_gate_for_all(provider, where, config):
    if (provider, where) == ("openai", "body"):
        pytest.skip("OpenAI's protocol has no such thing")
    limit = rate_limited(0.3) if where == "header" else rate_limited(retry_delay=0.3)

    def plan(request, number):
        # Slots get free while the gate is closed.
        return limit if number == 0 else text(explanation_for(request.prompt), seconds=0.05 * (number < 4))

    with serve(provider, plan) as server:
        wanted = config(provider, server, neurons=12, concurrency=4)
        explain(wanted)
    assert Counter(s["status"] for s in samples_of(wanted)) == {"explained": 12}
    times = [request.time for request in server.requests]
    assert len(times) == 13
    assert min(times[4:]) >= times[0] + 0.3, "sent while the gate was closed"


def test_a_wait_of_hours_ends_the_run(provider, config):
    with serve(provider, lambda *_: rate_limited(7200)) as server:
        with pytest.raises(
            JaxplainError, match=r"asks to wait 120 minutes .*run the same command again then"
        ):
            explain(config(provider, server, concurrency=1))
        assert len(server.requests) == 1


def test_the_gate_holds_for_those_that_waited_for_the_budget(provider, config):
    def plan(request, number):
        return rate_limited(0.3) if number == 0 else FINE(request, number)

    with serve(provider, plan) as server:
        # Room for one request at a time, so the others wait for it to be settled.
        wanted = config(
            provider,
            server,
            neurons=4,
            prices={"m": PRICE},
            budget=BudgetConfig(max_cost_usd=0.02),
            sampling=SamplingConfig(max_tokens=MOST_TOKENS),
        )
        explain(wanted)
    assert Counter(s["status"] for s in samples_of(wanted)) == {"explained": 4}
    times = [request.time for request in server.requests]
    assert len(times) == 5
    assert min(times[1:]) >= times[0] + 0.3


def test_retry_after_in_all_its_forms():
    assert remote.retry_after("1.5") == 1.5
    assert remote.retry_after("-3") == 0
    assert remote.retry_after("Sat, 21 Nov 2020 07:28:00 GMT") == 0
    assert remote.retry_after("Fri, 21 Nov 2070 07:28:00 GMT") > 1e9
    assert [remote.retry_after(odd) for odd in (None, "", "soon", "nan", "inf")] == [None] * 5


def test_waits_double_up_to_a_minute(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    assert [remote._wait_before(n) for n in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


# ---- what ends a run ----


FATAL = {
    "key": (client_error(401, "Incorrect key."), "does not accept the key", "Incorrect key"),
    "account": (client_error(403, "Not for you."), "does not accept the key", "Not for you"),
    "model": (client_error(404, "Unknown model."), "explainer.model is 'm', which is not there", "Unknown"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_no_request_can_pass_ends_the_run_and_keeps_what_is_done(provider, name, config):
    fault, *said = FATAL[name]
    with serve(provider, lambda r, n: FINE(r, n) if n < 4 else fault) as server:
        wanted = config(provider, server, neurons=8, concurrency=1)
        sentence = refusal(wanted)
        assert all(part in sentence for part in said)
        assert "4 of the 8 neurons are done, 4 are left" in sentence
        assert len(server.requests) == 5
        assert [s["text"] for s in samples_of(wanted)] == [f"{n} max" for n in range(4)]
        server.plan = FINE
        explain(wanted)
    assert len(samples_of(wanted)) == 8
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("provider", "fault", "said"),
    [
        ("openai", client_error(429, "Pay first.", code="insufficient_quota"), "quota is used up"),
        (
            "gemini",
            client_error(400, "API key not valid. Please pass a valid API key."),
            "not accept the key",
        ),
    ],
)
def test_other_ways_to_refuse_an_account(provider, fault, said, config):
    with serve(provider, lambda *_: fault) as server:
        assert said in refusal(config(provider, server))
    assert len(server.requests) == 1


def test_requests_under_way_are_finished_when_one_ends_the_run(provider, config):
    def plan(request, number):
        if subject_of(request.prompt) == "0 max":
            return client_error(401, "Incorrect key.")
        return text(explanation_for(request.prompt), seconds=0.2)

    with serve(provider, plan) as server:
        wanted = config(provider, server, neurons=20, concurrency=4)
        assert "3 of the 20 neurons are done" in refusal(wanted)
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault", [client_error(400, "No."), server_error(500)], ids=["rejected", "failing"])
def test_twenty_failures_in_a_row_end_the_run(provider, fault, config):
    def plan(request, number):
        return FINE(request, number) if number < 3 or number == 22 else fault

    with serve(provider, plan) as server:
        wanted = config(provider, server, neurons=40, signs=("max", "min"), concurrency=1, retries=0)
        sentence = refusal(wanted)
        assert sentence.startswith("20 requests in a row failed")
        assert ("No" if fault.status == 400 else "500") in sentence
        # The success after 19 failures starts the count anew.
        assert len(server.requests) == 3 + 19 + 1 + 20
        assert Counter(s["status"] for s in samples_of(wanted)) == {"explained": 4, "failed": 38}
        server.plan = FINE
        explain(wanted)
    assert Counter(s["status"] for s in samples_of(wanted)) == {"explained": 80}
