"""The command, on subjects of which there is a config.json and nothing else."""

import json
import re

import pytest
import yaml

from jaxplain.errors import JaxplainError
from jaxplain.plan import main
from jaxplain.planning import planner
from jaxplain.planning.topologies import TooLargeError
from tests import tiny

LLAMA_31_8B = tiny.LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture
def folder(tmp_path):
    """Configs of a run over a tiny subject and over a large one."""
    for name, subject in (("tiny", tiny.LLAMA), ("large", LLAMA_31_8B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(subject))
        config = {
            "subject": {"id": str(tmp_path / name), "dtype": "bfloat16"},
            "corpus": {
                "sources": [{"preset": "fineweb"}],
                "sequence_length": 96 if name == "large" else 32,
                "max_sequences": 500000,
            },
            "run": {"batch_size": 64},
            "output": "out",
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture(autouse=True)
def without_libtpu(monkeypatch):
    monkeypatch.setattr(planner, "can_compile", lambda: False)


def plan(folder, capsys, *arguments, name="tiny", devices=("--topology", "h100:8")):
    main(["--config", str(folder / f"{name}.yaml"), *devices, "--json", *arguments])
    return json.loads(capsys.readouterr().out)


def report(folder, capsys, *arguments, name="tiny", devices=("--topology", "h100:8")):
    main(["--config", str(folder / f"{name}.yaml"), *devices, *arguments])
    text = capsys.readouterr().out
    return dict(line.split(None, 1) for line in text.splitlines())


def test_figures_of_a_published_model(folder, capsys):
    found = plan(folder, capsys, name="large")
    assert found["parameters"] == 8_030_261_248
    assert found["loaded_parameters"] == 8_030_261_248 - 128256 * 4096 - 4096
    assert (found["layers"], found["neurons"]) == (32, 32 * 14336)
    # Two operations per parameter that multiplies and token, but for the last down projection.
    matrices = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336) - 4096 * 14336
    attention = 32 * 4 * 96 * 96 * 4096
    assert found["flops_per_sequence"] == 2 * 96 * matrices + attention
    assert found["flops"] == 1_000_000 * found["flops_per_sequence"]
    assert found["sequences"] == {"train": 500000, "valid": 500000}
    exemplars = 2 * 3 * 32 * 14336 * 100 * (96 * 2 + 8)
    assert found["store"]["exemplars"] == pytest.approx(exemplars, rel=0.01)


def test_hours_and_input_follow_the_utilisation(folder, capsys):
    half, full = (plan(folder, capsys, "--utilisation", share, name="large") for share in ("0.5", "1.0"))
    seconds = full["flops"] / (8 * 989.4e12)
    assert full["hours"] == pytest.approx(seconds / 3600)
    assert half["hours"] == pytest.approx(2 * full["hours"])
    assert full["sequences_per_second"] == pytest.approx(1_000_000 / seconds)
    slow = plan(folder, capsys, "--subject.dtype", "float32", "--utilisation", "1.0", name="large")
    assert slow["hours"] == pytest.approx(full["hours"] * 989.4 / 67)


def test_a_run_that_fits_as_it_is(folder, capsys):
    lines = report(folder, capsys)
    assert lines["configured"].startswith("run.mesh data 8 x model 1, run.batch_size 64: weights ")
    assert "which fits; the largest batch that does is " in lines["configured"]
    assert lines["proposed"].startswith("run.mesh data 8 x model 1, run.batch_size 2048: ")
    assert lines["compiled"].startswith(
        "memory is computed from shapes, and temporaries are estimated: only TPUs"
    )
    assert lines["time"] == "less than a minute at 40% of the devices' peak, besides reading and writing"
    assert lines["subject"].startswith(f"{folder / 'tiny'}: 47,840 parameters, of which 35,520 are ")
    assert lines["corpus"] == "1,000,000 sequences of 32 tokens, in train, valid"
    assert re.match(
        r"the host reads up to [\d,]+ sequences/s \([\d,]+ tokens/s, [\d,.]+ MB/s\)", lines["input"]
    )


def test_a_run_that_does_not_fit_is_proposed_otherwise(folder, capsys):
    devices = ("--devices", "8", "--memory", "40GiB")
    found = plan(folder, capsys, name="large", devices=devices)
    assert not found["fits"]
    assert found["largest_batch"] is None
    choice, target = found["proposal"]["choice"], found["target"]
    assert choice["model"] == 2
    assert choice["memory"]["snapshot"] == choice["memory"]["state"] * 2 // 32
    assert sum(choice["memory"].values()) - choice["memory"]["snapshot"] <= target["memory"]
    lines = report(folder, capsys, name="large", devices=devices)
    assert lines["configured"].endswith("does not fit, nor does any batch on this mesh")
    fitting = ("--run.mesh.model", "2", "--run.batch_size", str(choice["batch"]))
    assert plan(folder, capsys, *fitting, name="large", devices=devices)["fits"]


def test_a_batch_that_does_not_fit_is_named(folder, capsys):
    lines = report(folder, capsys, "--run.batch_size", "16777216")
    assert re.search(r"does not fit; the largest batch that does is \d+$", lines["configured"])


def test_runs_over_some_layers(folder, capsys):
    devices = ("--topology", "v5e:2x4")
    found = plan(folder, capsys, "--exemplars.k", "1000", name="large", devices=devices)
    layers = found["proposal"]["layers"]
    assert len(layers) > 1
    assert [layer for part in layers for layer in part] == list(range(32))
    assert found["flops_per_sequence"] > 1.5 * plan(folder, capsys, name="large")["flops_per_sequence"]
    assert re.match(
        rf"{len(layers)} runs over layers 0-\d+, ",
        report(folder, capsys, "--exemplars.k", "1000", name="large", devices=devices)["proposed"],
    )


def test_nothing_fits(folder, capsys):
    lines = report(folder, capsys, devices=("--devices", "2", "--memory", "100"))
    assert lines["proposed"].startswith("nothing fits, not even a layer by itself")
    assert lines["time"].startswith("not known, since the devices' speed is not")
    assert "input" not in lines


def test_a_mesh_that_does_not_suit_the_devices(folder, capsys):
    lines = report(folder, capsys, "--run.mesh.model", "3")
    assert lines["configured"].startswith("run.mesh is data -1 x model 3, which does not make the 8 devices")
    assert lines["proposed"].startswith("run.mesh data 8")


def test_without_libtpu_figures_are_estimates(folder, capsys):
    lines = report(folder, capsys, devices=("--topology", "v5e:2x4"))
    assert (
        "libtpu, whose compiler would say more, is not installed (pip install 'jaxplain[plan]')"
        in lines["compiled"]
    )


def test_analytic_does_not_compile(folder, capsys, monkeypatch):
    monkeypatch.setattr(planner, "can_compile", lambda: True)
    monkeypatch.setattr(planner, "compile_for_topology", None)
    lines = report(folder, capsys, "--analytic", devices=("--topology", "v5e:2x4"))
    assert lines["compiled"].endswith("temporaries are estimated, as --analytic asks.")


def test_batches_are_halved_until_the_compiler_agrees(folder, capsys, monkeypatch):
    tried = []

    def compile_for_topology(demand, topology, *, data, model, batch):
        tried.append((topology, data, model, batch))
        raise TooLargeError(17 * 2**30, 16 * 2**30)

    monkeypatch.setattr(planner, "can_compile", lambda: True)
    monkeypatch.setattr(planner, "compile_for_topology", compile_for_topology)
    lines = report(folder, capsys, devices=("--topology", "v5e:2x4"))
    assert tried == [("v5e:2x4", 8, 1, batch) for batch in (64, 32, 16, 8)]
    assert lines["compiled"] == "the step does not fit: the compiler counts 17.00 GiB of 16.00 GiB."
    assert lines["configured"].endswith("fits by this estimate, but not by the compiler's count below")
    assert not plan(folder, capsys, devices=("--topology", "v5e:2x4"))["fits"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--utilisation", "1.5"], "--utilisation is 1.5; give a share above 0"),
        (["--corpus.max_sequences", "0"], "corpus.max_sequences is 0; say with corpus.expected_sequences"),
        (["--corpus.sequence_length", "65"], "corpus.sequence_length is 65, but .* reads at most 64 tokens"),
        (["--subject.id", "/no/such"], "subject.id is '/no/such', of which there is no config.json that"),
        (["--neurons.layers", "[7]"], "neurons.layers names layer 7"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, arguments, sentence):
    with pytest.raises(JaxplainError, match=f"^{sentence}") as error:
        plan(folder, capsys, *arguments)
    assert "\n" not in str(error.value)


def test_devices_have_to_be_named(folder):
    with pytest.raises(JaxplainError, match=r"^no devices are named"):
        main(["--config", str(folder / "tiny.yaml")])
