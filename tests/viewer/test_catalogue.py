"""Names and rows of neurons."""

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.store.neuron_id import NeuronId
from jaxplain.viewer.catalogue import Catalogue
from tests.viewer import runs


@pytest.fixture(params=["run", "mixture"])
def split(request):
    return jaxplain.open_store(request.getfixturevalue(request.param))["train"]


def names_of(split):
    return runs.neurons(split.experts)


def test_rows_are_those_of_the_names_that_are_held(split):
    catalogue = Catalogue(split)
    names = names_of(split)
    assert [catalogue.neuron(row) for row in range(len(catalogue))] == names
    assert catalogue.rows_of(np.array(names)).tolist() == list(range(len(names)))
    near = [NeuronId.of(n.layer + 1, n.expert, n.index) for n in names]
    near += [NeuronId.of(n.layer, n.expert, n.index + 2) for n in names]
    expected = [names.index(n) if n in names else -1 for n in near]
    assert -1 in expected
    assert catalogue.rows_of(np.array(near)).tolist() == expected
    assert catalogue.row_of(NeuronId((99, 99, 99)[: len(names[0])])) is None
    assert catalogue.row_of(NeuronId((0,))) is None


def test_some_of_them(split):
    names = names_of(split)
    chosen = Catalogue(split, chosen=[names[5], names[2]])
    everything = Catalogue(split)
    assert [chosen.neuron(row) for row in range(len(chosen))] == [names[2], names[5]]
    assert chosen.column("mean").tolist() == everything.column("mean")[[2, 5]].tolist()
    assert chosen.row_of(names[3]) is None
    assert chosen.beside(names[2]) == (None, names[5])
    assert chosen.beside(names[3]) == (None, None)
    # A neuron may be in another split alone.
    one = Catalogue(split, chosen=[names[2], NeuronId((99, *names[2][1:]))])
    assert [one.neuron(row) for row in range(len(one))] == [names[2]]


def test_columns_are_those_of_each_neuron(split):
    catalogue = Catalogue(split)
    for row, name in enumerate(names_of(split)):
        neuron = split.neuron_called(name)
        assert catalogue.column("skewness")[row] == np.float32(neuron.stats.skewness)
        assert catalogue.column("quantile 0.1")[row] == np.float32(neuron.quantiles[0.1])
        assert catalogue.column("lowest")[row] == np.float32(neuron.exemplars("min")[0].score)
    with pytest.raises(JaxplainError, match="'nothing' is no statistic"):
        catalogue.column("nothing")
