"""Strata, quantiles and token tables of a whole run, from the command line to the reader."""

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.configs.extraction import QUANTILES
from jaxplain.corpora.hashing import lottery
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import counted_tokens
from jaxplain.exemplars.strata import plan_strata
from jaxplain.extract import main
from jaxplain.show import main as show
from tests import oracle, tiny
from tests.exemplars.test_strata import in_strata
from tests.subjects.test_decoder import make_mesh, sown_activations

SEQUENCES, TOKENS, WANTED, SEED = 300, 12, 2, 5
LEVELS = (0.25, 0.5, 0.75, 0.9, 0.99)
PAIRS = [(0, 3), (0, 40), (2, 11)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model, a corpus, and a config that asks for every statistic."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny.write_model(folder / "model")
    tiny.write_corpus(folder / "docs.jsonl", 250)
    config = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": TOKENS,
            "max_sequences": SEQUENCES,
            "splits": {"train": 1.0},
            "seed": SEED,
            "exclude": {"special": True, "first": 1},
        },
        "exemplars": {
            "splits": ["train"],
            "kinds": ["max", "min", "random", "quantile"],
            "k": 6,
            "samples_per_quantile": WANTED,
            "activation_dtype": "float32",
        },
        "statistics": {
            "sampled_tokens": 500,
            "tokens": {"neurons": [list(pair) for pair in PAIRS], "count": 7, "min_count": 3},
        },
        "run": {"batch_size": 16, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def extract(workspace, output, *arguments):
    main(["--config", str(workspace / "config.yaml"), "--output", str(output), *arguments])
    return jaxplain.open_store(output)["train"]


@pytest.fixture(scope="module")
def split(workspace):
    return extract(workspace, workspace / "run", "--run.mesh.model", "2")


@pytest.fixture(scope="module")
def truth(workspace, split):
    """All activations [L N T F], which tokens count, and the token table."""
    rows = split.sequences(np.arange(split.sequence_count))
    acts_LNTF, _ = sown_activations(workspace / "model", rows["token"].clip(0), make_mesh())
    return np.asarray(acts_LNTF), counted_tokens(rows["token"], excluded=frozenset(range(4)), first=1), rows


def turns_of(rows, counted_NT):
    drawn_N = np.where(counted_NT.any(1), lottery(SEED, rows["document"], rows["start"]), -1)
    return np.argsort(np.argsort(-drawn_N, kind="stable"), kind="stable")


def test_kind_quantile_equals_brute_force(split, truth):
    acts_LNTF, counted_NT, rows = truth
    assert split.sequence_count == SEQUENCES
    turn_N = turns_of(rows, counted_NT)
    strata = plan_strata(LEVELS, wanted=WANTED, rows=int(counted_NT.any(1).sum()))
    assert split.strata == tuple((s.low, s.high) for s in strata)
    for layer in (0, 2):
        highest_NF = np.where(counted_NT[..., None], acts_LNTF[layer], -np.inf).max(1)
        for index, expected in enumerate(in_strata(highest_NF, turn_N, strata, WANTED)):
            found = split.neuron(layer, index).exemplars("quantile")
            assert [(e.sequence, e.stratum) for e in found] == [(n, split.strata[s]) for n, s in expected]
            for rank, exemplar in enumerate(found):
                assert exemplar.rank == rank
                np.testing.assert_allclose(
                    exemplar.score, highest_NF[exemplar.sequence, index], rtol=1e-5, atol=1e-5
                )
                np.testing.assert_allclose(np.nanmax(exemplar.activations), exemplar.score, rtol=1e-5)
    strata_of_first = [e.stratum for e in split.neuron(0, 0).exemplars("quantile")]
    assert strata_of_first == [stratum for stratum in split.strata[::-1] for _ in range(WANTED)]
    assert split.neuron(0, 0).exemplars("max")[0].stratum is None


def test_quantiles_against_all_activations(split, truth):
    acts_LNTF, counted_NT, _ = truth
    counted = acts_LNTF[1][counted_NT]
    assert split.quantile_levels == QUANTILES
    for index in range(0, 48, 5):
        neuron = split.neuron(1, index)
        ordered = np.sort(counted[:, index].astype(np.float64))
        found = np.array([neuron.quantiles[level] for level in QUANTILES])
        assert (np.diff(found) >= 0).all()
        outer = [i for i, level in enumerate(QUANTILES) if level <= 1e-3 or level >= 1 - 1e-3]
        expected = np.quantile(ordered, np.array(QUANTILES)[outer])
        np.testing.assert_allclose(found[outer], expected, atol=1e-5)
        # Dvoretzky, Kiefer and Wolfowitz with 500 tokens, once in a thousand times.
        shares = np.searchsorted(ordered, found) / len(ordered)
        assert np.abs(shares - QUANTILES).max() < np.sqrt(np.log(2 / 1e-3) / 1000)


def test_a_quantile_at_any_level(split, truth):
    acts_LNTF, counted_NT, _ = truth
    neuron = split.neuron(1, 7)
    counted = acts_LNTF[1][counted_NT][:, 7].astype(np.float64)
    assert neuron.quantile(0.99) == neuron.quantiles[0.99]
    for level in (0.0, 0.0003, 0.9996, 1.0):
        np.testing.assert_allclose(neuron.quantile(level), np.quantile(counted, level), atol=1e-5)
    between = (neuron.quantiles[0.5] + neuron.quantiles[0.75]) / 2
    assert neuron.quantile(0.625) == pytest.approx(between)
    for level in (-0.1, 1.1, float("nan")):
        with pytest.raises(JaxplainError, match=r"level is .*; give a number from 0 to 1"):
            neuron.quantile(level)


def exact_means(truth, layer, index):
    acts_LNTF, counted_NT, rows = truth
    tokens, acts = rows["token"][counted_NT], acts_LNTF[layer][counted_NT][:, index].astype(np.float64)
    means = [(acts[tokens == t].mean(), -int(t), int((tokens == t).sum())) for t in np.unique(tokens)]
    return [(-token, mean, count) for mean, token, count in sorted(means, reverse=True) if count >= 3]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("sign", ["max", "min"])
def test_token_tables_of_chosen_neurons_are_exact(split, truth, pair, sign):
    expected = exact_means(truth, *pair)
    expected = expected[:7] if sign == "max" else expected[::-1][:7]
    found = split.neuron(*pair).tokens(sign)
    assert [(t.token, t.count) for t in found] == [(token, count) for token, _, count in expected]
    np.testing.assert_allclose([t.mean for t in found], [mean for _, mean, _ in expected], atol=1e-5)
    assert all(t.exact for t in found)
    vocabulary = split.store.vocabulary
    assert [t.text for t in found] == [vocabulary.text(np.array([t.token])) for t in found]
    assert split.neuron(*pair).tokens(sign, limit=2) == found[:2]


def test_other_neurons_tokens_are_estimated_and_say_so(split):
    found = split.neuron(1, 3).tokens()
    assert found
    assert not any(t.exact for t in found)
    assert [t.mean for t in found] == sorted((t.mean for t in found), reverse=True)
    lowest = split.neuron(1, 3).tokens("min", limit=4)
    assert [t.mean for t in lowest] == sorted(t.mean for t in lowest)
    for neuron in (split.neuron(0, 3), split.neuron(1, 3)):
        with pytest.raises(JaxplainError, match="sign is 'random'; give max or min"):
            neuron.tokens("random")


def test_estimates_are_exact_where_everything_is_stored(workspace, tmp_path):
    arguments = ["--exemplars.k", "20", "--corpus.max_sequences", "20", "--statistics.tokens.min_count", "1"]
    split = extract(
        workspace, tmp_path, *arguments, "--statistics.tokens.count", "500", "--neurons.layers", "[0,2]"
    )
    exact = split.neuron(0, 40).tokens()
    split._token_table_rows.clear()
    estimated = split.neuron(0, 40).tokens()
    assert sorted((t.token, t.count) for t in exact) == sorted((t.token, t.count) for t in estimated)
    means = {t.token: t.mean for t in exact}
    np.testing.assert_allclose([t.mean for t in estimated], [means[t.token] for t in estimated], atol=1e-5)


COMPARED = {
    "quantile_sample": ("sequence", "stratum", "score", "activation"),
    "stats": (*("mean", "variance", "skewness", "kurtosis"), "count", "quantile"),
}


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1)])
def test_every_mesh_and_batch_size_gives_the_same(split, workspace, tmp_path, mesh):
    arguments = ["--run.mesh.data", str(mesh[0]), "--run.mesh.model", str(mesh[1]), "--run.batch_size", "40"]
    other = extract(workspace, tmp_path, *arguments)
    for layer in range(3):
        for group, names in COMPARED.items():
            arrays = [s.layer_arrays(layer, *(f"{group}/{n}" for n in names)) for s in (split, other)]
            for name, ours, theirs in zip(names, *arrays, strict=True):
                tolerance = {} if ours.dtype.kind == "i" else {"rtol": 1e-3, "atol": 1e-5}
                np.testing.assert_allclose(ours, theirs, **tolerance, err_msg=name)
    for pair in PAIRS:
        ours, theirs = (s.neuron(*pair).tokens() for s in (split, other))
        assert [(t.token, t.count) for t in ours] == [(t.token, t.count) for t in theirs]
        np.testing.assert_allclose([t.mean for t in ours], [t.mean for t in theirs], atol=1e-5)


def test_chosen_neurons_have_the_same_statistics(split, workspace, tmp_path):
    arguments = [
        "--neurons.indices",
        "[3, 11, 40]",
        "--run.mesh.model",
        "2",
        "--statistics.tokens.neurons",
        "9",
    ]
    part = extract(workspace, tmp_path, *arguments)
    chosen = [(layer, index) for layer in range(3) for index in (3, 11, 40)]
    for pair in chosen:
        ours, theirs = (s.neuron(*pair).exemplars("quantile") for s in (split, part))
        assert [(e.sequence, e.stratum) for e in ours] == [(e.sequence, e.stratum) for e in theirs]
    exact = [pair for pair in chosen if part.neuron(*pair).tokens()[0].exact]
    assert exact == chosen
    for pair in PAIRS:
        assert [t.token for t in part.neuron(*pair).tokens()] == [
            t.token for t in split.neuron(*pair).tokens()
        ]


def test_every_field_changes_something(split, workspace, tmp_path, capsys):
    arguments = [
        *(
            "--exemplars.kinds",
            "[quantile]",
            "--exemplars.strata",
            "[0.5]",
            "--exemplars.samples_per_quantile",
            "3",
        ),
        *("--statistics.quantiles", "[0.1, 0.5]", "--statistics.sampled_tokens", "50"),
        *("--statistics.active_above", "0.05", "--statistics.tokens.neurons", "0"),
    ]
    other = extract(workspace, tmp_path, *arguments)
    assert other.kinds == ("quantile",)
    assert other.strata == ((0.0, 0.5), (0.5, 1.0))
    found = other.neuron(0, 3).exemplars("quantile")
    assert [e.stratum for e in found] == [(0.5, 1.0)] * 3 + [(0.0, 0.5)] * 3
    assert list(other.neuron(0, 3).quantiles) == [0.1, 0.5]
    medians = [[s.neuron(0, i).quantiles[0.5] for i in range(20)] for s in (split, other)]
    assert not np.allclose(*medians), "other tokens were drawn"
    np.testing.assert_allclose(*medians, atol=0.3)
    active = [[s.neuron(0, i).stats.fraction_active for i in range(20)] for s in (split, other)]
    assert (np.array(active[0]) > active[1]).any()
    with pytest.raises(JaxplainError, match="no exemplars of kind 'max'; it holds quantile"):
        other.neuron(0, 3).tokens()
    with pytest.raises(
        JaxplainError, match=r"quantile at 0\.9 is not known: the store's levels are from 0\.1 to 0\.5"
    ):
        other.neuron(0, 3).quantile(0.9)
    assert other.store.fingerprint != split.store.fingerprint
    show([str(tmp_path), "--layer", "0", "--neuron", "3", "--kind", "quantile"])
    shown = capsys.readouterr().out
    assert f"above 0.05 {other.neuron(0, 3).stats.fraction_active:.1%}" in shown
    assert shown.count("\n") >= 7


def test_without_quantiles_none_are_known(split, workspace, tmp_path):
    arguments = [
        "--statistics.quantiles",
        "[]",
        "--neurons.layers",
        "[0]",
        "--statistics.tokens.neurons",
        "1",
    ]
    other = extract(workspace, tmp_path, *arguments)
    neuron = other.neuron(0, 3)
    assert neuron.quantiles == {}
    assert neuron.quantile(1.0) == neuron.exemplars("max")[0].score
    with pytest.raises(JaxplainError, match=r"quantile at 0\.5 is not known: the store's levels are none"):
        neuron.quantile(0.5)
    whole = split.neuron(0, 3)
    assert [e.sequence for e in neuron.exemplars()] == [e.sequence for e in whole.exemplars()]


def test_statistics_are_not_what_explanations_depend_on(split):
    """A database of explanations knows its store by the fingerprint."""
    attributes = split.store.attributes
    config = {name: block for name, block in attributes["config"].items() if name != "statistics"}
    old = jaxplain.Store(split.store._files, attributes | {"config": config})
    assert old.fingerprint == split.store.fingerprint


def test_xarray_has_everything(split):
    tree = split.to_xarray()
    assert set(tree["quantile_sample"].data_vars) == {"score", "sequence", "activation", "stratum", "level"}
    stratum = tree["quantile_sample"]["stratum"].sel(layer=0, neuron=0)
    assert stratum.dims == ("rank",)
    assert stratum.values.tolist() == np.repeat([5, 4, 3, 2, 1, 0], WANTED).tolist()
    assert tree["quantile_sample"]["level"].values.tolist() == [0, *LEVELS, 1]
    quantile = tree["stats"]["quantile"].sel(layer=1, neuron=7, quantile=0.99)
    assert float(quantile) == pytest.approx(split.neuron(1, 7).quantiles[0.99])
    # What has the name of one of its axes is a coordinate to xarray.
    assert set(tree["stats"].to_dataset(inherit=False).variables) == {
        *("count", "mean", "variance", "skewness", "kurtosis", "fraction_active", "quantile")
    }
    table = tree["token_table"]
    pairs = zip(table["chosen_layer"].values.tolist(), table["chosen_neuron"].values.tolist(), strict=True)
    assert [*pairs] == PAIRS
    for sign in ("max", "min"):
        tokens = [t.token for t in split.neuron(*PAIRS[1]).tokens(sign)]
        assert table[sign]["token"].values[1].tolist() == tokens
        assert table[sign]["mean"].dims == table[sign]["count"].dims == ("chosen", "rank")


def test_statistics_are_those_of_the_oracle(split, truth):
    acts_LNTF, counted_NT, _ = truth
    expected = oracle.statistics(acts_LNTF[2], counted_NT)
    names = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
    for name, values in zip(names, expected, strict=True):
        np.testing.assert_allclose(getattr(split.neuron(2, 5).stats, name), values[5], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--exemplars.strata", "[0.5, 0.2]"],
            r"exemplars.strata is \[0.5, 0.2\]; give numbers between 0 and 1",
        ),
        (
            ["--exemplars.strata", "[0.5, 1.0]"],
            r"exemplars.strata is \[0.5, 1.0\]; give numbers between 0 and 1",
        ),
        (["--exemplars.samples_per_quantile", "0"], "samples_per_quantile is 0; give a positive number"),
        (["--statistics.sampled_tokens", "0"], "statistics.sampled_tokens is 0; give 1 or more"),
        (["--statistics.quantiles", "[0.5, 1.5]"], "give numbers from 0 to 1 that ascend"),
        (["--statistics.tokens.neurons", "-1"], "tokens.neurons is -1; give pairs such as"),
        (["--statistics.tokens.neurons", "[]"], r"tokens.neurons is \[\]; give pairs such as"),
        (["--statistics.tokens.neurons", "[[1]]"], r"is \[\[1\]\]; give pairs such as"),
        (["--statistics.tokens.neurons", "[[1, 2, 3, 4]]"], r"3, 4\]\]; give pairs such as"),
        (["--statistics.tokens.neurons", "[[1, 2, 3]]"], r"\[1, 2, 3\], but .* a layer and an index"),
        (["--statistics.tokens.neurons", "[[3, 2]]"], "names neuron 2 of layer 3, which is not among those"),
        (["--statistics.tokens.count", "0"], "statistics.tokens.count is 0; give 1 or more"),
        (["--statistics.tokens.min_count", "0"], "statistics.tokens.min_count is 0; give 1 or more"),
        (["--statistics.tokens.neurons", "some"], "statistics.tokens.neurons"),
    ],
)
def test_bad_input(workspace, tmp_path, arguments, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        extract(workspace, tmp_path / "run", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
