"""GGUF files as subjects: every quantisation and architecture against the same model in safetensors."""

import subprocess
import sys

import gguf
import numpy as np
import pytest

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects import gguf as reading
from jaxplain.subjects.gguf_config import llama3_scaling
from jaxplain.subjects.saving import save_decoder
from jaxplain.subjects.subject import open_subject
from tests import families, gguf_files, tiny
from tests.gguf_files import KIND
from tests.subjects.test_decoder import assert_close_in_every_layer, make_mesh, sown_activations

TOKENS_BT = np.random.default_rng(5).integers(0, 384, (2, 24))


def opened(path, **options):
    return open_subject(SubjectConfig(id=str(path), **options))


def assert_same_model(file, folder):
    found, logits = sown_activations(file, TOKENS_BT, make_mesh())
    expected, expected_logits = sown_activations(folder, TOKENS_BT, make_mesh())
    assert_close_in_every_layer(found, expected, tolerance=1e-5)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5 * np.abs(expected_logits).max())


@pytest.mark.parametrize("kind", reading.QUANTISATIONS)
def test_every_quantisation_gives_the_activations_of_its_values(kind, tmp_path):
    kind, rng = KIND[kind], np.random.default_rng(3)
    raw, values = {}, {}
    for name, tensor in tiny.tensors(gguf_files.LLAMA).items():
        if tensor.ndim == 1:
            raw[name] = values[name] = tensor
        else:
            rows = gguf_files.quantised(tensor, kind, rng)
            raw[name], values[name] = (rows, kind), gguf_files.values_of(rows, kind)
    tiny.write_model(tmp_path, gguf_files.LLAMA, weights=values)
    tokenizer = gguf_files.byte_level(tmp_path, gguf_files.LLAMA)
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.LLAMA, raw, tokenizer=tokenizer)
    assert_same_model(file, tmp_path)


MODELS = {
    "llama": tiny.LLAMA,
    "one-key-head-tied": tiny.VARIANTS["llama-mqa-tied"],
    "biases": tiny.LLAMA | {"attention_bias": True, "mlp_bias": True},
    "wide-heads": tiny.VARIANTS["mistral-wide-heads"] | {"rope_theta": 1e6},
    "qwen2": families.QWEN2,
    "qwen3": families.QWEN3,
    "qwen3-biases-tied": families.VARIANTS["qwen3-biases"],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_the_model_of_its_folder(name, tmp_path):
    assert_same_model(gguf_files.write_beside(tmp_path, MODELS[name]), tmp_path)


def test_what_a_file_does_not_say_is_as_llama_cpp_takes_it(tmp_path):
    config = tiny.LLAMA | {"num_key_value_heads": 4}
    silent = {"llama__attention__head_count_kv": None, "llama__rope__freq_base": None}
    assert_same_model(gguf_files.write_beside(tmp_path, config, **silent), tmp_path)


def test_a_mesh_reads_the_rows_that_it_holds(tmp_path):
    """Four query heads over four devices, whose rows lie in llama.cpp's order."""
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA)
    found, _ = sown_activations(file, TOKENS_BT, make_mesh(2, 4))
    expected, _ = sown_activations(tmp_path, TOKENS_BT, make_mesh())
    assert_close_in_every_layer(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("module", ["q_proj", "v_proj"])
def test_only_the_rows_asked_for_are_de_quantised(module, tmp_path, monkeypatch):
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA)
    tensor = reading.gguf_tensors(reading.open_gguf(file))[f"model.layers.1.self_attn.{module}.weight"]
    dequantize, sizes = gguf.quants.dequantize, []
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda data, kind: sizes.append(data.shape) or dequantize(data, kind)
    )
    part = tensor[(slice(8, 16), slice(4, 6))]
    expected = tiny.tensors(tiny.LLAMA)[f"model.layers.1.self_attn.{module}.weight"]
    np.testing.assert_array_equal(part, expected[8:16, 4:6])
    assert sizes == [(8, 32)]
    monkeypatch.setattr(reading, "_ROWS_AT_ONCE", 3)
    np.testing.assert_array_equal(tensor[(slice(8, 16), slice(4, 6))], part)
    assert sizes[1:] == [(3, 32), (3, 32), (2, 32)]


def llama3_factors(config):
    """The divisors that llama.cpp's converter keeps, pair by pair, from the wavelengths."""
    scaling = config["rope_scaling"]
    factor, low, high, length = (
        scaling[name]
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    width, made = config["hidden_size"] // config["num_attention_heads"], []
    for pair in range(width // 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (2 * pair / width)
        if wavelength < length / high:
            made.append(1.0)
        elif wavelength > length / low:
            made.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(made, np.float32)


def test_llama3_scaling_is_found_from_its_factors(tmp_path):
    config = tiny.VARIANTS["llama-rope-llama3"]
    factors = {"rope_freqs.weight": llama3_factors(config)}
    file = gguf_files.write_beside(tmp_path, config, extra=factors)
    assert opened(file).arch == opened(tmp_path).arch
    assert_same_model(file, tmp_path)


@pytest.mark.parametrize(("factor", "theta", "width"), [(8.0, 5e5, 128), (32.0, 5e5, 64)])
def test_the_scaling_of_published_models_is_found_exactly(factor, theta, width):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = {"rope_scaling": scaling, "hidden_size": width, "num_attention_heads": 1, "rope_theta": theta}
    assert llama3_scaling(llama3_factors(config).astype(np.float64), width, theta) == scaling


def test_scaling_without_blended_frequencies():
    """Any length does that leaves the same ones alone."""
    found = llama3_scaling(np.array([1.0, 8.0, 8.0, 8.0]), 8, 1e8)
    assert found is not None
    assert found["factor"] == 8.0
    # Whole turns over the original length decide: 4 or more for the first pair, 1 at most for the second.
    turns = found["original_max_position_embeddings"] * 1e8 ** -np.array([0, 0.25]) / (2 * np.pi)
    assert turns[0] >= 4
    assert turns[1] <= 1


def test_linear_scaling(tmp_path):
    config = tiny.VARIANTS["llama-rope-linear"]
    scaling = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    file = gguf_files.write_beside(tmp_path, config, **scaling)
    assert opened(file).arch == opened(tmp_path).arch


def test_a_gguf_subject_is_saved_as_a_folder(tmp_path):
    file = gguf_files.write_beside(tmp_path / "source", tiny.LLAMA)
    subject = opened(file)
    save_decoder(subject.load(make_mesh(), with_head=True), subject, tmp_path / "saved")
    assert_same_model(file, tmp_path / "saved")


def test_the_weight_hash_sees_one_changed_tensor(tmp_path):
    weights = tiny.tensors(tiny.LLAMA)
    one = opened(gguf_files.write_beside(tmp_path / "a", tiny.LLAMA, weights=weights))
    same = opened(gguf_files.write_beside(tmp_path / "b", tiny.LLAMA, weights=weights))
    weights["model.layers.1.mlp.gate_proj.weight"][0, 0] += 1
    other = opened(gguf_files.write_beside(tmp_path / "c", tiny.LLAMA, weights=weights))
    assert one.weight_hash() == same.weight_hash() != other.weight_hash()


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA)
    assert opened(file).arch.layers == 3
    gguf_files.write_beside(tmp_path, gguf_files.LLAMA)
    assert opened(file).arch.layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__block_count": None}, r"lacks llama\.block_count in its metadata"),
        ({"llama__expert_count": 8}, r"llama\.expert_count = 8 .* is not supported, only 0"),
        ({"llama__rope__scaling__type": "yarn"}, r"rope\.scaling\.type = 'yarn' .* only 'none' or 'linear'"),
        ({"llama__attention__sliding_window": 5}, r"sliding_window = 5 .* has no known meaning"),
        ({"llama__attention__head_count": [4, 4, 2]}, r"head_count = \[4, 4, 2\] .* not the same in every"),
        ({"llama__attention__value_length": 4}, r"value_length = 4 .* is not the 8 coordinates of a head"),
        ({"llama__rope__dimension_count": 4}, r"dimension_count = 4 .* is not the 8 coordinates"),
        (
            {"extra": {"rope_freqs.weight": np.array([1, 9, 2, 3], np.float32)}},
            r"rope_freqs\.weight .* other",
        ),
        ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, r"rope_freqs\.weight .* other factors"),
        ({"split__count": 3}, r"is one of 3 parts; join them with llama\.cpp's llama-gguf-split --merge"),
        ({"architecture": "mamba"}, r"architecture 'mamba'; only GGUF files of architecture llama, qwen2"),
        (
            {"extra": {"blk.0.ffn_sub_norm.weight": np.ones(3, np.float32)}},
            r"tensor blk\.0\.ffn_sub_norm\.weight that has no known place in a llama model",
        ),
    ],
)
def test_refuses_what_it_does_not_honour(changes, message, tmp_path):
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA, **changes)
    with pytest.raises(JaxplainError, match=message) as caught:
        opened(file).load(make_mesh())
    assert "\n" not in str(caught.value)


def test_a_bias_that_only_some_tensors_have_is_refused(tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    with pytest.raises(JaxplainError, match="lacks the tensor"):
        opened(gguf_files.write_beside(tmp_path, tiny.LLAMA, extra=bias)).load(make_mesh())


def test_an_unsupported_quantisation_is_named_with_its_tensor(tmp_path):
    weights = tiny.tensors(gguf_files.LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = (gguf.quants.quantize(weights[name], KIND.Q5_1), KIND.Q5_1)
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.LLAMA, weights)
    with pytest.raises(
        JaxplainError,
        match=r"the tensor blk\.1\.ffn_up\.weight of model\.gguf is quantised as Q5_1; supported are F32, "
        r"F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, so",
    ):
        opened(file)


@pytest.mark.parametrize("size", [0, 3, 40, 3000, -100])
def test_a_file_that_is_cut_short_is_one_sentence(size, tmp_path):
    whole = gguf_files.write_beside(tmp_path, tiny.LLAMA).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(JaxplainError, match=r"cut\.gguf is not a GGUF file that can be read") as caught:
        opened(tmp_path / "cut.gguf")
    assert "\n" not in str(caught.value)


def test_another_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(JaxplainError, match="machines of another byte order"):
        opened(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.gguf", "there is no such file"),
        ("notes.txt", "is no GGUF file"),
    ],
)
def test_a_file_that_is_not_there_or_no_gguf(name, message, tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(JaxplainError, match=message):
        opened(tmp_path / name)


def test_without_the_package_the_command_to_install_it_is_named(tmp_path):
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from jaxplain.configs.extraction import SubjectConfig\n"
        "from jaxplain.subjects.subject import open_subject\n"
        f"open_subject(SubjectConfig(id={str(file)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1] == (
        "jaxplain.errors.JaxplainError: reading model.gguf needs the package gguf; "
        "install it with pip install 'jaxplain[demo]'."
    )


def test_a_folder_with_a_gguf_file_alone_says_to_name_it(tmp_path):
    file = gguf_files.write_beside(tmp_path, tiny.LLAMA)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(JaxplainError, match=f"name the GGUF file itself, {file}"):
        opened(tmp_path).load(make_mesh())
