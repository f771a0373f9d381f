"""Token tables: exact where the store holds everything, and nearly unbiased where it does not."""

import numpy as np
import pytest

from jaxplain.explainers.token_means import describe_tokens, token_means
from tests.explainers.stores import make_split

WORDS = [b"%d" % i for i in range(12)]


def brute_force(token_NT, acts_NT, counted_NT):
    """Each token's mean, counted once more at the overall mean; and how often it occurs."""
    overall = max(acts_NT[counted_NT].mean(), 0)
    found = {}
    for token in np.unique(token_NT[counted_NT]):
        values = acts_NT[counted_NT & (token_NT == token)]
        found[int(token)] = ((values.sum() + overall) / (len(values) + 1), len(values))
    return found


@pytest.mark.parametrize("sign", ["max", "min"])
@pytest.mark.parametrize(
    ("kinds", "k"), [(("max", "min"), 30), (("max", "min", "random"), 30), (("max", "min", "random"), 17)]
)
def test_exact_where_the_store_holds_all_sequences(tmp_path, sign, kinds, k):
    rng = np.random.default_rng(1)
    token_NT = rng.integers(0, len(WORDS), (30, 9))
    token_NT[4, 5:] = -1
    acts_NTF = np.round(rng.standard_normal((30, 9, 2)) * 64) / 64
    counted_NT = (token_NT >= 0) & (rng.random((30, 9)) < 0.8)
    acts_NTF[(token_NT == 11) & counted_NT, 0] = 40  # never counts, however strong
    counted_NT &= token_NT != 11
    # With k of 17 both samples together hold everything, if the second takes what the first leaves.
    lottery_NF = np.zeros((30, 2))
    extreme_NF = np.where(counted_NT[..., None], acts_NTF, -np.inf).max(1)
    if sign == "min":
        extreme_NF = -np.where(counted_NT[..., None], acts_NTF, np.inf).min(1)
    for f in range(2):
        lottery_NF[:, f] = -extreme_NF[:, f].argsort().argsort()
    split = make_split(
        tmp_path / "exemplars.zarr",
        token_NT,
        acts_NTF,
        k=k,
        words=WORDS,
        kinds=kinds,
        counted_NT=counted_NT,
        lottery_NF=lottery_NF,
    )
    for f in range(2):
        means = token_means(split.neuron(0, f), sign)
        expected = brute_force(token_NT, acts_NTF[..., f] * (1 if sign == "max" else -1), counted_NT)
        assert set(means.tokens.tolist()) == set(expected)
        assert 11 not in expected
        for token, mean, count in zip(means.tokens, means.means, means.counts, strict=True):
            np.testing.assert_allclose(mean, expected[int(token)][0], rtol=1e-5, atol=1e-6)
            assert count == expected[int(token)][1]
        assert (np.diff(means.means) <= 0).all(), "strongest first"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Of 150 sequences, 12 extreme ones and, for every neuron anew, 12 random ones."""
    rng = np.random.default_rng(5)
    token_NT = rng.integers(0, len(WORDS), (150, 6))
    acts_NT = np.round((token_NT / 8 + rng.standard_normal((150, 6)) ** 3) * 32) / 32
    neurons = 200
    return (
        token_NT,
        acts_NT,
        make_split(
            tmp_path_factory.mktemp("means") / "exemplars.zarr",
            token_NT,
            acts_NT[..., None].repeat(neurons, 2),
            k=12,
            words=WORDS,
            lottery_NF=rng.random((150, neurons)),
        ),
    )


def naive(neuron, sign):
    """Means over whatever is stored, which favour what is extreme."""
    found = [*neuron.exemplars(sign), *neuron.exemplars("random")]
    tokens = np.concatenate([e.tokens for e in found])
    acts = np.concatenate([e.activations for e in found]) * (1 if sign == "max" else -1)
    return np.array([acts[tokens == t].mean() if (tokens == t).any() else np.nan for t in range(12)])


@pytest.mark.parametrize("sign", ["max", "min"])
def test_a_sample_is_nearly_unbiased(sampled, sign):
    token_NT, acts_NT, split = sampled
    signed_NT = acts_NT * (1 if sign == "max" else -1)
    truth = np.array([signed_NT[token_NT == token].mean() for token in range(12)])
    estimates, naively = [], []
    for f in split.neurons.tolist():
        means = token_means(split.neuron(0, f), sign)
        row = np.full(12, np.nan)
        row[means.tokens] = means.means
        estimates.append(row)
        if f < 20:
            naively.append(naive(split.neuron(0, f), sign))
    bias = np.nanmean(estimates, 0) - truth
    naive_bias = np.nanmean(naively, 0) - truth
    spread = np.nanstd(estimates, 0)
    assert (np.abs(bias) < 0.25 * spread + 0.05).all()
    assert naive_bias.mean() > 1, "what the estimator is there for"
    assert np.abs(bias.mean()) < 0.1


def test_neurons_without_exemplars_have_no_means(tmp_path):
    token_NT = np.zeros((3, 2), int)
    split = make_split(
        tmp_path / "exemplars.zarr",
        token_NT,
        np.ones((3, 2, 1)),
        k=2,
        words=WORDS,
        counted_NT=np.zeros((3, 2), bool),
    )
    means = token_means(split.neuron(0, 0), "max")
    assert len(means.tokens) == len(means.means) == len(means.counts) == 0


@pytest.mark.parametrize(
    ("names", "described"),
    [
        (["a"], 'tokens such as "a"'),
        ([" Bank", "bank", "banks", "BANK "], 'tokens such as " Bank", "banks"'),
        (["a", "b", "a", "a"], 'tokens such as "a", "b"'),
        (["b", " ", "  ", "\n", " "], 'tokens such as "b", " ", "  ", "\n"'),
        (["É", "é", "e"], 'tokens such as "É", "e"'),
    ],
)
def test_described_once_whatever_case_and_spaces(names, described):
    assert describe_tokens(names) == described
