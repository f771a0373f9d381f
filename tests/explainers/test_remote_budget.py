"""What remote models cost: the budget over faults and restarts, and replies that are paid for once."""

import re
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxplain.configs.explanation import BudgetConfig, PromptConfig, SamplingConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain
from tests.explainers.faults import (
    blank,
    client_error,
    cut_off,
    dropped,
    faulty,
    hang,
    malformed,
    rate_limited,
    refused,
    server_error,
    text,
    wrong_shape,
)
from tests.explainers.remote_runs import (
    ALL_KINDS,
    FINE,
    MOST_TOKENS,
    PRICE,
    explanation_for,
    query,
    refusal,
    samples_of,
    serve,
    spent,
    subject_of,
)

# ---- budget ----


def test_the_budget_of_requests_is_exact_over_restarts(provider, config):
    faults = [server_error(500), dropped(), rate_limited(0.01), client_error(400, "no"), malformed()]
    with serve(provider, faulty(explanation_for, 0.4, faults, seed=3)) as server:

        def limited(requests):
            return config(
                provider,
                server,
                neurons=40,
                concurrency=8,
                budget=BudgetConfig(max_requests=requests),
            )

        for limit in (10, 10, 17):
            sentence = refusal(limited(limit))
            assert f"max_requests {limit}" in sentence
            assert f"{limit} requests" in sentence
            done = query(limited(limit), "SELECT count(*) AS n FROM work WHERE owner IS NULL")[0]["n"]
            assert f"{done} of the 40 neurons are done, {40 - done} are left" in sentence
            assert len(server.requests) == spent(limited(limit))[0] == limit
        server.plan = FINE
        explain(limited(100))
    assert Counter(s["status"] for s in samples_of(limited(100))) == {"explained": 40}
    assert len(server.requests) == spent(limited(100))[0] <= 100


def bill(server):
    """What a provider could ask for: all but what it refused or failed to do."""
    done = [r for r in server.requests if r.fault not in ("rate_limited", "server_error", "client_error")]
    return len(done) * (100 * PRICE.input + 10 * PRICE.output) / 1e6


@pytest.mark.parametrize("faults", [[], [*ALL_KINDS, hang(5)]], ids=["fine", "faulty"])
def test_the_budget_in_dollars_is_never_exceeded(provider, faults, config):
    with serve(provider, faulty(explanation_for, 0.3 if faults else 0, faults, seed=2)) as server:

        def limited(dollars):
            return config(
                provider,
                server,
                neurons=40,
                signs=("max", "min"),
                concurrency=8,
                timeout_seconds=0.5 if faults else 20.0,
                prices={"m": PRICE},
                budget=BudgetConfig(max_cost_usd=dollars),
                sampling=SamplingConfig(max_tokens=MOST_TOKENS),
            )

        for dollars in (0.08, 0.08, 0.1):
            wanted = limited(dollars)
            sentence = refusal(wanted)
            assert f"max_cost_usd {dollars:g}" in sentence
            assert re.search(r"\d+ of the 40 neurons are done, \d+ are left", sentence)
            _, cost = spent(wanted)
            assert bill(server) <= cost + 1e-9 <= dollars + 1e-9
            recorded = sum(s["cost_usd"] for s in samples_of(wanted))
            assert recorded <= cost + 1e-9
            if not faults:
                assert cost == pytest.approx(bill(server))
                # The most that a request can cost is what is left in the end.
                assert dollars - cost < 0.015


def test_cost_is_that_of_the_usage_that_the_server_counts(provider, config):
    with serve(provider, FINE) as server:
        wanted = config(provider, server, neurons=5, signs=("max", "min"), prices={"m": PRICE})
        explain(wanted)
        assert [s["cost_usd"] for s in samples_of(wanted)] == pytest.approx([0.002] * 10)
        assert spent(wanted)[1] == pytest.approx(0.02)


def test_a_reply_without_usage_costs_the_most_that_it_can(provider, config):
    with serve(
        provider, lambda request, _: text("Explanation: x", input_tokens=0, output_tokens=0)
    ) as server:
        wanted = config(provider, server, prices={"m": PRICE})
        explain(wanted)
        most = (len(server.requests[0].prompt.encode()) * PRICE.input + 500 * PRICE.output) / 1e6
        assert spent(wanted)[1] >= most


def test_answers_that_get_lost_may_have_been_billed(provider, config):
    """A server may do its part, at the highest cost, and the answer may never arrive."""
    lost = [cut_off(), malformed(), wrong_shape(), dropped(), hang(5)]
    with serve(provider, lambda request, number: lost[number % 5]) as server:
        wanted = config(provider, server, prices={"m": PRICE}, timeout_seconds=0.3, retries=4)
        explain(wanted)
        _, cost = spent(wanted)
        most = (len(server.requests[0].prompt.encode()) * PRICE.input + 500 * PRICE.output) / 1e6
        assert len(server.requests) == 5
        assert cost >= 5 * most
        server.plan = lambda *_: server_error(500)
        explain(wanted)
        assert spent(wanted) == (10, pytest.approx(cost)), "errors cost nothing"
    explain(wanted)
    assert spent(wanted) == (15, pytest.approx(cost)), "nor does a server that is not there"


def test_two_models_on_one_database_share_the_budget(provider, config):
    with serve(provider, FINE) as server:
        wanted = config(provider, server, neurons=40, concurrency=4, budget=BudgetConfig(max_requests=25))
        with ThreadPoolExecutor(2) as threads:
            errors = [future.exception() for future in [threads.submit(explain, wanted) for _ in range(2)]]
    assert all(isinstance(error, JaxplainError | None) for error in errors)
    assert any(errors)
    assert len(server.requests) == spent(wanted)[0] == 25
    asked = Counter(subject_of(request.prompt) for request in server.requests)
    assert max(asked.values()) == 1, "nor do they ask the same"
    assert len(samples_of(wanted)) == 25


# ---- cache ----


def test_the_same_request_is_paid_for_once(provider, config):
    with serve(provider, faulty(explanation_for, 0.4, [refused(), blank()], seed=0)) as server:
        first = config(provider, server, neurons=10, prices={"m": PRICE}, output="first")
        explain(first)
        assert len(server.requests) == 10
        second = config(provider, server, neurons=10, prices={"m": PRICE}, output="second")
        explain(second)
        assert len(server.requests) == 10
        assert spent(second) == (0, 0)
        kept = ("neuron", "sign", "status", "text", "detail", "reply", "model", "input_tokens")
        a, b = ([{k: s[k] for k in kept} for s in samples_of(c)] for c in (first, second))
        assert a == b
        assert {s["status"] for s in a} > {"explained"}
        assert all(s["cost_usd"] == 0 for s in samples_of(second))


def test_a_damaged_row_of_the_cache_is_as_good_as_none(provider, config, tmp_path):
    with serve(provider, FINE) as server:
        explain(config(provider, server, output="first"))
        (path,) = tmp_path.rglob("replies.sqlite")
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute('UPDATE replies SET reply = \'{"outcome": "answ\'')
        connection.close()
        second = config(provider, server, output="second")
        explain(second)
        assert len(server.requests) == 2
    assert [s["status"] for s in samples_of(second)] == ["explained"]


CHANGES = {
    "seed": {"sampling": SamplingConfig(seed=1)},
    "temperature": {"sampling": SamplingConfig(temperature=0.5)},
    "top_p": {"sampling": SamplingConfig(top_p=0.5)},
    "max_tokens": {"sampling": SamplingConfig(max_tokens=50)},
    "parameters": {"parameters": {"presence_penalty": 0.5}},
    "model": {"model": "other"},
    "messages": {"prompt": PromptConfig(few_shot="system")},
    "no cache": {"cache": False},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_a_reply_is_asked_anew(provider, name, config):
    with serve(provider, FINE) as server:
        explain(config(provider, server, output="first"))
        explain(config(provider, server, output="second", **CHANGES[name]))
        assert len(server.requests) == 2
        explain(config(provider, server, output="third"))
        assert len(server.requests) == 2


def test_another_server_is_asked_anew(provider, config):
    with serve(provider, FINE) as server, serve(provider, FINE) as other:
        explain(config(provider, server, output="first"))
        explain(config(provider, other, output="second"))
    assert len(server.requests) == len(other.requests) == 1


def test_without_cache_nothing_is_kept(provider, config, tmp_path):
    with serve(provider, FINE) as server:
        for output in ("first", "second"):
            explain(config(provider, server, output=output, cache=False))
    assert len(server.requests) == 2
    assert not (tmp_path / "cache").exists()
