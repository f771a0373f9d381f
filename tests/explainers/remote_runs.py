"""What the tests of remote models share: neurons with simple prompts, servers' plans, and a run's results."""

import re
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from jaxplain.configs.explanation import PriceConfig
from jaxplain.errors import JaxplainError
from jaxplain.explain import explain
from jaxplain.store.writer import SequenceBlock, StoreWriter
from tests.explainers.faults import (
    answers,
    blank,
    client_error,
    cut_off,
    dropped,
    empty,
    malformed,
    rate_limited,
    refused,
    server_error,
    text,
    truncated,
    wrong_shape,
)
from tests.explainers.gemini_server import gemini_server
from tests.explainers.openai_server import openai_server

SECRET = "sk-very-secret-123"
KEYS = ["OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"]
PRICE = PriceConfig(input=10.0, output=100.0)
MOST_TOKENS = 20

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


def write_neurons(path, count, *, experts=None):
    """Neurons of layer 0; the n-th fires on " up" and is driven down by " down", in a text that names it.

    With `experts`, those of one follow those of another.
    """
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
        neurons=nth[: count // (experts or 1)],
        kinds=["max", "min"],
        k=1,
        tokens=3,
        activation_dtype="float32",
        experts=None if experts is None else np.arange(experts),
        shared=None if experts is None else np.zeros((1, experts), bool),
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


FINE = answers(explanation_for)


def serve(provider, plan):
    return (openai_server if provider == "openai" else gemini_server)(plan)


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


def refusal(config):
    """The one sentence that a run ends with."""
    with pytest.raises(JaxplainError) as raised:
        explain(config)
    assert "\n" not in str(raised.value)
    return str(raised.value)
