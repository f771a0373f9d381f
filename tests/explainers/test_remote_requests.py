"""One request to a remote model: what becomes of it, and what it says; with every fault to order."""

import json

import pytest
import yaml

from jaxplain.configs.explanation import PromptConfig, SamplingConfig
from jaxplain.explain import explain, main
from tests.explainers.faults import (
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
from tests.explainers.remote_runs import FINE, query, refusal, samples_of, serve, spent


def the_sample(config):
    (sample,) = samples_of(config)
    return sample


def then_fine(*outcomes):
    """A plan: these outcomes first, good answers afterwards."""
    return lambda request, number: outcomes[number] if number < len(outcomes) else FINE(request, number)


# ---- one request ----


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


@pytest.mark.usefixtures("remote_environment")
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


# ---- parameters ----


def sampling_parameters(provider, body):
    """What a request says besides model and messages, by the provider's own names."""
    if provider == "gemini":
        return body["generationConfig"]
    return {name: value for name, value in body.items() if name not in ("model", "messages")}


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
