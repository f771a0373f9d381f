"""Which neurons of a store are explained, and what is said of those that it does not hold."""

import itertools

import numpy as np
import pytest

from jaxplain.configs.explanation import ChosenNeuronsConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.choosing import choose_neurons, held_neurons
from tests.explainers.stores import make_split

LAYERS, NEURONS = (1, 4, 7), 6
HELD_LF = np.ones((3, NEURONS), bool)
HELD_LF[1, 2] = HELD_LF[2, 0] = False
HELD = [(LAYERS[place], int(f)) for place, f in np.argwhere(HELD_LF)]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    acts_NTF = np.round(np.random.default_rng(0).standard_normal((5, 8, NEURONS)) ** 3 * 16) / 16
    acts_NTF[..., 1] = 2.0  # never varies
    acts_NTF[:2, ..., 5] = np.abs(acts_NTF[:2, ..., 5]) + 1
    return make_split(
        tmp_path_factory.mktemp("choosing") / "exemplars.zarr",
        np.zeros((5, 8), int),
        acts_NTF,
        k=2,
        words=[b"a"],
        layers=LAYERS,
        held_LF=HELD_LF,
    )


def choose(split, **config):
    return choose_neurons(ChosenNeuronsConfig(**config), split)


def test_all_that_are_held(split):
    assert held_neurons(split) == HELD
    assert choose(split) == HELD


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([4], {4}),
        ([7, 1, 7], {1, 7}),
        ("all", {1, 4, 7}),
        ("4:", {4, 7}),
        ("0:4", {1}),
        ("1:8:3", {1, 4, 7}),
        ("-1:", {7}),
        (":", {1, 4, 7}),
    ],
)
def test_layers(split, layers, expected):
    assert choose(split, layers=layers) == [pair for pair in HELD if pair[0] in expected]


@pytest.mark.parametrize(("indices", "expected"), [([0, 2], {0, 2}), ("::2", {0, 2, 4}), ("-2:", {4, 5})])
def test_indices(split, indices, expected):
    assert choose(split, indices=indices) == [pair for pair in HELD if pair[1] in expected]
    assert choose(split, layers=[7], indices=indices) == [p for p in HELD if p[0] == 7 and p[1] in expected]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": [1, 2]}, "neurons.layers names layer 2, but the store holds 3 layers from 1 to 7"),
        ({"layers": [-1]}, "neurons.layers names layer -1"),
        ({"indices": [6]}, "neurons.indices names neuron 6, but the store holds 6 neurons from 0 to 5"),
        ({"layers": "2:4"}, "none of those chosen is in the store"),
        ({"layers": [4], "indices": [2]}, "none of those chosen is in the store"),
        ({"layers": []}, "none of those chosen is in the store"),
        ({"layers": "first"}, "neurons.layers is 'first'; write a range"),
        ({"layers": [4], "by": "random", "count": 6}, "neurons.count is 6, but 5 neurons are there"),
    ],
)
def test_what_is_not_there(split, config, message):
    with pytest.raises(JaxplainError, match=message):
        choose(split, **config)


def test_pairs_in_a_file(split, tmp_path):
    file = tmp_path / "pairs.npy"
    np.save(file, np.array([[7, 5], [1, 0], [4, 1], [1, 0]], np.uint16))
    assert choose(split, file=str(file)) == [(1, 0), (4, 1), (7, 5)]
    assert choose(split, file=str(file), by="kurtosis", count=1) in ([(1, 0)], [(7, 5)])


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ((4, 2), "neuron 2 of layer 4"),
        ((7, 0), "neuron 0 of layer 7"),
        ((2, 0), "neuron 0 of layer 2"),
        ((1, 6), "neuron 6 of layer 1"),
        ((-1, 0), "neuron 0 of layer -1"),
    ],
)
def test_pairs_that_the_store_does_not_hold_are_named(split, tmp_path, pair, named):
    file = tmp_path / "pairs.npy"
    np.save(file, np.array([(1, 0), pair]))
    message = rf"{named}, which is not among the 16 neurons in the store"
    with pytest.raises(JaxplainError, match=message):
        choose(split, file=str(file))


@pytest.mark.parametrize("statistic", ["kurtosis", "fraction_active"])
def test_the_highest_of_a_statistic(split, statistic):
    def value(pair):
        return getattr(split.neuron(*pair).stats, statistic)

    varying = [pair for pair in HELD if not np.isnan(value(pair))]
    for count in range(1, len(varying) + 1):
        chosen = choose(split, by=statistic, count=count)
        assert len(chosen) == count
        assert chosen == sorted(chosen)
        rest = set(varying) - set(chosen)
        assert min(map(value, chosen)) >= max(map(value, rest), default=-np.inf)
    top = max(HELD, key=lambda pair: np.nan_to_num(value(pair)))
    assert choose(split, by=statistic, count=1) == [top], "of equals, the first"


def test_neurons_that_never_vary_come_last(split):
    steady = [pair for pair in HELD if pair[1] == 1]
    assert all(np.isnan(split.neuron(*pair).stats.kurtosis) for pair in steady)
    assert choose(split, by="kurtosis", count=13) == [pair for pair in HELD if pair not in steady]
    assert choose(split, by="kurtosis", count=14) == [p for p in HELD if p not in steady[1:]]
    assert choose(split, by="kurtosis", count=16) == HELD
    assert choose(split, by="fraction_active", count=3) == steady


def test_random_ones(split):
    draws = [choose(split, by="random", count=4, seed=seed) for seed in range(30)]
    assert draws == [choose(split, by="random", count=4, seed=seed) for seed in range(30)]
    assert all(draw == sorted(set(draw)) and len(draw) == 4 for draw in draws)
    assert set(itertools.chain(*draws)) == set(HELD)
    assert len({tuple(draw) for draw in draws}) > 20
    within = choose(split, layers=[4], by="random", count=5)
    assert within == [pair for pair in HELD if pair[0] == 4]
