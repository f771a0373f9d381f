"""The comparison with torch that a run can begin with: its arithmetic, what it refuses, and torch itself."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import yaml

import jaxplain
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.extract import main
from jaxplain.subjects import parity
from jaxplain.subjects.parity import LayerDifference, differences, require_parity, table_of
from jaxplain.subjects.subject import open_subject
from tests import gguf_files, tiny
from tests.subjects import reference
from tests.subjects.test_decoder import make_mesh


def subject_of(folder, dtype="float32"):
    return open_subject(SubjectConfig(id=str(folder), dtype=dtype))


def golden(variant, *, change=None):
    """The golden file's activations in place of torch's, sequence by sequence, and the tokens."""
    acts_LBTF = np.load(reference.GOLDEN / f"{variant}.npz")["acts"].astype(np.float64)
    if change is not None:
        change(acts_LBTF)
    tokens_BT = reference.tokens_of(variant)

    def activations(tokens_T):
        row = next(number for number, known_T in enumerate(tokens_BT) if (known_T == tokens_T).all())
        return list(acts_LBTF[:, row])

    return activations, tokens_BT.astype(np.int32)


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma3", "opt"])
def test_the_decoder_agrees_with_the_golden_activations(variant, tmp_path):
    model = subject_of(tiny.write_model(tmp_path, tiny.VARIANTS[variant])).load(make_mesh())
    activations, tokens_BT = golden(variant)
    found = differences(model, activations, tokens_BT)
    assert [layer.layer for layer in found] == [0, 1, 2]
    acts_LBTF = np.load(reference.GOLDEN / f"{variant}.npz")["acts"]
    np.testing.assert_allclose(
        [layer.largest for layer in found], np.abs(acts_LBTF).max((1, 2, 3)), rtol=1e-6
    )
    assert all(0 < layer.ratio < 1e-5 for layer in found)
    require_parity(found, "float32")


def of_mixture(tmp_path, *, change=None):
    """What is found from changed golden activations; layer 1 is plain, 0 and 2 are mixtures."""
    subject = subject_of(tiny.write_model(tmp_path, tiny.VARIANTS["qwen3-moe-plain-layers"]))
    assert [bool(subject.arch.routed_experts(layer)) for layer in range(3)] == [True, False, True]
    activations, tokens_BT = golden("qwen3-moe-plain-layers", change=change)

    def without_gaps(tokens_T):
        widths = [sum(subject.arch.expert_widths(layer)) for layer in range(3)]
        return [acts_TF[:, :width] for acts_TF, width in zip(activations(tokens_T), widths, strict=True)]

    return differences(subject.load(make_mesh()), without_gaps, tokens_BT)


def test_mixtures_agree_where_their_experts_read(tmp_path):
    found = of_mixture(tmp_path)
    assert [layer.rerouted for layer in found] == [0.0, None, 0.0]
    assert all(0 < layer.ratio < 1e-5 for layer in found)
    require_parity(found, "float32")


def test_one_activation_of_an_expert_is_enough_to_fail(tmp_path):
    def change(acts_LBTF):
        place = tuple(np.argwhere(~np.isnan(acts_LBTF[2]))[7])
        acts_LBTF[2][place] += 0.01 * np.nanmax(np.abs(acts_LBTF[2]))

    found = of_mixture(tmp_path, change=change)
    assert [layer.ratio < 1e-5 for layer in found] == [True, True, False]
    with pytest.raises(JaxplainError, match=r"^layer 2 differs from torch's by 1"):
        require_parity(found, "float32")


def test_a_token_that_other_experts_read_is_not_compared_after_that(tmp_path):
    def change(acts_LBTF):
        acts_LBTF[0, 0, 9] = np.roll(acts_LBTF[0, 0, 9], 1)
        acts_LBTF[1:, 0, 9] += 1e3

    found = of_mixture(tmp_path, change=change)
    assert [layer.rerouted for layer in found] == [1 / 32, None, 0.0]
    assert [layer.ratio < 1e-5 for layer in found] == [False, True, True]
    assert all(layer.largest < 1e3 for layer in found)
    agreeing = [dataclasses.replace(found[0], difference=0.0), *found[1:]]
    with pytest.raises(
        JaxplainError, match=r"^in layer 0 other experts .* read 3\.1% .* where 1% is allowed"
    ):
        require_parity(agreeing, "float32")
    require_parity(agreeing, "bfloat16")


def test_an_activation_that_is_no_number_is_no_token_that_is_not_read():
    """A plain layer has none; in a mixture the token counts as read by other experts."""
    acts_TF = np.ones((4, 3))
    broken_TF = np.where(np.eye(4, 3) > 0, np.nan, acts_TF)
    for mixture in (False, True):
        compared = parity._Compared(mixture)
        compared.add(broken_TF, acts_TF, np.ones(4, bool))
        with pytest.raises(JaxplainError, match="layer 0"):
            require_parity([compared.result(0)], "bfloat16")


def test_one_activation_of_one_layer_is_enough_to_fail(tmp_path):
    def change(acts_LBTF):
        acts_LBTF[1, 1, 17, 5] += 0.01 * np.abs(acts_LBTF[1]).max()

    model = subject_of(tiny.write_model(tmp_path)).load(make_mesh())
    found = differences(model, *golden("llama-gqa", change=change))
    with pytest.raises(
        JaxplainError, match=r"^layer 1 differs from torch's by 1\.0e-02 of its largest .* where 0\.0001 is"
    ) as caught:
        require_parity(found, "float32")
    assert "\n" not in str(caught.value)
    require_parity(found, "bfloat16")


def test_only_tokens_that_are_there_are_compared(tmp_path):
    def change(acts_LBTF):
        acts_LBTF[:, :, 30:] = 1e3

    activations, tokens_BT = golden("llama-gqa", change=change)
    padded_BT = np.where(np.arange(40) < 30, tokens_BT, -1)
    model = subject_of(tiny.write_model(tmp_path)).load(make_mesh())

    def with_the_rest(tokens_T):
        assert (tokens_T[30:] == 0).all(), "padding is read as a token"
        return activations(np.concatenate([tokens_T[:30], tokens_BT[0, 30:]]))

    found = differences(model, with_the_rest, padded_BT[:1])
    assert all(layer.ratio < 1e-5 and layer.largest < 1e3 for layer in found)


def test_as_many_layers_as_the_run_reads(tmp_path):
    activations, tokens_BT = golden("llama-gqa")
    model = subject_of(tiny.write_model(tmp_path)).load(make_mesh(2, 4), depth=2)
    found = differences(model, lambda tokens_T: activations(tokens_T)[:2], tokens_BT)
    assert len(found) == 2
    require_parity(found, "float32")


@pytest.mark.parametrize(
    ("difference", "largest", "ratio"),
    [(0.5, 2.0, 0.25), (0.0, 0.0, 0.0), (1e-9, 0.0, np.inf), (np.nan, 1.0, np.nan)],
)
def test_the_ratio_is_a_share_of_the_layers_largest(difference, largest, ratio):
    layer = LayerDifference(layer=4, difference=difference, largest=largest)
    np.testing.assert_equal(layer.ratio, ratio)
    if not ratio <= 1e-4:
        with pytest.raises(JaxplainError, match="layer 4 differs"):
            require_parity([layer], "float32")


def test_the_bound_depends_on_the_dtype():
    for dtype, bound in parity.BOUNDS.items():
        require_parity([LayerDifference(layer=0, difference=0.99 * bound, largest=1.0)], dtype)
        with pytest.raises(JaxplainError, match=f"where {bound:g} is allowed in {dtype}"):
            require_parity([LayerDifference(layer=0, difference=1.01 * bound, largest=1.0)], dtype)


def test_the_table():
    layers = [
        LayerDifference(layer=0, difference=3.2e-6, largest=1.5),
        LayerDifference(layer=11, difference=1e-3, largest=250.0),
    ]
    assert table_of(layers, sequences=4, dtype="float32") == (
        "float32 against torch's float64, 4 sequences\n"
        "layer  largest difference    largest    ratio\n"
        "    0           3.200e-06  1.500e+00  2.1e-06\n"
        "   11           1.000e-03  2.500e+02  4.0e-06"
    )


def test_the_table_of_a_mixture_says_how_many_tokens_other_experts_read():
    layers = [
        LayerDifference(layer=0, difference=3.2e-6, largest=1.5),
        LayerDifference(layer=1, difference=1e-3, largest=250.0, rerouted=0.012),
    ]
    assert table_of(layers, sequences=4, dtype="float32").splitlines()[1:] == [
        "layer  largest difference    largest    ratio  tokens to other experts",
        "    0           3.200e-06  1.500e+00  2.1e-06",
        "    1           1.000e-03  2.500e+02  4.0e-06                    1.20%",
    ]


def test_a_family_without_one_down_projection_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "require_torch", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    subject = subject_of(tiny.write_model(tmp_path))
    weights = tuple(w for w in subject.family.weights if not w.target.endswith("down_FD"))
    family = dataclasses.replace(subject.family, weights=weights)
    with pytest.raises(JaxplainError, match="has layers without one down projection"):
        parity.torch_reference(dataclasses.replace(subject, family=family), layers=3)


@pytest.fixture
def run(tmp_path):
    """The arguments of an extraction from a tiny model."""
    tiny.write_model(tmp_path / "model")
    tiny.write_corpus(tmp_path / "docs.jsonl")
    config = {
        "subject": {"id": str(tmp_path / "model")},
        "corpus": {
            "sources": [{"dataset": "json", "data_files": str(tmp_path / "docs.jsonl")}],
            "sequence_length": 16,
            "max_sequences": 24,
            "splits": {"train": 1.0},
        },
        "neurons": {"layers": [0, 1]},
        "exemplars": {"k": 2, "splits": ["train"]},
        "run": {"batch_size": 8, "progress": False},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "config.yaml")]


def test_without_torch_the_command_to_install_it_is_named_at_once(run, tmp_path, monkeypatch):
    find_spec = parity.importlib.util.find_spec
    monkeypatch.setattr(
        parity.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    with pytest.raises(JaxplainError, match=r"needs the package torch; .* pip install 'jaxplain\[parity\]'"):
        main([*run, "--check-parity", "3", "--subject.id", "/no/such/folder"])
    assert not (tmp_path / "run").exists()


def test_the_run_compares_its_first_sequences_and_goes_on(run, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("jaxplain.extract.require_torch", lambda: None)
    monkeypatch.setattr("jaxplain.extract.torch_reference", lambda subject, layers: layers)

    def compared(model, layers, tokens_NT):
        seen.append((len(model.layers), layers, tokens_NT))
        return [LayerDifference(layer=0, difference=1e-5, largest=1.0)]

    monkeypatch.setattr("jaxplain.extract.differences", compared)
    main([*run, "--check-parity=3"])
    assert "float32 against torch's float64, 3 sequences\nlayer" in capsys.readouterr().out
    ((depth, layers, tokens_NT),) = seen
    assert (depth, layers) == (2, 2)
    split = jaxplain.open_store(tmp_path / "run")["train"]
    np.testing.assert_array_equal(tokens_NT, split.sequences(np.arange(3))["token"])


def test_the_run_ends_where_a_layer_differs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxplain.extract.require_torch", lambda: None)
    monkeypatch.setattr("jaxplain.extract.torch_reference", lambda subject, layers: layers)
    layer = LayerDifference(layer=1, difference=1e-3, largest=1.0)
    monkeypatch.setattr("jaxplain.extract.differences", lambda *_: [layer])
    with pytest.raises(JaxplainError, match="layer 1 differs"):
        main([*run, "--check-parity", "2"])
    assert "1.0e-03" in capsys.readouterr().out, "the table comes first"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", ["0", "-2", "many"])
def test_the_number_of_sequences_is_one_or_more(run, count):
    with pytest.raises(JaxplainError, match=r"check.parity") as caught:
        main([*run, f"--check-parity={count}"])
    assert "\n" not in str(caught.value)


def test_the_option_is_not_for_configs(run, tmp_path):
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"check_parity": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(JaxplainError, match="--check-parity is for the command line"):
        main(run)


def test_an_empty_corpus_is_said_as_ever(run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxplain.extract.require_torch", lambda: None)
    (tmp_path / "docs.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(JaxplainError, match="the corpus is empty"):
        main([*run, "--check-parity", "2"])


@pytest.mark.parity
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_family_is_compared_with_live_torch(variant, tmp_path):
    subject = subject_of(tiny.write_model(tmp_path, tiny.VARIANTS[variant], seed=5))
    layers = subject.arch.layers
    found = differences(
        subject.load(make_mesh()),
        parity.torch_reference(subject, layers=layers),
        reference.tokens_of(variant).astype(np.int32),
    )
    assert len(found) == layers
    assert all(0 < layer.ratio < 1e-5 for layer in found), found
    assert [layer.rerouted for layer in found] == [
        0.0 if subject.arch.routed_experts(layer) else None for layer in range(layers)
    ]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "biases"])
def test_a_gguf_file_is_compared_with_live_torch(name, tmp_path):
    from tests.subjects.test_gguf import MODELS

    subject = subject_of(gguf_files.write_beside(tmp_path, MODELS[name]))
    found = differences(
        subject.load(make_mesh()),
        parity.torch_reference(subject, layers=3),
        reference.TOKENS_BT.astype(np.int32),
    )
    assert all(0 < layer.ratio < 1e-5 for layer in found), found


@pytest.mark.parity
def test_bfloat16_is_within_its_bound_and_further_off(tmp_path):
    subject = subject_of(tiny.write_model(tmp_path), dtype="bfloat16")
    found = differences(
        subject.load(make_mesh()),
        parity.torch_reference(subject, layers=3),
        reference.TOKENS_BT.astype(np.int32),
    )
    require_parity(found, "bfloat16")
    assert all(layer.ratio > 1e-4 for layer in found), found


@pytest.mark.parity
def test_as_many_layers_of_a_mixture_as_the_run_reads(tmp_path):
    subject = subject_of(tiny.write_model(tmp_path, tiny.VARIANTS["qwen2-moe-plain-layers"]))
    found = differences(
        subject.load(make_mesh(), depth=2),
        parity.torch_reference(subject, layers=2),
        reference.TOKENS_BT.astype(np.int32),
    )
    assert len(found) == 2
    require_parity(found, "float32")


@pytest.mark.parity
def test_a_model_read_wrongly_is_found_by_live_torch(tmp_path):
    """Rotary angles of another base: the first layer's too, and nothing but the activations tells."""
    subject = subject_of(tiny.write_model(tmp_path))
    rotary = dataclasses.replace(subject.arch.rotary, base=9000.0)
    wrong = dataclasses.replace(subject, arch=dataclasses.replace(subject.arch, rotary=rotary))
    found = differences(
        wrong.load(make_mesh()),
        parity.torch_reference(subject, layers=3),
        reference.TOKENS_BT.astype(np.int32),
    )
    with pytest.raises(JaxplainError, match="layer 0 differs"):
        require_parity(found, "float32")


@pytest.mark.parity
def test_the_whole_command_with_live_torch(run, tmp_path, capsys):
    main([*run, "--check-parity", "2"])
    said = capsys.readouterr().out
    assert "float32 against torch's float64, 2 sequences" in said
    assert (tmp_path / "run" / "exemplars.zarr").exists()
