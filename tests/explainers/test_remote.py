"""Remote models through the real client libraries, against local servers with every fault to order."""

import dataclasses
import json
import random
import re
import sqlite3
import ssl
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import yaml

from jaxplain.configs.explanation import (
    BudgetConfig,
    ChosenNeuronsConfig,
    ExplainConfig,
    ExplainerConfig,
    PriceConfig,
    PromptConfig,
    SamplingConfig,
)
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain, main
from jaxplain.explainers import remote
from jaxplain.store.writer import SequenceBlock, StoreWriter
from tests.explainers import servers
from tests.explainers.servers import (
    blank,
    client_error,
    cut_off,
    dropped,
    empty,
    hang,
    malformed,
    rate_limited,
    refused,
    server_error,
    text,
    truncated,
    wrong_shape,
)

SECRET = "sk-very-secret-123"
KEYS = ["OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"]
PRICE = PriceConfig(input=10.0, output=100.0)
MOST_TOKENS = 20


# ---- what the tests run on ----


def write_neurons(path, count):
    """Neurons of layer 0; the n-th fires on " up" and is driven down by " down", in a text that names it."""
    writer = StoreWriter(
        path,
        {
            "config": {"exemplars": {"splits": ["train"], "kinds": ["max", "min"], "k": 1}},
            "subject": {"id": "made-up"},
            "corpora": ["one"],
        },
    )
    writer.write_vocabulary([b" up", b" down", *(f"<{n}>".encode() for n in range(count))])
    nth, zero = np.arange(count), np.zeros(count, np.int32)
    token_NT = np.stack([nth + 2, zero, zero + 1], axis=1).astype(np.int32)
    block = SequenceBlock(
        token_NT=token_NT, corpus_N=zero, document_N=nth.astype(np.int64), start_N=zero, length_N=zero + 3
    )
    writer.write_sequences("train", [block], tokens=3)
    split = writer.create_split(
        "train",
        layers=np.array([0]),
        neurons=nth,
        kinds=["max", "min"],
        k=1,
        tokens=3,
        activation_dtype="float32",
    )
    activation = np.tile(np.array([0.0, 2.0, -2.0], np.float32), (count, 1, 1))
    for kind, score in (("max", 2.0), ("min", -2.0)):
        split.write_exemplars(
            kind,
            0,
            nth,
            score_NR=np.full((count, 1), score, np.float32),
            sequence_NR=nth[:, None].astype(np.int32),
            activation_NRT=activation,
        )
    ones = np.ones(count)
    names = ("mean", "variance", "skewness", "kurtosis", "fraction_active")
    split.write_statistics(0, nth, count=np.full(count, 3), **dict.fromkeys(names, ones))
    writer.finish()
    return path


def explanation_for(prompt):
    """What the servers answer; says which neuron and sign were asked about."""
    return f"Explanation: {subject_of(prompt)}"


def subject_of(prompt):
    """Neuron and sign that a prompt is about, such as "17 max"."""
    shown = prompt.split("Excerpt 1:")[-1]
    return f"{number_of(prompt)} {'max' if '{{ up}}' in shown else 'min'}"


def number_of(prompt):
    return int(re.search(r"<(\d+)>", prompt.split("Excerpt 1:")[-1])[1])


def both_explanations_for(prompt):
    """The same for prompts about both signs."""
    number = number_of(prompt)
    return f"Positive explanation: {number} max\nNegative explanation: {number} min"


FINE = servers.answers(explanation_for)


def then_fine(*outcomes):
    """A plan: these outcomes first, good answers afterwards."""
    return lambda request, number: outcomes[number] if number < len(outcomes) else FINE(request, number)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return write_neurons(tmp_path_factory.mktemp("store") / "exemplars.zarr", 40)


@pytest.fixture(params=["openai", "gemini"])
def provider(request):
    return request.param


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.002)
    # Certificates, which take longer to read than all else here, serve no purpose over http.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


def serve(provider, plan):
    return (servers.openai_server if provider == "openai" else servers.gemini_server)(plan)


@pytest.fixture
def config(store, tmp_path):
    """A config for some neurons, to be changed by keywords of the explainer's block and of the whole."""

    def make(provider, server, *, neurons=1, signs=("max",), output="out", **changes):
        whole = {name: changes.pop(name) for name in ("prompt", "sampling", "store") if name in changes}
        explainer = {"model": "m", "base_url": server and server.url, "timeout_seconds": 20.0, "retries": 2}
        return ExplainConfig(
            **{"store": str(store), "prompt": PromptConfig(few_shot="none")} | whole,
            explainer=ExplainerConfig(provider=provider, **explainer | changes),
            neurons=ChosenNeuronsConfig(indices=f"0:{neurons}"),
            signs=list(signs),
            output=str(tmp_path / output),
            progress=False,
        )

    return make


def query(config, sql):
    with closing(sqlite3.connect(f"{config.output}/explanations.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(sql)]


def samples_of(config):
    return query(config, "SELECT * FROM samples ORDER BY neuron, sign, sample")


def spent(config):
    """Requests and US dollars, over all recipes."""
    (row,) = query(config, "SELECT sum(requests) AS requests, sum(cost_usd) AS cost FROM recipes")
    return row["requests"], row["cost"]


def the_sample(config):
    (sample,) = samples_of(config)
    return sample


def refusal(config):
    """The one sentence that a run ends with."""
    with pytest.raises(JaxplainError) as raised:
        explain(config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def sampling_parameters(provider, body):
    """What a request says besides model and messages, by the provider's own names."""
    if provider == "gemini":
        return body["generationConfig"]
    return {name: value for name, value in body.items() if name not in ("model", "messages")}


# ---- one request ----


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


PASSING = {
    "server error": (server_error(500), "500"),
    "proxy's page": (server_error(502, html=True), "502"),
    "overloaded": (server_error(503, retry_after=0.01), "503"),
    "rate limit without a time": (rate_limited(), "429"),
    "rate limit with a date": (rate_limited("Sat, 21 Nov 2020 07:28:00 GMT"), "429"),
    "dropped": (dropped(), "connection failed"),
    "cut off": (cut_off(), "connection failed"),
    "hang": (hang(5), "no answer within 0.3 seconds"),
    "malformed": (malformed(), "not of the protocol"),
    "page": (malformed("text/html"), "not of the protocol"),
    "wrong shape": (wrong_shape(), "not of the protocol"),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_failures_are_tried_again(provider, name, config):
    fault, _ = PASSING[name]
    with serve(provider, then_fine(fault)) as server:
        wanted = config(provider, server, timeout_seconds=0.3 if name == "hang" else 20.0)
        explain(wanted)
    sample = the_sample(wanted)
    assert (sample["status"], sample["text"], sample["detail"]) == ("explained", "0 max", None)
    assert len(server.requests) == spent(wanted)[0] == 2
    assert (sample["model"], sample["input_tokens"], sample["output_tokens"]) == ("m", 100, 10)


@pytest.mark.parametrize("name", PASSING)
def test_lasting_failures_are_recorded_and_asked_again_by_the_next_run(provider, name, config):
    fault, reason = PASSING[name]
    with serve(provider, lambda request, number: fault) as server:
        wanted = config(provider, server, timeout_seconds=0.3 if name == "hang" else 20.0)
        explain(wanted)
        sample = the_sample(wanted)
        assert (sample["status"], sample["text"], sample["reply"]) == ("failed", None, None)
        assert reason in sample["detail"]
        assert "(3 tries)" in sample["detail"]
        assert len(server.requests) == spent(wanted)[0] == 3
        server.plan = FINE
        explain(wanted)
        assert the_sample(wanted)["status"] == "explained"
        assert len(server.requests) == spent(wanted)[0] == 4


def test_rejected_requests_are_not_tried_again(provider, config):
    with serve(provider, lambda *_: client_error(400, "The prompt is too long.")) as server:
        wanted = config(provider, server)
        explain(wanted)
    sample = the_sample(wanted)
    assert sample["status"] == "failed"
    assert "The prompt is too long" in sample["detail"]
    assert len(server.requests) == 1


def test_server_that_is_not_there(provider, config):
    with serve(provider, FINE) as server:
        pass
    wanted = config(provider, server)
    explain(wanted)
    assert "connection failed" in the_sample(wanted)["detail"]


APOLOGY = "I'm sorry, I can't help with that."
NO_EXPLANATION = {
    "refused": (refused(), "refused", {"openai": APOLOGY, "gemini": None}, {"gemini": "SAFETY"}),
    "answer refused": (
        refused(in_candidate=True, refusal="", finish_reason="content_filter", reason="RECITATION"),
        "refused",
        None,
        {"openai": "content_filter", "gemini": "RECITATION"},
    ),
    "no candidates": (
        empty(),
        "refused",
        None,
        {"openai": "holds no choices", "gemini": "holds no candidates"},
    ),
    "blank": (blank(), "unparsable", None, "explanation is empty"),
    "white": (text(" \n\n "), "unparsable", " \n\n ", "explanation is empty"),
    "label only": (text("Explanation: **"), "unparsable", "Explanation: **", "explanation is empty"),
    "no label": (
        text("Reasoning: hm."),
        "unparsable",
        "Reasoning: hm.",
        'no line begins with "Explanation:"',
    ),
    "cut short": (
        truncated("Reasoning: h"),
        "unparsable",
        "Reasoning: h",
        "cut short by sampling.max_tokens",
    ),
    "cut to nothing": (truncated(""), "unparsable", None, "cut short by sampling.max_tokens"),
}


@pytest.mark.parametrize("name", NO_EXPLANATION)
def test_replies_without_an_explanation_are_kept_as_what_they_are(provider, name, config):
    fault, status, reply, detail = NO_EXPLANATION[name]
    reply = reply[provider] if isinstance(reply, dict) else reply
    detail = detail.get(provider, "") if isinstance(detail, dict) else detail
    prompt = PromptConfig(few_shot="none", chain_of_thought="Reasoning" in (reply or ""))
    with serve(provider, lambda *_: fault) as server:
        wanted = config(provider, server, prompt=prompt)
        explain(wanted)
        explain(wanted)  # it is an answer, so it is not asked for again
    sample = the_sample(wanted)
    assert (sample["status"], sample["text"], sample["reply"]) == (status, None, reply)
    assert detail in sample["detail"]
    assert sample["input_tokens"] == 100
    assert len(server.requests) == 1


def test_an_explanation_that_was_cut_short_says_so(provider, config):
    with serve(provider, lambda *_: truncated("Explanation: words for large")) as server:
        wanted = config(provider, server)
        explain(wanted)
    sample = the_sample(wanted)
    assert (sample["status"], sample["text"]) == ("explained", "words for large")
    assert sample["detail"] == "the reply was cut short by sampling.max_tokens"


def test_the_command(provider, store, tmp_path, capsys):
    """All of it from a YAML file and the command line."""
    with serve(provider, FINE) as server:
        block = {"provider": provider, "model": "m", "base_url": server.url}
        file = tmp_path / "explain.yaml"
        file.write_text(
            yaml.safe_dump({"store": str(store), "explainer": block, "neurons": {"indices": "0:3"}})
        )
        main(["--config", str(file), "--output", str(tmp_path / "out"), "--progress", "false"])
    assert len(server.requests) == 6
    shown = capsys.readouterr().out
    assert "3 of 3 neurons are complete (6 explained)" in shown
    assert "requests so far: 6" in shown
    assert "+ 2 max" in shown


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


ALL_KINDS = [
    rate_limited(0.01),
    rate_limited(),
    server_error(500),
    server_error(503, html=True),
    dropped(),
    cut_off(),
    malformed(),
    malformed("text/html"),
    wrong_shape(),
    client_error(400, "no"),
    refused(),
    refused(in_candidate=True, refusal="", finish_reason="content_filter"),
    empty(),
    blank(),
    truncated("Explanation: half of it"),
    text("Explanation:"),
]


def test_a_thousand_neurons_with_faults_are_all_accounted_for(provider, config, tmp_path):
    path = write_neurons(tmp_path / "exemplars.zarr", 1000)
    # Nothing waits for a timeout here, which a busy machine might reach by itself.
    plan = servers.faulty(both_explanations_for, 0.2, [*ALL_KINDS, hang(0.2)], seed=1)
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
        server.plan = servers.answers(both_explanations_for)
        explain(wanted)
        assert sorted(number_of(r.prompt) for r in server.requests[first:]) == sorted(again)
        found = samples_of(wanted)
        assert Counter((s["neuron"], s["sign"]) for s in found) == everything
        moved = Counter(explained=counts.pop("failed"))
        assert Counter(s["status"] for s in found) == counts + moved
        explain(wanted)
        assert len(server.requests) == spent(wanted)[0] == first + len(again)


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


# ---- keys ----


def test_a_missing_key_names_its_variables(provider, config):
    sentence = refusal(config(provider, None))
    for name in KEYS:
        assert (name in sentence) == (name.startswith("OPENAI") == (provider == "openai"))


def sent_key(provider, request):
    if provider == "openai":
        return request.headers["authorization"].removeprefix("Bearer ")
    return request.headers["x-goog-api-key"]


def test_keys_come_from_the_environment(provider, config, monkeypatch):
    with serve(provider, FINE) as server:
        explain(config(provider, server, output="none"))
        assert sent_key(provider, server.requests[-1]) == "none"
        for name in KEYS[::-1]:
            monkeypatch.setenv(name, f" key of {name} \n")
        explain(config(provider, server, output="usual", cache=False))
        first = "OPENAI_API_KEY" if provider == "openai" else "GEMINI_API_KEY"
        assert sent_key(provider, server.requests[-1]) == f"key of {first}"
        monkeypatch.setenv("OTHER_KEY", "another")
        explain(config(provider, server, output="other", cache=False, key_variable="OTHER_KEY"))
        assert sent_key(provider, server.requests[-1]) == "another"
        monkeypatch.setenv("OTHER_KEY", "")
        sentence = refusal(config(provider, server, output="empty", key_variable="OTHER_KEY"))
        assert "OTHER_KEY is not set" in sentence
    assert len(server.requests) == 3


def test_gemini_asks_the_developer_api_whatever_the_environment_says(config, monkeypatch):
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "true")
    monkeypatch.setenv("GOOGLE_GENAI_USE_ENTERPRISE", "true")
    with serve("gemini", FINE) as server:
        explain(config("gemini", server))
    assert re.fullmatch(r"/v1\w*/models/m:generateContent", server.requests[0].path)


def test_gemini_goes_through_the_environments_proxy(monkeypatch):
    from jaxplain.explainers.gemini import _proxy

    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    base = {"provider": "gemini", "model": "m"}
    assert _proxy(ExplainerConfig(**base)) == "http://proxy:3128"
    assert _proxy(ExplainerConfig(**base, base_url="https://inside.example")) is None
    assert _proxy(ExplainerConfig(**base, base_url="http://elsewhere.example")) is None


# ---- budget ----


def test_the_budget_of_requests_is_exact_over_restarts(provider, config):
    faults = [server_error(500), dropped(), rate_limited(0.01), client_error(400, "no"), malformed()]
    with serve(provider, servers.faulty(explanation_for, 0.4, faults, seed=3)) as server:

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
    with serve(provider, servers.faulty(explanation_for, 0.3 if faults else 0, faults, seed=2)) as server:

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
    with serve(provider, servers.faulty(explanation_for, 0.4, [refused(), blank()], seed=0)) as server:
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


# ---- secrets ----


ECHO = f"Incorrect API key provided: {SECRET}. It is {SECRET} indeed."
ECHOES = {
    "rejected": client_error(400, ECHO),
    "key": client_error(401, ECHO),
    "account": client_error(403, ECHO),
    "model": client_error(404, ECHO),
    "failing": dataclasses.replace(server_error(500), message=ECHO),
    "long": client_error(400, "x" * 290 + SECRET),
    "code": client_error(400, "no", code=SECRET),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_key_that_the_server_echoes_is_written_nowhere(
    provider, name, config, monkeypatch, tmp_path, capfd, caplog
):
    monkeypatch.setenv(KEYS[0] if provider == "openai" else KEYS[1], SECRET)
    with serve(provider, lambda r, n: FINE(r, n) if n < 2 else ECHOES[name]) as server:
        wanted = config(provider, server, neurons=4, retries=0, concurrency=2)
        try:
            explain(wanted)
            raised = ""
        except JaxplainError as error:
            raised = "".join(traceback.format_exception(error))
    assert sent_key(provider, server.requests[-1]) == SECRET
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"explanations.sqlite", "replies.sqlite"} <= {path.name for path in written}
    for said in (*(path.read_bytes() for path in written), raised.encode(), caplog.text.encode()):
        assert SECRET.encode() not in said
        assert SECRET[:10].encode() not in said
    assert SECRET not in "".join(capfd.readouterr())
    if name in ("rejected", "failing"):
        assert "[key]" in samples_of(wanted)[-1]["detail"]
    else:
        assert bool(raised) == (name not in ("long", "code"))


def test_a_key_is_in_no_file_while_a_run_is_under_way(provider, config, monkeypatch, tmp_path):
    monkeypatch.setenv(KEYS[0] if provider == "openai" else KEYS[1], SECRET)
    seen = set()

    def plan(request, number):
        for path in tmp_path.rglob("*"):
            if path.is_file():
                seen.add(path.name)
                assert SECRET.encode() not in path.read_bytes()
        return FINE(request, number) if number % 2 else client_error(400, ECHO)

    with serve(provider, plan) as server:
        explain(config(provider, server, neurons=6, concurrency=1))
    assert {"explanations.sqlite-wal", "replies.sqlite-wal"} <= seen


# ---- parameters ----


def test_parameters_reach_the_request(provider, config):
    extra = {"openai": {"reasoning_effort": "low", "top_k": 5, "temperature": 0.25}}
    extra["gemini"] = {"thinking_config": {"thinking_budget": 0}, "top_k": 5, "temperature": 0.25}
    # The client library writes inner names as they are, and the service takes both forms.
    arrived = {"openai": {"reasoning_effort": "low"}, "gemini": {"thinkingConfig": {"thinking_budget": 0}}}
    with serve(provider, FINE) as server:
        wanted = config(
            provider,
            server,
            parameters=extra[provider],
            sampling=SamplingConfig(temperature=0.5, top_p=0.75, max_tokens=77),
        )
        explain(wanted)
    sent = sampling_parameters(provider, server.requests[0].body)
    names = {"openai": ("top_p", "max_tokens"), "gemini": ("topP", "maxOutputTokens")}
    top_p, most = names[provider]
    expected = {"temperature": 0.25, top_p: 0.75, most: 77} | arrived[provider]
    assert {name: sent[name] for name in expected} == expected
    assert sent["top_k" if provider == "openai" else "topK"] == 5
    assert (
        server.requests[0].body["model"] == "m"
        if provider == "openai"
        else "models/m:" in server.requests[0].path
    )
    recipe = json.loads(query(wanted, "SELECT config FROM recipes")[0]["config"])
    assert recipe["explainer"]["parameters"] == extra[provider]


def test_null_takes_a_parameter_out(provider, config):
    with serve(provider, FINE) as server:
        explain(config(provider, server, parameters={"temperature": None, "seed": None}))
    sent = sampling_parameters(provider, server.requests[0].body)
    assert "topP" in sent or "top_p" in sent
    assert not {"temperature", "seed"} & sent.keys()


@pytest.mark.parametrize("parameters", [{"top_q": 1}, {"top_k": "many"}, {"thinking_config": {"much": 1}}])
def test_gemini_refuses_unknown_parameters(parameters, config):
    with serve("gemini", FINE) as server:
        sentence = refusal(config("gemini", server, parameters=parameters))
    assert sentence.startswith("explainer.parameters: google-genai has no such field or value: ")
    assert next(iter(parameters)) in sentence.replace("topK", "top_k").replace("topQ", "top_q").replace(
        "thinkingConfig", "thinking_config"
    )
    assert server.requests == []


def test_messages_arrive_in_the_providers_form(provider, config):
    with serve(provider, FINE) as server:
        explain(config(provider, server, prompt=PromptConfig(few_shot="turns", few_shot_count=1)))
    body = server.requests[0].body
    if provider == "openai":
        turns = [(message["role"], message["content"]) for message in body["messages"]]
        assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
    else:
        turns = [("system", body["systemInstruction"]["parts"][0]["text"])]
        turns += [(content["role"], content["parts"][0]["text"]) for content in body["contents"]]
        assert [role for role, _ in turns] == ["system", "user", "model", "user"]
    assert turns[2][1].startswith("Explanation: ")
    assert turns[-1][1] == "Excerpt 1: <0>{{ up}} down"


def test_seeds_differ_between_samples_and_not_between_runs(provider, config):
    def seeds(output, seed=0):
        with serve(provider, FINE) as server:
            explain(
                config(
                    provider,
                    server,
                    neurons=3,
                    signs=("max", "min"),
                    sampling=SamplingConfig(samples=3, seed=seed),
                    output=output,
                )
            )
        return sorted(sampling_parameters(provider, r.body)["seed"] for r in server.requests)

    first = seeds("first")
    assert len(set(first)) == 18
    assert all(0 <= seed < 2**31 for seed in first)
    assert seeds("second") == first
    assert not set(seeds("third", seed=1)) & set(first)


# ---- waits ----


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
