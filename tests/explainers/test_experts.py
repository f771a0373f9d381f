"""Neurons of experts: replies find them, draws differ, and databases say which expert it is."""

import dataclasses
import sqlite3
from contextlib import closing

import numpy as np
import pytest

import jaxplain
from jaxplain.configs.explanation import ChosenNeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain
from jaxplain.explainers import gemini_batches
from jaxplain.explainers.choosing import choose_neurons
from jaxplain.explainers.replies import Request
from jaxplain.store.explanations import open_explanations
from jaxplain.store.neuron_id import NeuronId, neuron_of
from tests.explainers.gemini_server import gemini_server
from tests.explainers.openai_server import openai_server
from tests.explainers.remote_runs import FINE, query, write_neurons

EXPERTS, NEURONS = 3, 4


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "exemplars.zarr"
    return write_neurons(path, EXPERTS * NEURONS, experts=EXPERTS)


@pytest.fixture
def split(experts):
    return jaxplain.open_store(experts)["train"]


def assert_all_explained(wanted):
    """Each neuron by its number over all experts, which is what its text says."""
    found = query(wanted, "SELECT * FROM samples ORDER BY expert, neuron, sign")
    assert [(row["expert"], row["neuron"], row["text"]) for row in found] == [
        (expert, index, f"{expert * NEURONS + index} {sign}")
        for expert in range(EXPERTS)
        for index in range(NEURONS)
        for sign in ("max", "min")
    ]


@pytest.mark.parametrize("provider", ["openai", "gemini", "batches"])
def test_every_reply_finds_its_neuron(provider, experts, config, monkeypatch):
    monkeypatch.setattr(gemini_batches, "_FIRST_POLL", 0.002)
    changes = {"mode": "batch", "batch_requests": 7} if provider == "batches" else {}
    kind = "openai" if provider == "openai" else "gemini"
    with (openai_server if provider == "openai" else gemini_server)(FINE) as server:
        server.shuffle = True
        wanted = config(kind, server, signs=("max", "min"), store=str(experts), **changes)
        wanted = dataclasses.replace(wanted, neurons=ChosenNeuronsConfig())
        explain(wanted)
        sent = len(server.requests)
        explain(wanted)
        assert len(server.requests) == sent, "nothing is asked twice"
    assert_all_explained(wanted)


def test_requests_about_the_same_index_of_several_experts_differ(experts, config):
    with openai_server(FINE) as server:
        wanted = config("openai", server, store=str(experts))
        explain(dataclasses.replace(wanted, neurons=ChosenNeuronsConfig()))
        seeds = {request.body["seed"] for request in server.requests}
    assert len(seeds) == EXPERTS * NEURONS


def test_batches_know_requests_by_the_whole_neuron():
    def request(expert, index):
        return Request(layer=2, expert=expert, index=index, sign="max", sample=3, messages=[], seed=0)

    for one in (request(None, 5), request(0, 5), request(1, 5), request(5, 1)):
        assert gemini_batches._neuron(gemini_batches._key(one)) == neuron_of(one)
    keys = {gemini_batches._key(request(expert, 5)) for expert in (None, 0, 1)}
    assert len(keys) == 3
    assert "2:5:max:3" in keys, "as ever where there are no experts"


def test_names_of_neurons():
    plain, of_expert = NeuronId.of(3, None, 7), NeuronId.of(3, 1, 7)
    assert (plain.layer, plain.expert, plain.index) == (3, None, 7)
    assert (of_expert.layer, of_expert.expert, of_expert.index) == (3, 1, 7)
    assert str(plain) == "layer 3, neuron 7"
    assert str(of_expert) == "layer 3, expert 1, neuron 7"
    assert sorted([NeuronId.of(0, 1, 0), NeuronId.of(0, 0, 9)])[0].expert == 0
    assert plain == (3, 7)


def choose(split, **config):
    return choose_neurons(ChosenNeuronsConfig(**config), split)


def test_neurons_are_chosen_by_expert(split, tmp_path):
    everything = [(0, expert, index) for expert in range(EXPERTS) for index in range(NEURONS)]
    assert choose(split) == everything
    assert choose(split, experts="all") == everything
    assert choose(split, experts=[2]) == [(0, 2, index) for index in range(NEURONS)]
    assert choose(split, experts="1:", indices=[3]) == [(0, 1, 3), (0, 2, 3)]
    np.save(tmp_path / "neurons.npy", np.array([[0, 2, 1], [0, 0, 3]]))
    assert choose(split, file=str(tmp_path / "neurons.npy")) == [(0, 0, 3), (0, 2, 1)]
    assert set(choose(split, by="random", count=5)) < set(everything)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"indices": [1]}, r"neurons.indices is \[1\], but the subject is a mixture of .*neurons.experts"),
        ({"experts": [3]}, "neurons.experts names expert 3, but the store holds 3 experts from 0 to 2"),
        ({"experts": "first"}, "neurons.experts is 'first'; write a range"),
        ({"experts": [0], "indices": [4]}, "names neuron 4, but the store holds 4 neurons from 0 to 3"),
        ({"file": [[0, 1]]}, r"shape \(1, 2\).* integers \[N, 3\], each row a layer, an expert and a neuron"),
        ({"file": [[0, 3, 1]]}, "names neuron 1 of expert 3 of layer 0, which is not among the 12 neurons"),
    ],
)
def test_what_is_not_there(split, config, message, tmp_path):
    if "file" in config:
        np.save(tmp_path / "neurons.npy", np.array(config["file"]))
        config = {"file": str(tmp_path / "neurons.npy")}
    with pytest.raises(JaxplainError, match=message) as caught:
        choose(split, **config)
    assert "\n" not in str(caught.value)


def test_experts_of_a_subject_without_any(store, tmp_path):
    split = jaxplain.open_store(store)["train"]
    with pytest.raises(JaxplainError, match=r"neurons.experts is \[0\], but the subject is no mixture"):
        choose(split, experts=[0])
    np.save(tmp_path / "neurons.npy", np.array([[0, 0, 3]]))
    with pytest.raises(JaxplainError, match=r"integers \[N, 2\], each row a layer and a neuron"):
        choose(split, file=str(tmp_path / "neurons.npy"))


def columns(path, table):
    with closing(sqlite3.connect(path)) as connection:
        return [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]


def test_databases_of_subjects_without_experts_are_as_ever(tmp_path):
    """So that those from before there were experts are read and written on."""
    for name, experts in (("plain", False), ("experts", True)):
        open_explanations(
            tmp_path / f"{name}.sqlite", fingerprint="f", subject="s", experts=experts
        ).connection.close()
    assert columns(tmp_path / "plain.sqlite", "work") == ["recipe", "layer", "neuron", "owner", "expires"]
    assert columns(tmp_path / "plain.sqlite", "samples") == [
        *("id", "recipe", "layer", "neuron", "sign", "sample", "status", "text", "detail", "reply"),
        *("messages", "sequences", "model", "input_tokens", "output_tokens", "cost_usd", "created"),
    ]
    with closing(sqlite3.connect(tmp_path / "plain.sqlite")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    for table in ("work", "samples", "explanations", "failures"):
        plain = columns(tmp_path / "plain.sqlite", table)
        at = plain.index("neuron")
        assert columns(tmp_path / "experts.sqlite", table) == [*plain[:at], "expert", *plain[at:]]


def test_a_search_finds_the_expert(experts, config):
    with openai_server(FINE) as server:
        wanted = config("openai", server, store=str(experts))
        explain(dataclasses.replace(wanted, neurons=ChosenNeuronsConfig(experts=[0, 2])))
    with open_explanations(experts.parent.joinpath(wanted.output) / "explanations.sqlite") as database:
        assert [(e.expert, e.index, e.text) for e in database.search("9")] == [(2, 1, "9 max")]
        assert {e.expert for e in database.explanations(0, 1)} == {0, 2}
        assert [e.text for e in database.explanations(0, 1, 2)] == ["9 max"]
        assert database.explanations(0, 1, 1) == []
