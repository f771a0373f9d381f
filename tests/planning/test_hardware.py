"""How devices are named."""

import pytest

from jaxplain.errors import JaxplainError
from jaxplain.planning.hardware import CHIPS, GIB, parse_bytes, target_of


def target(topology=None, devices=None, memory=None):
    return target_of(topology=topology, devices=devices, memory=memory)


@pytest.mark.parametrize(
    ("topology", "devices", "hosts"),
    [
        ("v5e:2x4", 8, 1),
        ("v5e:4x4", 16, 4),
        ("v5e:16x16", 256, 64),
        ("v6e:2x4", 8, 1),
        ("v4:2x2x1", 4, 1),
        ("v5p:2x2x2", 8, 2),
        ("v5p:4x4x4", 64, 16),
        ("h100:8", 8, 1),
        ("a100:12", 12, 2),
    ],
)
def test_topologies(topology, devices, hosts):
    found = target(topology)
    assert (found.devices, found.hosts) == (devices, hosts)
    chip = CHIPS[topology.split(":")[0]]
    assert found.memory == chip.usable <= 1.01 * chip.memory
    assert found.peaks == {"bfloat16": chip.bfloat16, "float32": chip.float32}
    assert found.tiled == (found.topology is not None) == topology.startswith("v")


def test_other_devices_have_memory_and_no_speed():
    found = target(devices=12, memory="80GiB")
    assert (found.devices, found.hosts, found.memory) == (12, 2, 80 * GIB)
    assert found.peaks == {}
    assert not found.tiled


def test_memory_of_a_known_device_can_be_given():
    assert target("h100:8", memory="76 GiB").memory == 76 * GIB


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("16 GB", 16e9), ("1.5TiB", 1.5 * 2**40), ("4096", 4096), ("1mib", 2**20)],
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({}, "no devices are named; give --topology, such as v5e:4x4"),
        ({"devices": 8}, "no devices are named"),
        ({"devices": 0, "memory": "1GiB"}, "--devices is 0; give 1 or more."),
        ({"devices": 8, "memory": "much"}, "--memory is 'much'; give an amount such as 80GiB."),
        ({"devices": 8, "memory": "0GiB"}, "--memory is '0GiB'; give an amount"),
        ({"topology": "v5e"}, "--topology is 'v5e'; give one of v4, v5e"),
        ({"topology": "v9:2x2"}, "--topology is 'v9:2x2'; give one of v4, v5e"),
        ({"topology": "v5e:0x4"}, "--topology is 'v5e:0x4'; give 1 or more devices."),
        ({"topology": "v5e:4x4", "devices": 16}, "--devices is 16; --topology v5e:4x4 says that already"),
    ],
)
def test_bad_names_are_refused(named, sentence):
    with pytest.raises(JaxplainError) as error:
        target(**named)
    assert str(error.value).startswith(sentence)


def test_figures_have_sources():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.float32 < chip.bfloat16 / 5
        assert chip.memory >= 16 * GIB
