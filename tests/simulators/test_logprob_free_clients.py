"""The simulator without log-probabilities through the real clients, against local servers."""

import dataclasses
import json

import pytest

from jaxplain.configs.explanation import ExplainerConfig, PriceConfig, SamplingConfig
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.remote import Purse
from jaxplain.explainers.replies import Request
from jaxplain.simulators import logprob_free
from jaxplain.simulators.logprob_free import (
    SCHEMA,
    simulation_messages,
)
from jaxplain.simulators.simulation import Failure, Simulation
from jaxplain.store.explanations import open_explanations
from tests.explainers.faults import client_error, refused, text, truncated
from tests.explainers.gemini_server import gemini_server
from tests.explainers.remote_runs import serve
from tests.simulators.asked import TEXTS, WHOLE, WRONG, job_of, levels_for, right_answer, simulate


def asked_json(provider, body):
    """The schema in a request, and what is said beside it."""
    if provider == "openai":
        form = body.get("response_format")
        return form and (form["json_schema"]["schema"], form["type"], form["json_schema"]["strict"])
    settings = body["generationConfig"]
    schema = settings.get("responseJsonSchema")
    return schema and (schema, settings["responseMimeType"])


def test_a_right_answer(provider, opened):
    with serve(provider, lambda request, _: text(right_answer(request.prompt))) as server:
        jobs = [job_of([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]), job_of([0, 1], explanation="verbs")]
        first, second = simulate(opened(provider, server), *jobs)
    assert [o.expected.tolist() for o in first] == [levels_for("animals", t) for t in (TEXTS, TEXTS[::-1])]
    assert second[0].expected.tolist() == levels_for("verbs", [" the", " dog"])
    assert len(server.requests) == 3
    for request in server.requests:
        expected = {"openai": (SCHEMA, "json_schema", True), "gemini": (SCHEMA, "application/json")}
        assert asked_json(provider, request.body) == expected[provider]
    if provider == "openai":
        assert server.requests[0].body["response_format"]["json_schema"]["name"] == "reply"


OVER_THE_WIRE = [
    "another token",
    "missing in the middle",
    "missing at the end",
    "one too many",
    "too high",
    "NaN",
    "words",
]


@pytest.mark.parametrize("name", OVER_THE_WIRE)
def test_a_wrong_answer(provider, name, opened):
    answer, detail = WRONG[name]
    with serve(provider, lambda request, _: text(answer(request.prompt))) as server:
        ((outcome,),) = simulate(opened(provider, server), WHOLE)
    assert isinstance(outcome, Failure)
    assert outcome.detail.startswith(detail)


@pytest.mark.parametrize(
    ("fault", "details"),
    [
        (refused(), {"openai": "refused: finish reason stop", "gemini": "refused: prompt blocked: SAFETY"}),
        (
            truncated('{"activations": ['),
            dict.fromkeys(
                ("openai", "gemini"),
                "the reply is not JSON (Expecting value: line 1 column 18 (char 17)); the reply was cut "
                "short by sampling.max_tokens",
            ),
        ),
        (
            client_error(400, "This schema will not do."),
            {
                "openai": "failed: 400 from 127.0.0.1: This schema will not do",
                "gemini": "failed: 400 INVALID_ARGUMENT from Gemini: This schema will not do",
            },
        ),
    ],
    ids=["refused", "truncated", "rejected"],
)
def test_no_answer(provider, fault, details, opened):
    with serve(provider, lambda *_: fault) as server:
        ((outcome,),) = simulate(opened(provider, server), WHOLE)
    assert isinstance(outcome, Failure)
    assert outcome.detail.startswith(details[provider])


def test_a_fenced_answer(provider, opened):
    with serve(provider, lambda r, _: text(f"```json\n{right_answer(r.prompt)}\n```")) as server:
        ((outcome,),) = simulate(opened(provider, server), WHOLE)
    assert isinstance(outcome, Simulation)


def test_the_schema_decides_the_reply(provider, opened, monkeypatch):
    """It is part of the cache's key; what is asked without one is sent and kept as ever."""
    plain = Request(
        layer=3, index=7, sign="max", sample=0, messages=simulation_messages("animals", TEXTS), seed=5
    )
    other = dataclasses.replace(plain, schema={"type": "string"})
    with serve(provider, lambda request, _: text(right_answer(request.prompt))) as server:
        for _ in range(2):
            simulate(opened(provider, server), WHOLE)
            assert len(server.requests) == 1
        for number, request in enumerate((plain, other, plain, other)):
            list(opened(provider, server).answers(iter([request])))
            assert len(server.requests) == 1 + min(number + 1, 2)
    without, with_other = (asked_json(provider, r.body) for r in server.requests[1:])
    assert without is None
    assert "response" not in json.dumps(server.requests[1].body)
    assert with_other[0] == {"type": "string"}


def test_servers_that_know_no_schema_can_do_without(opened):
    with serve("openai", lambda request, _: text(right_answer(request.prompt))) as server:
        model = opened("openai", server, parameters={"response_format": None})
        ((outcome,),) = simulate(model, WHOLE)
    assert isinstance(outcome, Simulation)
    assert "response_format" not in server.requests[0].body


def test_batches_take_schemas_and_several_jobs_of_a_neuron(opened):
    jobs = [job_of([0, 1], [1, 1], explanation=explanation) for explanation in ("animals", "verbs")]
    with gemini_server(lambda request, _: text(right_answer(request.prompt))) as server:
        found = simulate(opened("gemini", server, mode="batch"), *jobs)
    for job, outcomes in zip(jobs, found, strict=True):
        expected = [levels_for(job.explanation, texts) for texts in ([" the", " dog"], [" dog"] * 2)]
        assert [o.expected.tolist() for o in outcomes] == expected
    assert len(server.jobs) == 1
    assert [asked_json("gemini", item.body) for item in server.inlined] == [(SCHEMA, "application/json")] * 4


def test_the_most_that_a_request_can_cost_counts_the_schema(tmp_path):
    config = ExplainerConfig(provider="openai", model="m", prices={"m": PriceConfig(input=1e6, output=0.0)})
    with open_explanations(tmp_path / "e.sqlite", fingerprint="f", subject="s") as database:
        purse = Purse(config, database, 0)
        message = Message(role="user", content="x" * 100)
        request = Request(layer=0, index=0, sign="max", sample=0, messages=[message], seed=0)
        with_schema = dataclasses.replace(request, schema=SCHEMA)
        more = purse.most(with_schema, SamplingConfig()) - purse.most(request, SamplingConfig())
    assert more >= len(json.dumps(SCHEMA))


def test_the_schema_keeps_to_what_all_providers_know():
    """Every object names all its properties as required and allows no others."""

    def check(schema):
        assert not schema.keys() - {"type", "properties", "required", "additionalProperties", "items"}
        if schema["type"] == "object":
            assert list(schema["properties"]) == schema["required"]
            assert schema["additionalProperties"] is False
        for inner in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
            check(inner)

    check(logprob_free.SCHEMA)
