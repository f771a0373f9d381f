"""Runs to plan, of architectures and configs made here."""

import dataclasses

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.exemplars.selection import select_neurons
from jaxplain.planning.demand import demand_of
from jaxplain.subjects.architecture import Architecture

ARCH = Architecture(
    vocabulary=512,
    layers=3,
    width=256,
    neurons=1024,
    query_heads=8,
    key_value_heads=2,
    head_width=32,
    max_positions=512,
)

MIXTURE = dataclasses.replace(
    ARCH,
    experts=4,
    experts_per_token=2,
    expert_neurons=256,
    shared_neurons=512,
    dense_layers=(True, False, False),
)
"""A plain layer, and two of experts, of which a token is routed to two, with a shared one."""


def config(**blocks):
    """A config, with the fields of blocks changed."""
    fields = {
        "subject": {"id": "model", "dtype": "float32"},
        "corpus": {"sources": ({"dataset": "json"},), "sequence_length": 128, "max_sequences": 1000},
        "exemplars": {"splits": ["train"], "kinds": ["max", "random"], "k": 4},
        "statistics": {"sampled_tokens": 32},
        "neurons": {},
        "run": {},
        "output": "out",
    }
    for name, values in blocks.items():
        fields[name] = fields[name] | values if isinstance(values, dict) else values
    return parsed(fields)


def parsed(fields):
    """A config from its fields."""
    import json

    from jaxplain.commands import config_parser, parse_config

    arguments = []
    for block, values in fields.items():
        items = {block: values} if isinstance(values, str) else {f"{block}.{k}": v for k, v in values.items()}
        for name, value in items.items():
            arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return parse_config(config_parser(ExtractConfig, "extract"), ExtractConfig, arguments)[0]


def demand(arch=ARCH, **blocks):
    """What a config asks for of a subject."""
    made = config(**blocks)
    return demand_of(made, select_neurons(made.neurons, arch))
