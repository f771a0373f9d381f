"""The mesh, batch and number of runs that a plan proposes."""

import dataclasses

import pytest

from jaxplain.planning.fitting import chosen, largest_batch, propose, propose_runs
from jaxplain.planning.hardware import target_of
from jaxplain.planning.memory import memory
from tests.planning.demands import demand


def target(devices, size):
    return target_of(topology=None, devices=devices, memory=str(int(size)))


def needed(asked, *, model, rows, data=1):
    return memory(asked, data=data, model=model, batch=rows * data, tiled=False).total


def test_the_largest_batch_fits_and_no_larger_one_does():
    asked = demand()
    devices = target(8, needed(asked, model=2, rows=21, data=4) + 100)
    found = largest_batch(asked, devices, data=4, model=2)
    assert found.batch == 84
    assert found.memory == memory(asked, data=4, model=2, batch=84, tiled=False)
    assert largest_batch(asked, target(8, needed(asked, model=2, rows=1) - 1), data=4, model=2) is None


def test_without_need_nothing_is_spread_over_model():
    asked = demand()
    found = propose(asked, target(8, needed(asked, model=1, rows=64) + 100))
    assert (found.data, found.model, found.batch) == (8, 1, 512)


def test_a_model_axis_as_small_as_memory_allows():
    asked = demand()
    size = needed(asked, model=4, rows=16)
    assert size < needed(asked, model=2, rows=16)
    found = propose(asked, target(8, size))
    assert (found.data, found.model, found.batch) == (2, 4, 32)
    assert found.memory.total <= size


def test_a_mesh_divides_devices_and_neurons():
    asked = demand()
    found = propose(asked, target(12, needed(asked, model=4, rows=16)))
    assert (found.data, found.model) == (3, 4)
    arch = dataclasses.replace(asked.arch, neurons=1023)
    odd = dataclasses.replace(asked, selection=dataclasses.replace(asked.selection, arch=arch))
    assert propose(odd, target(8, 2**40)).model == 1


def test_small_batches_where_no_mesh_allows_larger_ones():
    asked = demand()
    found = propose(asked, target(2, needed(asked, model=2, rows=3) + 100))
    assert (found.data, found.model, found.batch) == (1, 2, 3)


def test_runs_over_some_layers_where_all_do_not_fit():
    asked = demand(exemplars={"k": 300, "kinds": ["max", "min"]})
    whole = propose_runs(asked, target(2, 2**40))
    assert whole.layers == [[0, 1, 2]]
    last = asked.of_layers([1, 2])
    found = propose_runs(asked, target(2, needed(last, model=2, rows=16)))
    assert found.layers == [[0, 1], [2]]
    assert found.hardest == [1, 2]
    batch = found.choice.batch
    assert found.choice.memory == chosen(last, target(2, 1), data=1, model=2, batch=batch).memory
    assert batch >= 16, "what a checkpoint takes leaves room for larger steps"
    assert found.choice.memory.total <= needed(last, model=2, rows=16)
    single = propose_runs(asked, target(2, needed(asked.of_layers([2]), model=2, rows=1)))
    assert single.layers == [[0], [1], [2]]
    assert propose_runs(asked, target(2, 2**20)) is None


@pytest.mark.parametrize("layers", [[0, 2], [1]])
def test_runs_are_over_the_layers_that_are_asked_for(layers):
    asked = demand(neurons={"layers": layers})
    assert propose_runs(asked, target(8, 2**40)).layers == [layers]
