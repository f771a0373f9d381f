"""Keys of remote models: where they come from, and that they are written nowhere."""

import dataclasses
import re
import traceback

import pytest

from jaxplain.configs.explanation import ExplainerConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain
from tests.explainers.faults import client_error, server_error
from tests.explainers.remote_runs import FINE, KEYS, SECRET, refusal, samples_of, serve

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
