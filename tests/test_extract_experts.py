"""Extraction from mixtures of experts: the store against brute force, its layout and reader, bad input."""

import numpy as np
import pytest
import xarray
import yaml
import zarr

import jaxplain
from jaxplain.corpora.hashing import lottery
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.extraction import counted_tokens
from jaxplain.extract import main
from jaxplain.show import main as show
from jaxplain.store.quantiles import lower_tail, quantiles, upper_tail
from tests import families, oracle, tiny
from tests.subjects.test_decoder import make_mesh, sown_activations

SEQUENCES, K = 30, 5
MODEL = families.QWEN2_MOE | {"mlp_only_layers": [1]}
WIDTHS = [(16, 16, 16, 16, 24), (48,), (16, 16, 16, 16, 24)]
KINDS = ("max", "min", "random")
MESHES = [(8, 1), (2, 4)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A mixture of experts with a shared one, whose second layer is plain; a corpus; a config."""
    folder = tmp_path_factory.mktemp("experts")
    tiny.write_model(folder / "model", MODEL)
    tiny.write_corpus(folder / "docs.jsonl", 120)
    config = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(folder / "docs.jsonl")}],
            "sequence_length": 20,
            "max_sequences": SEQUENCES,
            "splits": {"train": 0.5, "valid": 0.5},
            "exclude": {"special": True, "first": 1},
        },
        "exemplars": {"k": K},
        "statistics": {"sampled_tokens": 1000},
        "run": {"batch_size": 8, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def extract(workspace, output, *arguments):
    main(["--config", str(workspace / "config.yaml"), "--output", str(output), *arguments])
    return jaxplain.open_store(output)


@pytest.fixture(scope="module")
def stores(workspace):
    return {
        mesh: extract(workspace, workspace / f"run{mesh[0]}", "--run.mesh.model", str(mesh[1]))
        for mesh in MESHES
    }


@pytest.fixture(scope="module")
def store(stores):
    return stores[2, 4]


@pytest.fixture(scope="module")
def seen(workspace, store):
    """What brute force needs: activations, NaN where not routed, the tokens that count, and the draws."""
    split = store["train"]
    rows = split.sequences(np.arange(split.sequence_count))
    acts_LNTF, _ = sown_activations(workspace / "model", rows["token"].clip(0), make_mesh())
    counted_NT = counted_tokens(rows["token"], excluded=frozenset(range(4)), first=1)
    return acts_LNTF, counted_NT, lottery(0, rows["document"], rows["start"])


def neurons():
    """Every layer, expert and index, and the neuron's place among all of the layer."""
    for layer, widths in enumerate(WIDTHS):
        for expert, width in enumerate(widths):
            for index in range(width):
                yield layer, expert, index, sum(widths[:expert]) + index


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_store_equals_brute_force(stores, seen, mesh, kind):
    split = stores[mesh]["train"]
    assert split.sequence_count == SEQUENCES
    acts_LNTF, counted_NT, drawn_N = seen
    arrays = [
        split.layer_arrays(n, *(f"{kind}/{x}" for x in ("score", "sequence", "activation"))) for n in range(3)
    ]
    emptied = 0
    for layer, expert, index, place in neurons():
        acts_NT1 = acts_LNTF[layer][..., [place]]
        counted_of_expert_NT = counted_NT & ~np.isnan(acts_NT1[..., 0])
        score, sequence, activation = oracle.exemplars(acts_NT1, counted_of_expert_NT, kind, K, drawn_N)
        found = [array[expert, index] for array in arrays[layer]]
        np.testing.assert_array_equal(found[1], sequence[0])
        scale = np.nanmax(np.abs(score), initial=1e-3)
        np.testing.assert_allclose(found[0], score[0], atol=1e-5 * scale)
        np.testing.assert_allclose(found[2], activation[0], atol=2e-3 * scale, rtol=2e-3)
        rows = found[1][found[1] >= 0]
        emptied += (np.isnan(found[2][: len(rows)]) & counted_NT[rows]).any()
    assert emptied, "some stored token is not routed to the expert"


@pytest.mark.parametrize("mesh", MESHES)
def test_statistics_equal_brute_force(stores, seen, mesh):
    split = stores[mesh]["train"]
    acts_LNTF, counted_NT, _ = seen
    levels = np.array(split.quantile_levels)
    counts = set()
    for layer, expert, index, place in neurons():
        acts_NT1 = acts_LNTF[layer][..., [place]]
        counted_of_expert_NT = counted_NT & ~np.isnan(acts_NT1[..., 0])
        count, mean, variance, skewness, kurtosis, active = oracle.statistics(acts_NT1, counted_of_expert_NT)
        neuron = split.neuron(layer, index, expert=expert)
        assert neuron.stats.count == count[0]
        counts.add((layer, neuron.stats.count))
        np.testing.assert_allclose(neuron.stats.mean, mean[0], atol=1e-5)
        np.testing.assert_allclose(neuron.stats.variance, variance[0], rtol=1e-4)
        np.testing.assert_allclose(neuron.stats.skewness, skewness[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(neuron.stats.kurtosis, kurtosis[0], rtol=1e-3)
        np.testing.assert_allclose(neuron.stats.fraction_active, active[0], atol=1e-6)
        # More tokens are sampled than there are, so that the sample is all that the expert reads.
        acts_M = acts_NT1[counted_of_expert_NT, 0]
        ends = {
            kind: oracle.exemplars(acts_NT1, counted_of_expert_NT, kind, K)[::2] for kind in ("max", "min")
        }
        (expected,) = quantiles(
            levels,
            len(acts_M),
            acts_M[None].astype(np.float16),
            upper=upper_tail(*ends["max"]),
            lower=lower_tail(*ends["min"]),
        )
        found = np.array(list(neuron.quantiles.values()))
        scale = np.abs(acts_M).max()
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=2e-3 * scale)
        in_tails = np.minimum(levels, 1 - levels) * (len(acts_M) - 1) < K - 1
        exact = np.quantile(acts_M, levels[in_tails])
        np.testing.assert_allclose(found[in_tails], exact, rtol=2e-3, atol=2e-3 * scale)
    assert len(counts) == 5 + 1 + 5, "experts differ in the tokens that they read, and plain layers read all"


def test_neurons_that_do_not_exist_are_as_if_not_asked_for(store):
    split = store["train"]
    there = np.zeros((3, 5, 48), bool)
    for layer, expert, index, _ in neurons():
        there[layer, expert, index] = True
    for layer in range(3):
        count, score, sequence, mean = split.layer_arrays(
            layer, "stats/count", "max/score", "max/sequence", "stats/mean"
        )
        assert count.shape == (5, 48)
        np.testing.assert_array_equal(count >= 0, there[layer])
        assert (count[~there[layer]] == -1).all()
        assert np.isnan(score[~there[layer]]).all()
        assert (sequence[~there[layer]] == -1).all()
        assert np.isnan(mean[~there[layer]]).all()


def test_layout_and_coordinates(store, workspace):
    group = zarr.open_group(workspace / "run2" / "exemplars.zarr", mode="r")["train"]
    assert group["expert"][:].tolist() == [0, 1, 2, 3, 4]
    assert group["shared"][:].tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert group["shared"].metadata.dimension_names == ("layer", "expert")
    assert group["max/score"].metadata.dimension_names == ("layer", "expert", "neuron", "rank")
    assert group["max/activation"].metadata.dimension_names == ("layer", "expert", "neuron", "rank", "token")
    assert group["stats/quantile"].metadata.dimension_names == ("layer", "expert", "neuron", "quantile")
    assert group["stats/count"].shape == (3, 5, 48)
    tree = store["train"].to_xarray()
    assert isinstance(tree, xarray.DataTree)
    assert float(tree["max"]["score"].sel(layer=2, expert=4, neuron=23, rank=0)) == (
        store["train"].neuron(2, 23, expert=4).exemplars("max")[0].score
    )


def test_reader(store):
    split = store["train"]
    assert split.experts.tolist() == [0, 1, 2, 3, 4]
    assert split.shared.sum() == 3
    assert "3 layers x 5 experts x 48 neurons" in repr(split)
    routed, shared, plain = (
        split.neuron(*at, expert=e) for at, e in (((0, 3), 1), ((2, 20), 4), ((1, 40), 0))
    )
    assert [n.is_shared for n in (routed, shared, plain)] == [False, True, True]
    assert (routed.layer, routed.expert, routed.index) == (0, 1, 3)
    assert "expert=1" in repr(routed)
    assert np.isnan(routed.exemplars("max")[0].activations[1:]).any()
    assert split.neuron_called(routed.id).stats == routed.stats
    assert sum(1 for place in range(3) for _ in split.neurons_of(place)) == 88 + 48 + 88


@pytest.mark.parametrize(
    ("layer", "index", "expert", "message"),
    [
        (0, 3, None, "neuron 3 of layer 0 is asked for without an expert, .* give one from 0 to 4"),
        (0, 3, 5, "expert 5 is not in the store, which holds 5 experts from 0 to 4"),
        (0, 20, 1, "neuron 20 of expert 1 of layer 0 was not among those extracted"),
        (1, 3, 1, "neuron 3 of expert 1 of layer 1 was not among those extracted"),
        (0, 48, 1, "neuron 48 is not in the store"),
        (3, 0, 1, "layer 3 is not in the store"),
    ],
)
def test_neurons_that_the_store_does_not_hold(store, layer, index, expert, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        store["train"].neuron(layer, index, expert=expert)
    assert "\n" not in str(caught.value)


def test_show(store, workspace, capsys):
    run = str(workspace / "run2")
    show([run, "--layer", "0", "--expert", "2", "--neuron", "5", "--limit", "1"])
    said = capsys.readouterr().out
    assert "layer 0, expert 2, neuron 5" in said
    assert "reads every token" not in said
    show([run, "--layer", "0", "--expert", "4", "--neuron", "5", "--limit", "1"])
    assert "reads every token" in capsys.readouterr().out
    with pytest.raises(JaxplainError, match="without an expert"):
        show([run, "--layer", "0", "--neuron", "5"])


def test_ends_with_a_command_that_names_an_expert(workspace, tmp_path, capsys):
    extract(workspace, tmp_path, "--neurons.layers", "[0]")
    said = capsys.readouterr().out
    assert "layer 0, expert " in said
    command = said.strip().splitlines()[-1].split("jaxplain.show ")[1].split()
    show(command)
    assert "layer 0, expert " in capsys.readouterr().out


def assert_same(part, whole, layer, expert, index):
    ours, theirs = (split.neuron(layer, index, expert=expert) for split in (part, whole))
    for kind in KINDS:
        assert [e.sequence for e in ours.exemplars(kind)] == [e.sequence for e in theirs.exemplars(kind)]
    assert ours.stats.count == theirs.stats.count
    np.testing.assert_allclose(ours.stats.mean, theirs.stats.mean, atol=1e-5)


def test_chosen_experts_and_neurons(store, workspace, tmp_path):
    chosen = ("--neurons.experts", "[1, 4]", "--neurons.indices", "[3, 20]", "--run.mesh.model", "4")
    part = extract(workspace, tmp_path, *chosen)["train"]
    assert part.layers.tolist() == [0, 2], "a plain layer has neither expert"
    assert part.experts.tolist() == [1, 4]
    assert part.neurons.tolist() == [3, 20]
    assert part.shared.tolist() == [[False, True], [False, True]]
    held = [neuron for place in range(2) for neuron, _ in part.neurons_of(place)]
    assert held == [(layer, *at) for layer in (0, 2) for at in ((1, 3), (4, 3), (4, 20))]
    for layer, expert, index in held:
        assert_same(part, store["train"], layer, expert, index)


@pytest.mark.parametrize("experts", ["all", "0:5"])
def test_every_expert_may_be_asked_for(workspace, tmp_path, experts):
    part = extract(workspace, tmp_path, "--neurons.experts", experts, "--neurons.indices", "[2]")["train"]
    held = [neuron for place in range(3) for neuron, _ in part.neurons_of(place)]
    assert held == [(layer, expert, 2) for layer in range(3) for expert in range(len(WIDTHS[layer]))]


def test_neurons_from_a_file(store, workspace, tmp_path):
    wanted = [(2, 4, 23), (0, 1, 5), (1, 0, 40), (0, 1, 5)]
    np.save(tmp_path / "neurons.npy", np.array(wanted))
    part = extract(workspace, tmp_path / "run", "--neurons.file", str(tmp_path / "neurons.npy"))["train"]
    assert [n for place in range(3) for n, _ in part.neurons_of(place)] == sorted(set(wanted))
    for neuron in wanted:
        assert_same(part, store["train"], *neuron)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--neurons.indices", "[3]"], r"neurons.indices is \[3\], but the subject is a mixture of experts"),
        (
            ["--neurons.experts", "[5]"],
            "neurons.experts names expert 5, but the subject's experts are 0 to 4",
        ),
        (["--neurons.experts", "[]"], "neurons.experts names no expert"),
        (["--neurons.experts", "last"], "neurons.experts is 'last'; write a range"),
        (["--neurons.experts", "[0]", "--neurons.indices", "[48]"], "names neuron 48, but .* 0 to 47"),
        (["--neurons.layers", "[1]", "--neurons.experts", "[2]"], "none of the chosen layers has the chosen"),
        (["--neurons.experts", "[0]", "--neurons.file", "x.npy"], "takes the place of .*neurons.experts"),
        (["--run.mesh.model", "16"], "does not make the 8 devices"),
    ],
)
def test_bad_choices(workspace, tmp_path, arguments, message):
    with pytest.raises(JaxplainError, match=message) as caught:
        extract(workspace, tmp_path / "run", *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 3]], r"shape \(1, 2\) .* integers \[N, 3\], .* since the subject is a mixture of experts"),
        ([[0, 5, 3]], "names expert 5, but the subject's experts are 0 to 4"),
        ([[0, 3, 16]], "names neuron 16 of expert 3 in layer 0, which has 5 experts, of 16 or 24 neurons"),
        ([[1, 1, 0]], "names neuron 0 of expert 1 in layer 1, which has 1 experts, of 48 neurons"),
        ([[0, -1, 3]], "names expert -1"),
    ],
)
def test_bad_files(workspace, tmp_path, rows, message):
    np.save(tmp_path / "neurons.npy", np.array(rows))
    with pytest.raises(JaxplainError, match=message):
        extract(workspace, tmp_path / "run", "--neurons.file", str(tmp_path / "neurons.npy"))


def test_the_mesh_must_divide_every_layer(workspace, tmp_path):
    folder = tiny.write_model(tmp_path / "model", MODEL | {"shared_expert_intermediate_size": 22})
    with pytest.raises(JaxplainError, match="model is 8, which does not divide the subject's 86 neurons"):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder), "--run.mesh.model", "8")


def test_experts_of_a_subject_without_any(workspace, tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    arguments = ("--subject.id", str(folder), "--neurons.layers", "[0]")
    with pytest.raises(JaxplainError, match=r"neurons.experts is \[0\], but the subject is no mixture"):
        extract(workspace, tmp_path / "run", *arguments, "--neurons.experts", "[0]")
    np.save(tmp_path / "neurons.npy", np.array([[0, 0, 3]]))
    file = str(tmp_path / "neurons.npy")
    with pytest.raises(JaxplainError, match=r"integers \[N, 2\], each row a layer and a neuron\."):
        extract(workspace, tmp_path / "run", "--subject.id", str(folder), "--neurons.file", file)
    split = extract(workspace, tmp_path / "run", *arguments)["train"]
    assert split.experts is None
    assert split.shared is None
    assert split.neuron(0, 3).is_shared
    assert "experts" not in split.store.config["neurons"]
    with pytest.raises(
        JaxplainError, match="expert 1 is asked for, but the subject is no mixture of experts"
    ):
        split.neuron(0, 3, expert=1)
    with pytest.raises(JaxplainError, match="expert 1 is asked for"):
        show([str(tmp_path / "run"), "--layer", "0", "--expert", "1", "--neuron", "3"])


NAMED = [(0, 1, 3), (1, 0, 40), (2, 4, 23), (2, 0, 5)]


@pytest.fixture(scope="module")
def richer(workspace):
    """With strata, whose draws are of all sequences, and token tables."""
    arguments = (
        *("--exemplars.kinds", "[max, min, random, quantile]"),
        *("--exemplars.strata", "[0.5]", "--exemplars.samples_per_quantile", "4"),
        *("--statistics.tokens.neurons", str([list(name) for name in NAMED])),
        *("--statistics.tokens.count", "6", "--statistics.tokens.min_count", "2", "--run.mesh.model", "4"),
    )
    return extract(workspace, workspace / "richer", *arguments)


@pytest.mark.parametrize("sign", ["max", "min"])
@pytest.mark.parametrize("name", NAMED)
def test_token_tables_are_over_what_an_expert_reads(richer, seen, name, sign):
    acts_LNTF, counted_NT, _ = seen
    split = richer["train"]
    tokens_NT = split.sequences(np.arange(SEQUENCES))["token"]
    layer, expert, index = name
    acts_NT = acts_LNTF[layer][..., sum(WIDTHS[layer][:expert]) + index]
    there_NT = counted_NT & ~np.isnan(acts_NT)
    direction = -1 if sign == "max" else 1
    expected = []
    for token in np.unique(tokens_NT[there_NT]).tolist():
        acts_M = acts_NT[there_NT & (tokens_NT == token)]
        if len(acts_M) >= 2:
            expected.append((direction * acts_M.mean(dtype=np.float64), token, len(acts_M)))
    expected = sorted(expected)[:6]
    found = split.neuron(layer, index, expert=expert).tokens(sign)
    assert all(token.exact for token in found)
    assert [(token.token, token.count) for token in found] == [row[1:] for row in expected]
    means = [direction * row[0] for row in expected]
    np.testing.assert_allclose([token.mean for token in found], means, rtol=1e-4, atol=1e-6)


def test_tokens_of_other_neurons_are_estimated_from_what_their_expert_reads(richer, workspace):
    neuron = richer["train"].neuron(0, 3, expert=2)
    found = neuron.tokens()
    assert not any(token.exact for token in found)
    extreme = neuron.exemplars("max")
    others = [e for e in neuron.exemplars("random") if e.sequence not in {e.sequence for e in extreme}]
    seen, drawn = (
        sum(np.count_nonzero(~np.isnan(e.activations)) for e in part) for part in (extreme, others)
    )
    assert sum(token.count for token in found) == seen + drawn
    assert drawn
    # Other sequences stand for the tokens that the expert reads, and that are in none of the extreme ones.
    totals: dict[int, list[float]] = {}
    for part, weight in ((extreme, 1.0), (others, (neuron.stats.count - seen) / drawn)):
        for e in part:
            for token, act in zip(e.tokens.tolist(), e.activations.tolist(), strict=True):
                total = totals.setdefault(token, [0.0, 0.0])
                total[0] += 0 if np.isnan(act) else weight * act
                total[1] += 0 if np.isnan(act) else weight
    for token in found:
        np.testing.assert_allclose(token.mean, totals[token.token][0] / totals[token.token][1], atol=1e-6)
    group = zarr.open_group(workspace / "richer" / "exemplars.zarr", mode="r")["train"]["token_table"]
    columns = [group[f"chosen_{axis}"][:].tolist() for axis in ("layer", "expert", "neuron")]
    assert list(zip(*columns, strict=True)) == sorted(NAMED)


def test_strata_are_of_the_sequences_that_an_expert_reads(richer, seen):
    acts_LNTF, counted_NT, _ = seen
    split = richer["train"]
    assert split.strata == ((0, 0.5), (0.5, 1))
    counts = set()
    for layer, expert, index, place in neurons():
        acts_NT = np.where(counted_NT, acts_LNTF[layer][..., place], np.nan)
        highest_N = np.where(np.isnan(acts_NT), -np.inf, acts_NT).max(1)
        count = int(np.isfinite(highest_N).sum())
        counts.add(count)
        above = int((1 - (np.arange(count) + 0.5) / count >= 0.5).sum())
        exemplars = split.neuron(layer, index, expert=expert).exemplars("quantile")
        rank_N = (-highest_N).argsort().argsort()
        upper = [e for e in exemplars if e.stratum == (0.5, 1)]
        lower = [e for e in exemplars if e.stratum == (0, 0.5)]
        assert (len(upper), len(lower)) == (min(above, 4), min(count - above, 4))
        assert all(rank_N[e.sequence] < above for e in upper)
        assert all(above <= rank_N[e.sequence] < count for e in lower)
        for e in exemplars:
            np.testing.assert_allclose(e.score, highest_N[e.sequence], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(
                np.isnan(e.activations), np.isnan(acts_NT[e.sequence, : len(e.tokens)])
            )
    assert len(counts) > 1, "some expert has no token of some sequence"


def test_a_name_without_an_expert_is_refused(workspace, tmp_path):
    with pytest.raises(JaxplainError, match=r"tokens.neurons names \[0, 3\], .* an expert and an index"):
        extract(workspace, tmp_path / "run", "--statistics.tokens.neurons", "[[0, 3]]")
